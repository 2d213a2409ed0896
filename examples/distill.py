"""`samlight distill` as a script, for `accelerate launch`: train a SAM-Lightening from any SAM.

    python examples/distill.py                                      # a demonstration: three minutes, no GPU, no data
    accelerate launch examples/distill.py --config examples/configs/sa1b_vit_h.yaml
    accelerate launch examples/distill.py --config examples/configs/custom_masks.yaml --train-data mine/

Each key of the YAML file is an option too, with - for _, and the option wins. `--help` lists them, and
docs/distillation.md explains them.
"""

import sys
from pathlib import Path

from samlight_hf.commands import distill
from samlight_hf.commands.cli import main


if __name__ == "__main__":
    distill.CONFIGS = Path(__file__).parent / "configs"
    sys.exit(main(["distill", *sys.argv[1:]]))
