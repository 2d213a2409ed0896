"""A SAM-Lightening from any SAM.

    python examples/distill.py                                      # a demonstration: three minutes, no GPU, no data
    accelerate launch examples/distill.py --config examples/configs/sa1b_vit_h.yaml
    accelerate launch examples/distill.py --config examples/configs/custom_masks.yaml --train_data mine/ --output_dir outputs/mine

Every key of the YAML file is an option too, and the option wins. `--help` lists them; docs/distillation.md explains them.
"""

import json
import sys
from pathlib import Path

from safetensors import SafetensorError

from samlight_hf.distillation import DistillationArguments, demonstrate, distill, parse_arguments
from samlight_hf.utils.messages import make_console_safe, one_line
from samlight_hf.utils.processes import is_main_process, leave_process_group, one_voice, tell, tell_error


CONFIGS = Path(__file__).parent / "configs"


def main(arguments: list[str]) -> int:
    make_console_safe()
    try:
        if not arguments:
            demonstrate(CONFIGS / "demo_teacher.yaml", CONFIGS / "demo.yaml")
        else:
            with one_voice():
                run, stages = parse_arguments(arguments)
            folder = distill(run, stages)
            if is_main_process():
                print_metrics(stages)
                print(f"The student: {folder}")
    except KeyboardInterrupt:
        tell("stopped: --resume goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        tell_error(f"error: {one_line(error)}")
        return 1
    leave_process_group()
    return 0


def print_metrics(stages: list[DistillationArguments]):
    for args in stages:
        result = json.loads(Path(args.output_dir, "result.json").read_text(encoding="utf-8"))
        if result["metrics"]:
            print(args.stage, json.dumps(result["metrics"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
