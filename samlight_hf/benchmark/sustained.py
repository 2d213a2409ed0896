"""The image encoder's rate after a pause and in continuous work, in which a GPU may reach its limit of power."""

import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .encoders import FUSED_GRAPH, OURS, fused_encoder
from .measure import attempt, capture, random_tensor
from .settings import Settings


PAUSE, WORK = "after a pause", "in continuous work"
_CALLS = 20  # of a median
_WARM_UP_CALLS = 3
_SECONDS = 2.0  # of the pause, and of the work


def sustained_rows(settings: Settings) -> Iterator[dict]:
    """Measure the fused encoder in a CUDA graph, one batch behind the other, in half precision.

    `ms` is the median of 20 batches: the fourth to the 23rd after a pause, or the last ones of two seconds of work.
    """
    if not settings.on_cuda:
        return
    for dtype in dict.fromkeys((settings.dtype, torch.float16)):
        for batch_size in settings.batch_sizes:
            row = {
                "part": "sustained", "model": OURS, "mode": FUSED_GRAPH, "dtype": str(dtype).removeprefix("torch."),
                "batch_size": batch_size,
            }  # fmt: skip
            measured = attempt(row, partial(_measure, dtype, batch_size, settings))
            lines = measured.pop("lines", {})
            yield from ({**row, "work": work, **line} for work, line in lines.items()) if lines else (measured,)


def _measure(dtype: torch.dtype, batch_size: int, settings: Settings) -> dict[str, dict[str, dict]]:
    settings = Settings(settings.device, dtype=dtype, config=settings.config)
    encoder, side = fused_encoder(settings.config, settings), settings.config.vision_config.image_size
    images = random_tensor((batch_size, 3, side, side), settings.device, dtype)
    with torch.inference_mode():
        replay = capture(lambda: encoder(images))
        _call_times(replay, _WARM_UP_CALLS)
        time.sleep(_SECONDS)
        first = statistics.median(_call_times(replay, _WARM_UP_CALLS + _CALLS)[_WARM_UP_CALLS:])
        state: dict[str, float] = {}
        uuid = str(torch.cuda.get_device_properties(settings.device).uuid)
        calls = max(2 * _CALLS, int(1e3 * _SECONDS / first))
        last = statistics.median(_call_times(replay, calls, lambda: state.update(_power_and_clock(uuid)))[-_CALLS:])
    found = {PAUSE: {"ms": first}, WORK: {"ms": last, **state}}
    return {
        "lines": {
            work: {**line, "images_per_second": 1e3 * batch_size / line["ms"], "repeats": _CALLS}
            for work, line in found.items()
        }
    }


def _call_times(
    function: Callable[[], object], calls: int, meanwhile: Callable[[], object] = lambda: None
) -> list[float]:
    """Return the times in ms of calls, one behind the other on the device; `meanwhile` runs during the second half."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    thread = threading.Thread(target=meanwhile)
    events[0].record()
    for number, event in enumerate(events[1:], start=1):
        function()
        event.record()
        if number == calls // 2:
            event.synchronize()
            thread.start()
    events[-1].synchronize()
    thread.join()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def _power_and_clock(uuid: str) -> dict[str, float]:
    """Return a GPU's power in watts and its clock in MHz, as nvidia-smi says; nothing if it does not."""
    fields = "power.draw", "enforced.power.limit", "clocks.sm"
    options = f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"
    try:
        text = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=10, check=True).stdout
        return dict(zip(("power_w", "power_limit_w", "clock_mhz"), map(float, text.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
