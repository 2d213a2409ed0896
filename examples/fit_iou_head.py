"""Train a finished checkpoint's IoU head alone, so that the best of a click's masks has the highest score.

    python examples/fit_iou_head.py outputs/x/student --data coco.tar clothes.tar --images 30 10 --complete coco.tar \\
        --out outputs/fitted

No mask changes. The method is described at `fit_iou_head` in samlight_hf/evaluation/iou_head.py.
"""

import argparse
import sys
from pathlib import Path

from samlight_hf.data import load_dataset
from samlight_hf.evaluation.iou_head import fit_iou_head, measure_order, record_examples
from samlight_hf.loading import load_model
from samlight_hf.utils.atomic_files import check_new_folder
from samlight_hf.utils.messages import make_console_safe


def main():
    make_console_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--data", nargs="+", required=True, help="tars in SA-1B's layout, or folders with masks")
    parser.add_argument("--images", nargs="+", type=int, default=[20], help="of each of --data, or one number for all")
    parser.add_argument("--complete", nargs="+", default=[], help="those of --data that are annotated completely")
    parser.add_argument("--own-share", type=float, default=0.8, help="see fit_iou_head (%(default)s)")
    parser.add_argument("--anywhere-weight", type=float, default=1.0, help="see fit_iou_head (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--device", default="auto", help="torch device, or auto (%(default)s)")
    args = parser.parse_args()
    try:
        numbers = args.images * len(args.data) if len(args.images) == 1 else args.images
        if len(numbers) != len(args.data) or min(numbers) < 1:
            raise ValueError(f"--images {args.images} must be one number from 1 on, or one for each of --data.")
        if unknown := set(args.complete) - set(args.data):
            raise ValueError(f"--complete {', '.join(sorted(unknown))} is not among --data.")
        check_new_folder("--out", args.out)
        datasets = [load_dataset(path) for path in args.data]
        model, processor = load_model(args.model, device=args.device)
        sets = []
        for path, dataset, number in zip(args.data, datasets, numbers):
            sets.append(record_examples(model, processor, dataset, number))
            print(f"{path}: {len(sets[-1])} prompts")
        head = model.mask_decoder.iou_prediction_head
        before = [measure_order(head, examples)[0] for examples in sets]
        are_complete = [path in args.complete for path in args.data]
        fit_iou_head(model, sets, are_complete, args.own_share, args.anywhere_weight)
        for path, examples, old in zip(args.data, sets, before):
            new, best = measure_order(head, examples)
            print(f"{path}: IoU of the mask that is taken {old:.3f} -> {new:.3f}, of the best one {best:.3f}")
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
