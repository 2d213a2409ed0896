"""Average the weights of checkpoints that were fine-tuned from one initialization, and write a new checkpoint.

python examples/average.py outputs/a/student outputs/b/student --out outputs/average
samlight evaluate --model outputs/a/student --model outputs/average --dataset held_out.tar
"""

import argparse
import sys
from pathlib import Path

from samlight_hf.conversion import average_models
from samlight_hf.loading import find_dtype, load_model
from samlight_hf.utils.atomic_files import check_new_folder
from samlight_hf.utils.messages import make_console_safe


def main():
    make_console_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or Hub names; the processor is the first one's")
    parser.add_argument("--shares", nargs="+", type=float, help="weight of each model, relative to the others (equal)")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--dtype", default="float32", help="dtype of the written weights (%(default)s)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (%(default)s)")
    args = parser.parse_args()
    try:
        dtype = find_dtype(args.dtype)
        check_new_folder("--out", args.out)
        loaded = [load_model(name, device="cpu") for name in args.models]
        average = average_models([model for model, _ in loaded], args.shares)
        average.to(dtype).save_pretrained(args.out, max_shard_size=args.max_shard_size)
        loaded[0][1].save_pretrained(args.out)
        load_model(args.out, device="cpu")  # raises where the written checkpoint is not complete and finite
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: the average of {len(args.models)} models")


if __name__ == "__main__":
    main()
