"""Time, memory and arithmetic of one call.

Times are medians of CUDA events around single calls after warm-up, and each call is waited for. So the time that Python
needs to launch kernels counts, as it does for a user of the model. Without CUDA a clock is read.
"""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..engine.cuda_graphs import _forget_workspaces, collects_no_garbage
from ..utils.messages import one_line


WARM_UP_SECONDS = 0.05  # after the first call, to raise the clock rates
MEGABYTE = 2**20
GRAPH_MS = 2.0  # a graph's launch takes some 20 microseconds
_REASON_LIMIT = 300


def attempt(row: dict, measure: Callable[[], dict]) -> dict:
    """Return `row` with the result of `measure`; where that fails, with `cannot_run` and the reason."""
    try:
        return {**row, **measure()}
    except Exception as error:
        return {**row, "cannot_run": reason(error)}


def require(reason_against: str | None):
    """Raise ValueError with the reason why something cannot run, where there is one."""
    if reason_against:
        raise ValueError(reason_against)


def reason(error: Exception) -> str:
    """Return the reason of a failed row, in one line, without the name of the home folder."""
    text, home = f"{type(error).__name__}: {one_line(error, _REASON_LIMIT)}", os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    function: Callable[[], object], device: torch.device, repeats: int = 20, seconds: float = 2.0
) -> dict[str, float]:
    """Return the median time of one call in `ms`, the number of `repeats`, and the `first_call_s`.

    At least `repeats` calls are timed, and more of quick ones. Slow calls are limited by `seconds`, but at least five
    are timed, or three that take more than a second.

    Args:
        function: the call.
        device: the device that is waited for.
        repeats: least number of calls.
        seconds: time after which slow calls end.
    """
    start = time.perf_counter()
    function()
    synchronize(device)
    first_call = time.perf_counter() - start
    start, calls = time.perf_counter(), 0
    while calls < (3 if device.type == "cuda" else 1) or time.perf_counter() - start < WARM_UP_SECONDS:
        function()
        synchronize(device)
        calls += 1
        if time.perf_counter() - start > seconds / 4:
            break
    estimate = (time.perf_counter() - start) / calls
    repeats = min(max(repeats, int(0.1 / estimate)), 100, max(int(seconds / estimate), 3 if estimate > 1 else 5))
    timed = _cuda_ms if device.type == "cuda" else _clock_ms
    median = statistics.median(timed(function) for _ in range(repeats))
    return {"ms": median, "repeats": repeats, "first_call_s": first_call}


def _cuda_ms(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _clock_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def wall_clock_ms(function: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Return the median time in ms from a call to the end of the device's work, for a warm function."""

    def call():
        function()
        synchronize(device)

    return statistics.median(_clock_ms(call) for _ in range(repeats))


def capture(function: Callable[[], object], calls: int = 1) -> Callable[[], None]:
    """Capture calls of `function` in one CUDA graph, and return its replay. Tensors that it reads must keep their
    addresses.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are chosen, and workspaces allocated, before the capture
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    _forget_workspaces()
    graph = torch.cuda.CUDAGraph()
    with collects_no_garbage(), torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            outputs = function()
    _forget_workspaces()

    def replay(outputs=outputs):  # the outputs live as long as the graph
        graph.replay()

    return replay


def graph_time_ms(function: Callable[[], object], device: torch.device) -> float:
    """Return the median time of one call, in ms, in a CUDA graph of so many calls that its launch takes 1 % of them."""
    if device.type != "cuda":
        return time_calls(function, device)["ms"]
    calls = graph_calls(function)
    return time_calls(capture(function, calls), device)["ms"] / calls


def graph_calls(function: Callable[[], object]) -> int:
    """Return the number of calls that take about `GRAPH_MS` in a CUDA graph, at least ten."""
    replay = capture(function, 10)
    replay()
    return max(10, math.ceil(10 * GRAPH_MS / _cuda_ms(replay)))


def release_memory(device: torch.device):
    """Release all unused memory: earlier models and graphs, torch's cache, cuBLAS's workspaces."""
    gc.collect()
    if device.type == "cuda":
        _forget_workspaces()
        torch.cuda.empty_cache()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Measure the peak memory above that at the start, on CUDA, in MB of 2**20 bytes; the values are set at the end.

    `peak_memory_mb` is the memory of tensors, including weights and graphs. `peak_reserved_mb` is the memory that torch
    took from the device for them.
    """
    release_memory(device)
    peak: dict[str, float] = {}
    if device.type != "cuda":
        yield peak
        return
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    torch.cuda.synchronize(device)
    peak["peak_memory_mb"] = (torch.cuda.max_memory_allocated(device) - allocated) / MEGABYTE
    peak["peak_reserved_mb"] = (torch.cuda.max_memory_reserved(device) - reserved) / MEGABYTE


def count_gflop(module: nn.Module, *inputs: torch.Tensor) -> float:
    """Count 10^9 operations of a module's matrix products, convolutions and attention, from shapes alone.

    A floating point multiplication and an addition are two operations. Nothing is computed or allocated.
    """
    # Not on the device "meta", where modules that switch autocast off fail. Attention as products, which are counted.
    fake = FakeTensorMode()
    named = {name: fake.from_tensor(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fake, FlopCounterMode(display=False) as counter:
        arguments = tuple(fake.from_tensor(tensor) for tensor in inputs)
        torch.func.functional_call(module, cast(dict[str, torch.Tensor], named), arguments)
    return counter.get_total_flops() / 1e9


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the limits of the device: `tflops` of a large matrix product, and `gb_per_s` of a large copy (read and
    written).
    """
    size, num_bytes = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    product_ms = time_calls(lambda: torch.mm(left, right, out=product), device, repeats=50)["ms"]
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_(generator=generator)
    target = torch.empty_like(source)
    copy_ms = time_calls(lambda: target.copy_(source), device)["ms"]
    return {"tflops": 2 * size**3 / product_ms / 1e9, "gb_per_s": 2 * num_bytes / copy_ms / 1e6}


def arithmetic(gflop: float, milliseconds: float, ceiling_tflops: float | None) -> dict[str, float]:
    """Return `gflop`, and with a known ceiling the time at the ceiling and the fraction of it that was reached."""
    if ceiling_tflops is None:
        return {"gflop": gflop}
    floor = gflop / ceiling_tflops
    return {"gflop": gflop, "floor_ms": floor, "ceiling_fraction": floor / milliseconds}


@contextmanager
def building(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create the models inside on `device` in `dtype`, with the same random weights each time."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)


def random_tensor(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return standard normal numbers from a new generator: a failed capture may leave torch's own one unusable."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Compute |output - reference| / |reference| in float64."""
    reference = reference.double()
    return ((output.double() - reference).norm() / reference.norm()).item()
