"""Throughput of training examples: milliseconds for one on one core, and examples a second from worker processes.

python benchmarks/data.py                                  # images as large as SA-1B's, created here
python benchmarks/data.py --tars sa_000000.tar --workers 4 16 --out data.json
"""

import argparse
import datetime
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader

from samlight_hf.data import Augmentation, Cutouts, ImageDataset, PromptSampling, Sa1bDataset, TrainingExamples
from samlight_hf.data.sa1b import add_sample
from samlight_hf.masks.rle import encode_rle
from samlight_hf.utils.messages import make_console_safe


PHOTOGRAPHS = Path(__file__).parents[1] / "examples" / "images"
WIDTH, HEIGHT, NUM_MASKS = 2250, 1500, 100  # as in SA-1B


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", nargs="+", help="SA-1B tars; by default a few enlarged photographs with drawn masks")
    parser.add_argument("--cutouts", nargs="+", help="tars or folders of RGBA objects to paste")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="*", default=[os.cpu_count()], help="numbers of worker processes")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def main():
    make_console_safe()
    args = parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Sa1bDataset(args.tars or make_tar(Path(folder) / "large.tar"))
        stages = measure_stages(source, args)
        for name, milliseconds in stages.items():
            print(f"{milliseconds:8.1f} ms  {name}")
        rates = {workers: measure_workers(source, args, workers) for workers in args.workers}
        for workers, rate in rates.items():
            print(f"{rate:8.1f} examples a second from {workers} workers on {os.cpu_count()} cores")
    if args.out:
        result = {
            "what": "training examples: milliseconds for one on one core; examples a second by worker processes",
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__},
            "pictures": len(source),
            "milliseconds": stages,
            "examples_per_second": rates,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def examples(source: ImageDataset, args: argparse.Namespace, **settings) -> TrainingExamples:
    # Any share of images without masks is allowed: only the time matters.
    return TrainingExamples(source, 10**9, args.image_size, max_skipped=1.0, **settings)


def full_settings(args: argparse.Namespace) -> dict:
    return {
        "prompts": PromptSampling(args.num_prompts),
        "augmentation": Augmentation(scale=(0.5, 2.0), flip=True, brightness=0.2, contrast=0.2, saturation=0.2),
        "cutouts": Cutouts(args.cutouts) if args.cutouts else None,
    }


def measure_stages(source: ImageDataset, args: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of each step, including all steps before it."""
    full = full_settings(args)
    steps = {
        "read: two files from the tar, JSON": lambda n: source.open(n % len(source)),
        "+ pixels: decode, resize, pad": examples(source, args).__getitem__,
        f"+ {args.num_prompts} prompts: masks, boxes, points": examples(
            source, args, prompts=full["prompts"]
        ).__getitem__,
        "+ scale 0.5 to 2, flip, colours": examples(source, args, **{**full, "cutouts": None}).__getitem__,
    }
    if args.cutouts:
        steps["+ 1 to 5 objects pasted"] = examples(source, args, **full).__getitem__
    return {name: round(milliseconds(step, args.seconds), 2) for name, step in steps.items()}


def milliseconds(step: Callable[[int], object], seconds: float) -> float:
    """Return the mean time of one call, over different examples."""
    step(0)
    start, num_calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        num_calls += 1
        step(num_calls)
    return 1000 * (time.perf_counter() - start) / num_calls


def measure_workers(source: ImageDataset, args: argparse.Namespace, num_workers: int) -> float:
    """Return the examples a second that arrive in batches, after each worker has started."""
    dataset = examples(source, args, **full_settings(args))
    batches = iter(DataLoader(dataset, args.batch_size, num_workers=num_workers))
    for _ in range(2 * max(1, num_workers)):
        next(batches)
    start, num_batches = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds:
        next(batches)
        num_batches += 1
    return round(num_batches * args.batch_size / (time.perf_counter() - start), 1)


def make_tar(path: Path, num_images: int = 12) -> Path:
    """Write a tar of SA-1B's layout and sizes: enlarged photographs with noise, and mostly small, frayed ellipses."""
    generator = np.random.default_rng(0)
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))
    with tarfile.open(path, "w") as tar:
        for i in range(num_images):
            photograph = Image.open(photographs[i % len(photographs)]).convert("RGB").resize((WIDTH, HEIGHT))
            pixels = np.asarray(photograph) + generator.normal(scale=4, size=(HEIGHT, WIDTH, 1))
            file = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
            annotations = [{"id": k, "segmentation": frayed_ellipse(generator)} for k in range(NUM_MASKS)]
            add_sample(tar, f"sa_{i}", ".jpg", file.getvalue(), WIDTH, HEIGHT, annotations)
    return path


def frayed_ellipse(generator: np.random.Generator) -> dict:
    """Return an ellipse with frayed edges as compressed RLE with counts as a string."""
    x, y = generator.uniform(0, (WIDTH, HEIGHT))
    across, down = np.exp(generator.uniform(np.log(15), np.log(700), 2))
    columns = np.arange(WIDTH)
    inside = np.sqrt(np.maximum(0, 1 - ((columns - x) / across) ** 2))
    top, bottom = y + [[-1], [1]] * (down * inside + generator.normal(scale=2, size=(2, WIDTH)))
    rows = np.arange(HEIGHT)[:, None]
    mask = (rows >= top) & (rows <= bottom) & (inside > 0)
    mask[int(y), int(x)] = True
    return encode_rle(mask)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
