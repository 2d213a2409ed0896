"""What `skip_padding` changes: masks for boxes with and without the rows of padding, on landscape images of a data set.

    python benchmarks/padding.py --dataset val.tar --device cuda                     # masks of all images: a GPU
    python benchmarks/padding.py --dataset val.tar --device cpu --limit 5 --max-instances 8
    python benchmarks/padding.py --model tiny-512 --dataset val.tar --device cpu --limit 8 --max-instances 10

Prints the mIoU of both with the annotated masks, the IoU of the two masks with each other, and the time of an image in
the encoder, preprocessing included, the least of all images: on a CPU, the processor time of one thread. Models are in
float32: the fused encoder of half precision on CUDA computes all rows.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from samlight_hf import Predictor
from samlight_hf.benchmark.machine import describe_machine
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, parse_positive
from samlight_hf.data import load_dataset
from samlight_hf.loading import load_model
from samlight_hf.masks.boxes import xywh_to_xyxy


WAYS = "all rows", "skip_padding"


def main():
    args = parse_arguments()
    model, processor = load_model(args.model, args.device)
    if model.device.type == "cpu":
        torch.set_num_threads(1)
    predictors = [Predictor(model, processor, skip_padding=skips) for skips in (False, True)]
    scores, between, seconds = ([], []), [], ([], [])
    dataset = load_dataset(args.dataset, limit=args.limit)
    for index in tqdm(range(len(dataset)), unit="image", leave=False, disable=None):
        sample, _ = dataset.load(index)
        if sample is None or sample.image.width <= sample.image.height or not sample.instances:
            continue
        instances = sample.instances[: args.max_instances]
        boxes = [xywh_to_xyxy(instance.bbox_xywh) for instance in instances]
        truth = np.stack([instance.mask() for instance in instances])
        both = []
        for predictor, own_scores, own_seconds in zip(predictors, scores, seconds):
            encoded, encoding = encode(predictor, sample.image)
            own_seconds.append(encoding)
            masks = predictor.predict(boxes_xyxy=boxes, multimask_output=False, image=encoded).masks[:, 0]
            own_scores += iou(masks, truth)
            both.append(masks)
        between += iou(*both)
    if not between:
        raise SystemExit(f"{args.dataset}: no landscape image with objects among these.")
    result = {
        "image_size": model.config.vision_config.image_size, "num_images": len(seconds[0]), "num_objects": len(between),
        "miou": {name: float(np.mean(own)) for name, own in zip(WAYS, scores)},
        "iou_of_both": {"mean": float(np.mean(between)), "1st percentile": float(np.quantile(between, 0.01))},
        "encoder_ms": {name: 1e3 * min(own) for name, own in zip(WAYS, seconds)},
    }  # fmt: skip
    tell(result, args.json, str(model.device))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT, help="%(default)s")
    parser.add_argument("--dataset", required=True, help="as for `samlight evaluate`")
    parser.add_argument("--limit", type=parse_positive, help="the first images")
    parser.add_argument("--max-instances", type=parse_positive, help="the first instances of each image")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    parser.add_argument("--json", type=Path, help="file of the result")
    return parser.parse_args()


def encode(predictor: Predictor, image):
    """Return the encoded image and the seconds that it took."""
    on_cuda = predictor.model.device.type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    start = clock()
    encoded = predictor.encode(image)
    if on_cuda:
        torch.cuda.synchronize()
    return encoded, clock() - start


def iou(masks: np.ndarray, others: np.ndarray) -> list[float]:
    union = (masks | others).sum(axis=(1, 2))
    return ((masks & others).sum(axis=(1, 2)) / np.maximum(union, 1)).tolist()


def tell(result: dict, path: Path | None, device: str):
    print(f"{result['num_images']} images, {result['num_objects']} objects, {result['image_size']} px, {device}")
    for name in WAYS:
        print(f"{name}: mIoU {result['miou'][name]:.4f}, encoder {result['encoder_ms'][name]:.1f} ms")
    mean, least = result["iou_of_both"].values()
    print(f"IoU of the two masks: mean {mean:.4f}, 1st percentile {least:.4f}")
    if path:
        about = {
            "command": f"python {shlex.join(sys.argv)}", "date": datetime.date.today().isoformat(),
            "machine": describe_machine(), "torch": torch.__version__, "device": device,
        }  # fmt: skip
        path.write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
