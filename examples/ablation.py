"""What a setting of a distillation is worth: the same training with and without it, with the same budget, by several seeds.

    python examples/distill.py && python examples/ablation.py     # the layer weights, with the demonstration's teacher and student, on a CPU
    python examples/ablation.py --config examples/configs/sa1b_vit_b.yaml --seeds 0 1 2
    python examples/ablation.py --config examples/configs/bsds_student.yaml --variants examples/configs/bsds_ablation.yaml ...

Compared are dynamic, uniform and output-only weights of a config's encoder stage, with the decoder stage after it; or the
variants of a YAML file, which has a name for each and what of the arguments of examples/distill.py is other in it than on the
command line. Printed are mean and spread over seeds of what the evaluation measures. Finished runs are kept: the command can be interrupted. The students are
OUT/VARIANT-SEED/student, for `samlight evaluate` to put side by side.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

from samlight_hf.distillation import distill, parse_arguments
from samlight_hf.utils.atomic_files import atomic_write, read_yaml
from samlight_hf.utils.messages import make_console_safe, one_line
from samlight_hf.utils.processes import is_main_process, leave_process_group, one_voice


SCHEDULES = ("dynamic", "uniform", "output_only")


def main():
    make_console_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent / "configs/demo.yaml"))
    parser.add_argument("--stages", nargs="+", default=["encoder", "decoder"])
    parser.add_argument("--variants", help="a YAML file; by default the layer weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"))
    with one_voice():
        options, more = parser.parse_known_args()
    variants = {schedule: f"--layer_weights {schedule}" for schedule in SCHEDULES}
    if options.variants:
        variants = {str(name): arguments or "" for name, arguments in read_yaml(options.variants).items()}
    shared = ["--config", options.config, "--stages", *options.stages, *more]
    shared += ["--resume", "--disable_tqdm", "true", "--logging_steps", "100"]
    results = {name: [] for name in variants}
    for seed in options.seeds:
        for name, arguments in variants.items():
            folder = options.out / f"{name}-{seed}"
            own = ["--output_dir", str(folder), "--seed", str(seed)]
            run, stages = parse_arguments([*shared, *shlex.split(arguments), *own])
            distill(run, stages)
            if not is_main_process():
                continue
            metrics = {
                stage: json.loads((folder / stage / "result.json").read_text())["metrics"] for stage in run.stages
            }
            results[name].append({"seed": seed, "stages": metrics})
            text = json.dumps({"shared": shared, "variants": variants, "results": results}, indent=1)
            atomic_write(
                options.out / "ablation.json", lambda path, text=text: path.write_text(text + "\n", encoding="utf-8")
            )
    if is_main_process():
        print_table(results)
    leave_process_group()


def print_table(results: dict[str, list[dict]]):
    found = [
        (stage, name) for runs in results.values() for stage, values in runs[0]["stages"].items() for name in values
    ]
    width = max(map(len, results))
    for stage, name in dict.fromkeys(found):
        if name == "epoch":
            continue
        print(f"{stage}: {name.removeprefix('eval_')}")
        for variant, runs in results.items():
            values = [run["stages"][stage][name] for run in runs if name in run["stages"].get(stage, {})]
            if not values:
                continue
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            listed = ", ".join(f"{value:.4f}" for value in values)
            print(f"  {variant:{width}} {statistics.mean(values):.4f} ± {spread:.4f}   ({listed})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
