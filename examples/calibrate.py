"""Rescale a checkpoint's scores so that SAM's default thresholds suit everything mode; no mask changes.

    python examples/calibrate.py outputs/x/student --data coco-train.tar --out outputs/calibrated

The images must be annotated completely, and must not be those that the result is evaluated on. The method is described
at `calibrate` in samlight_hf/evaluation/calibration.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from samlight_hf.data import load_dataset
from samlight_hf.evaluation.calibration import LOGIT_SCALES, calibrate
from samlight_hf.loading import find_dtype, load_model
from samlight_hf.utils.atomic_files import check_new_folder
from samlight_hf.utils.messages import make_console_safe


def main():
    make_console_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--data", nargs="+", required=True, help="tars in SA-1B's layout")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument(
        "--masks-per-image", type=float, default=20.0, help="number at the default thresholds (%(default)s)"
    )
    parser.add_argument("--points-per-side", type=int, default=32, help="side of the point grid (%(default)s)")
    parser.add_argument(
        "--logit-scales", type=float, nargs="+", default=LOGIT_SCALES, help="factors of the logits to try (%(default)s)"
    )
    parser.add_argument("--limit", type=int, help="use only the first images")
    parser.add_argument("--device", default="auto", help="torch device, or auto (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="dtype of the written weights (%(default)s)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (%(default)s)")
    args = parser.parse_args()
    try:
        check_new_folder("--out", args.out)
        dtype = find_dtype(args.dtype)
        dataset = load_dataset(args.data, limit=args.limit)
        model, processor = load_model(args.model, device=args.device)
        result = calibrate(model, processor, dataset, args.masks_per_image, args.points_per_side, args.logit_scales)
        model.to(dtype).save_pretrained(args.out, max_shard_size=args.max_shard_size)
        processor.save_pretrained(args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {json.dumps(dataclasses.asdict(result))}")


if __name__ == "__main__":
    main()
