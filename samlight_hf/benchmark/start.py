"""The first use of a model in a process, with empty caches and with filled ones; each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import torch

from .. import SamLighteningConfig
from ..engine.optimize import optimize
from .measure import attempt, synchronize
from .settings import Settings


COLD, WARM, WHEN_NEEDED = "cold cache", "warm cache", "cold cache, graphs when needed"
_WARM_PROCESSES = 3
_CACHES = ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR")


def start_rows(settings: Settings) -> Iterator[dict]:
    """Measure `optimize` in a new process: its seconds, those of a first image and point, and its graphs' memory.

    Imports and the making of the model are not counted. Three processes use the filled cache, because times differ, and
    the row is that of the median time.
    """
    batch_sizes, prompt_counts = settings.batch_sizes, settings.prompt_counts
    row = {"part": "start", "dtype": settings.dtype_name, "batch_sizes": batch_sizes, "prompt_counts": prompt_counts}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        for mode, caches in ((COLD, folder), (WARM, folder), (WHEN_NEEDED, other)):
            yield attempt({**row, "mode": mode}, partial(_start, settings, caches, mode))


def _start(settings: Settings, folder: str, mode: str) -> dict:
    found = [_start_once(settings, folder, mode == WHEN_NEEDED) for _ in range(_WARM_PROCESSES if mode == WARM else 1)]
    found.sort(key=lambda row: row["optimize_seconds"])
    return {**found[len(found) // 2], "optimize_seconds_of_each": [row["optimize_seconds"] for row in found]}


def _start_once(settings: Settings, folder: str, when_needed: bool) -> dict:
    request = {
        "config": settings.config.to_dict(), "device": str(settings.device), "dtype": settings.dtype_name,
        "image_batch_sizes": settings.batch_sizes, "prompt_counts": settings.prompt_counts,
        "graphs_when_needed": when_needed,
    }  # fmt: skip
    environment = {**os.environ, **{name: os.path.join(folder, name) for name in _CACHES}}
    command = [sys.executable, "-m", "samlight_hf.benchmark.start"]
    child = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"the process ended with status {child.returncode}: {last}")
    return json.loads(child.stdout.splitlines()[-1])


def first_use(request: dict) -> dict:
    """Optimize a model, use it once, and return how many seconds each took and the report of `optimize`."""
    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    settings = Settings(device, dtype=dtype, config=SamLighteningConfig(**request["config"]))
    model = settings.make_model()
    synchronize(device)
    began = time.perf_counter()
    batch_sizes, prompt_counts = (tuple(request[name]) for name in ("image_batch_sizes", "prompt_counts"))
    when_needed = request["graphs_when_needed"]
    optimized = optimize(
        model, dtype, image_batch_sizes=batch_sizes, prompt_counts=prompt_counts, graphs_when_needed=when_needed
    )
    synchronize(device)
    ready = time.perf_counter()
    side = settings.config.vision_config.image_size
    with torch.inference_mode():
        points = torch.full((1, 1, 1, 2), side / 2.0, device=device)
        optimized(pixel_values=torch.zeros(1, 3, side, side, device=device, dtype=dtype), input_points=points)
    synchronize(device)
    report = {f"report_{name}": value for name, value in vars(optimized.report).items()}
    return {"optimize_seconds": ready - began, "first_mask_seconds": time.perf_counter() - ready, **report}


if __name__ == "__main__":
    print(json.dumps(first_use(json.load(sys.stdin))))
