"""`samlight evaluate` as a script, so that `accelerate launch` can start it on several GPUs.

python examples/evaluate.py --model checkpoints/sam-lightening-tiny --dataset val-000000.tar
accelerate launch examples/evaluate.py --model facebook/sam-vit-huge --dataset val-000000.tar
"""

import sys

from samlight_hf.commands.cli import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
