"""Encoder and everything mode without a GPU: the fast ways beside their slow siblings, as ratios in one run.

    python benchmarks/without_gpu.py --out benchmarks/results/without_gpu.json

Times are of the process on one thread (`time.process_time`), so that other processes on the machine change them little.
Each round runs all ways one after another; a time is the least of all rounds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from samlight_hf.modeling import dilated_attention

from samlight_hf import MaskGenerator
from samlight_hf.benchmark.machine import describe_machine
from samlight_hf.benchmark.measure import relative_error
from samlight_hf.engine.memory_budget import MemoryBudget
from samlight_hf.images.preprocessing import image_tensor, preprocess
from samlight_hf.inference.crops import MaskGenerationSettings
from samlight_hf.kernels import cpu_blocks
from samlight_hf.loading import load_model


ROOT = Path(__file__).parents[1]


def least_times(ways: dict[str, Callable], rounds: int) -> tuple[dict[str, float], dict]:
    """Return the least seconds of each way, and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(rounds + 1):
        for name, call in ways.items():
            start = time.process_time()
            results[name] = call()
            seconds[name].append(time.process_time() - start)
    return {name: min(values[1:]) for name, values in seconds.items()}, results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points-per-side", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder, path = ROOT / "checkpoints" / "sam-lightening-tiny", ROOT / "examples" / "images" / "coffee.jpg"
    (model, processor), (half, _) = (load_model(folder, "cpu", dtype) for dtype in ("float32", "bfloat16"))
    image = image_tensor(Image.open(path))
    pixels = preprocess(processor.image_processor, [image], torch.device("cpu"), torch.float32)

    def encode(own, blocks: bool):
        patch = mock.patch.object(dilated_attention, "_prefers_blocks", lambda query: blocks)
        with torch.inference_mode(), patch:
            return own.vision_encoder(pixels.to(own.dtype))[0].float()

    names = "float32", "bfloat16, sdpa", "bfloat16, blocks"
    encoders = dict(zip(names, (lambda: encode(model, False), lambda: encode(half, False), lambda: encode(half, True))))
    seconds, embeddings = least_times(encoders, args.rounds)
    rows = [
        {"part": "encoder", "mode": name, "seconds": seconds[name], "ratio": seconds[name] / seconds["float32"],
         "embedding_error": relative_error(embeddings[name], embeddings["float32"])} for name in names
    ]  # fmt: skip

    generator = MaskGenerator(model, processor)
    encoded = generator.encoder([image])[0]
    keep_all = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.65, "crops_nms_thresh": 1.0}
    settings = MaskGenerationSettings(points_per_crop=args.points_per_side, **keep_all)
    whole = 2**29 // image[0].numel()

    def generate(blocks: bool):
        reason = None if blocks else "switched off."
        steps = (lambda self, *_: 2) if blocks else (lambda self, *_: min(29, whole))  # as many as before the blocks
        with mock.patch.object(cpu_blocks, "why_not", lambda _: reason):
            with mock.patch.object(MemoryBudget, "masks_per_step", steps):
                return generator.generate(image, settings, encoded=encoded)

    seconds, results = least_times({"plain": lambda: generate(False), "blocks": lambda: generate(True)}, args.rounds)
    plain, blocks = (results[name].masks.to_masks() for name in ("plain", "blocks"))
    row = {"part": "everything mode, encoder not counted", "points": args.points_per_side**2, "masks": len(plain)}
    if plain.shape == blocks.shape:
        overlap, union = (plain & blocks).sum(axis=(1, 2)), (plain | blocks).sum(axis=(1, 2))
        row["least_iou_before_suppression"] = float(np.min(overlap / np.maximum(union, 1)))
    rows += [{**row, "mode": name, "seconds": s, "ratio": s / seconds["plain"]} for name, s in seconds.items()]
    for row in rows:
        print(row)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python benchmarks/without_gpu.py",
            "machine": describe_machine(),
            "torch": torch.__version__,
        }
        args.out.write_text(json.dumps({**result, "rounds": args.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
