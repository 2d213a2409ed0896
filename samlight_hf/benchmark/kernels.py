"""The time of the image encoder's kernels on the device, plain and optimized."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .encoders import EAGER, OPTIMIZED, OURS, optimized
from .measure import attempt, random_tensor
from .settings import Settings


REPEATS = 10


def profile_rows(settings: Settings) -> Iterator[dict]:
    """Profile one image and eight: each kernel with its `launches` and `us` in one call, the longest first.

    A kernel's time counts from the end of the one before, if that is later than its own start: some start early, and
    wait.
    """
    if not settings.on_cuda:
        return
    for mode in (EAGER, OPTIMIZED):
        for batch_size in (1, 8):
            row = {
                "part": "profile", "model": OURS, "mode": mode, "dtype": settings.dtype_name, "batch_size": batch_size
            }  # fmt: skip
            profiled = attempt(row, partial(_kernels, mode, batch_size, settings))
            kernels = profiled.pop("kernels", [])
            yield from ({**row, **kernel} for kernel in kernels) if kernels else (profiled,)


@torch.inference_mode()
def _kernels(mode: str, batch_size: int, settings: Settings) -> dict[str, list[dict]]:
    with torch.inference_mode(False):
        model = settings.make_model()
        if mode == OPTIMIZED:
            model = optimized(model, settings, image_batch_sizes=(batch_size,), prompt_counts=())
    size = settings.config.vision_config.image_size
    pixel_values = random_tensor((batch_size, 3, size, size), settings.device, settings.dtype)
    for _ in range(3):
        model.vision_encoder(pixel_values)
    torch.cuda.synchronize(settings.device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(REPEATS):
            model.vision_encoder(pixel_values)
            torch.cuda.synchronize(settings.device)
    spans = [
        (event.time_range.start, event.time_range.end, event.name[:100])
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return {"kernels": kernels_of(spans, REPEATS)}


def kernels_of(spans: Iterable[tuple[float, float, str]], repeats: int) -> list[dict]:
    """Sum kernels by name.

    Args:
        spans: start and end, in microseconds, and name of each kernel.
        repeats: number of calls that the spans are from.

    Returns:
        "kernel", "launches" and "us" of each name in one call, the longest first.
    """
    launches: Counter[str] = Counter()
    times: defaultdict[str, float] = defaultdict(float)
    last = 0.0
    for start, end, name in sorted(spans, key=lambda span: span[1]):
        launches[name] += 1
        times[name] += end - max(start, last)
        last = end
    return [
        {"kernel": name, "launches": launches[name] / repeats, "us": time / repeats}
        for name, time in sorted(times.items(), key=lambda item: -item[1])
    ]
