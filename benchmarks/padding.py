"""What `skip_padding` changes: masks for boxes with and without the rows of padding, on landscape images of a data set.

    python benchmarks/padding.py --model tiny-512 --dataset val.tar --limit 10 --max-instances 15

Prints the mIoU of both with the annotated masks, the IoU of the two masks with each other, and the processor time of
the image encoder, the least of all images, on one thread.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from samlight_hf import Predictor
from samlight_hf.commands.options import BUNDLED_CHECKPOINT
from samlight_hf.data import load_dataset
from samlight_hf.loading import load_model
from samlight_hf.masks.boxes import xywh_to_xyxy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-instances", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model(args.model, "cpu")
    predictors = [Predictor(model, processor, skip_padding=skips) for skips in (False, True)]
    scores, between, seconds = ([], []), [], ([], [])
    dataset = load_dataset(args.dataset, limit=args.limit)
    for index in range(len(dataset)):
        sample = dataset[index]
        instances = sample.instances[: args.max_instances]
        if sample.image.width <= sample.image.height or not instances:
            continue
        boxes = [xywh_to_xyxy(instance.bbox_xywh) for instance in instances]
        truth = np.stack([instance.mask() for instance in instances])
        both = []
        for predictor, own_scores, own_seconds in zip(predictors, scores, seconds):
            start = time.process_time()
            encoded = predictor.encode(sample.image)
            own_seconds.append(time.process_time() - start)
            masks = predictor.predict(boxes_xyxy=boxes, multimask_output=False, image=encoded).masks[:, 0]
            own_scores += iou(masks, truth)
            both.append(masks)
        between += iou(*both)
    print(f"{len(seconds[0])} images, {len(between)} objects")
    for name, own_scores, own_seconds in zip(("all rows", "skip_padding"), scores, seconds):
        print(f"{name}: mIoU {np.mean(own_scores):.4f}, encoder {1e3 * min(own_seconds):.0f} ms")
    print(f"IoU of the two masks: mean {np.mean(between):.4f}, 1st percentile {np.quantile(between, 0.01):.4f}")


def iou(masks: np.ndarray, others: np.ndarray) -> list[float]:
    union = (masks | others).sum(axis=(1, 2))
    return ((masks & others).sum(axis=(1, 2)) / np.maximum(union, 1)).tolist()


if __name__ == "__main__":
    main()
