"""Functions of CUDA tensors, replayed from CUDA graphs."""

import contextlib
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from ..utils.autocast import without_autocast


_one_capture = threading.Lock()  # torch's own rule: one capture at a time in a process


class GraphedFunction:
    """A function of tensors that is replayed from a CUDA graph, one for each combination of shapes; elsewhere called. Autocast does not reach it.

    The first tensor says where; the others may be on the CPU, from where one copy takes them all, without waiting. What it
    returns is overwritten by the next call of any function that shares its `pool`. Of more than `max_graphs` the one that was
    not used for the longest time is dropped; after `freeze` no more are made, and other shapes are called.
    `last_ran` is "graph" or "eager". Threads that share it call it, and read what it returned, in a `turn`.
    """

    def __init__(self, function: Callable, enabled: bool = True, max_graphs: int = 4, pool=None):
        self.function = without_autocast(function)
        self.enabled, self.max_graphs, self.pool = enabled, max_graphs, pool
        self.last_ran: str | None = None
        self._graphs: OrderedDict = OrderedDict()
        self._frozen = False
        self._lent: torch.Tensor | None = None  # by `empty`, for a graph that there is not yet

    def __len__(self) -> int:
        return len(self._graphs)

    def freeze(self):
        """Keeps the graphs that there are, and makes no others."""
        self._frozen = True

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `torch.empty`, for the one tensor of the next call: what the graph for it reads, or will read, so that nothing is copied.

        That tensor is always the same: the next call with another one of its kind overwrites it. From here to the end of
        the call nobody else may call this function: both are in one `turn`.
        """
        captured = self._graphs.get((device, (torch.Size(shape), dtype)))
        if captured is not None:
            return captured[1].tensors[0]
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self._lent = tensor if self.enabled and not self._frozen else None
        return tensor

    def __call__(self, *tensors: torch.Tensor):
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self(*tensors)
        lent, self._lent = self._lent, None
        device = tensors[0].device
        key = device, *[(tensor.shape, tensor.dtype) for tensor in tensors]
        captured = self._graphs.get(key)
        if captured is None:
            if self._frozen or not self.enabled or device.type != "cuda":
                self.last_ran = "eager"
                return self.function(*(tensor.to(device, non_blocking=True) for tensor in tensors))
            if len(self._graphs) >= self.max_graphs:
                torch.cuda.synchronize(device)  # another stream may be running the graph that is dropped
            while len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)
            captured = self._graphs[key] = self._capture(tensors, lent)
        self._graphs.move_to_end(key)
        graph, inputs, outputs = captured
        inputs.fill(tensors)
        graph.replay()
        self.last_ran = "graph"
        return outputs

    def _capture(self, tensors: tuple[torch.Tensor, ...], lent: torch.Tensor | None):
        with _one_capture, torch.cuda.device(tensors[0].device):
            inputs = StaticInputs(tensors, lent)
            inputs.fill(tensors)
            stream = _warm_up_stream(tensors[0].device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # kernels are chosen, and workspaces made, before the capture
                    self.function(*inputs.tensors)
            torch.cuda.current_stream().wait_stream(stream)
            _forget_workspaces()
            torch.cuda.empty_cache()  # what the warm-up took, the graph takes once more
            graph = torch.cuda.CUDAGraph()
            # Other threads may use CUDA meanwhile, and must not make this capture fail.
            with collects_no_garbage(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = self.function(*inputs.tensors)
            _forget_workspaces()  # the graph's own stays in its pool, where the next graph uses it too
        return graph, inputs, outputs


class StaticInputs:
    """Tensors like `examples`, all where the first is, that stay where they are in memory while `fill` gives them values.

    An example that is `lent` becomes one of them. Those of examples on the CPU lie side by side in one buffer there and one on
    the device: each copy between them takes as long as several kernels of a short graph. Later values may be on the CPU or on
    the device, whatever the examples were.
    """

    def __init__(self, examples: Sequence[torch.Tensor], lent: torch.Tensor | None = None):
        from_cpu = [example for example in examples if example.is_cpu]
        # Not pinned: when a copy from there returns, it has been read, and may be filled anew.
        self._buffer = torch.empty(sum(_aligned(example.nbytes) for example in from_cpu), dtype=torch.uint8)
        self._device_buffer = torch.empty_like(self._buffer, device=examples[0].device)
        sources, copies = (iter(_views(buffer, from_cpu)) for buffer in (self._buffer, self._device_buffer))

        def stays(example: torch.Tensor) -> torch.Tensor:
            if example.is_cpu:
                return next(copies)
            return example if example is lent else torch.empty_like(example, device=examples[0].device)

        self.tensors = [stays(example) for example in examples]
        self._targets = [next(sources) if e.is_cpu else tensor for e, tensor in zip(examples, self.tensors)]

    def fill(self, tensors: Sequence[torch.Tensor]):
        for target, tensor in zip(self._targets, tensors):
            if tensor is not target:  # which may have been written by the caller
                target.copy_(tensor, non_blocking=target.is_cuda)
        if self._buffer.numel():
            self._device_buffer.copy_(self._buffer, non_blocking=True)


def _views(buffer: torch.Tensor, examples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors like `examples` in the bytes of the buffer, one after the other."""
    starts = accumulate((_aligned(example.nbytes) for example in examples), initial=0)
    return [
        buffer[start : start + example.nbytes].view(example.dtype).view(example.shape)
        for start, example in zip(starts, examples)
    ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16  # what kernels read at once


@contextlib.contextmanager
def collects_no_garbage() -> Iterator[None]:
    """For a capture: an older graph, of a model that nobody holds, that is freed in the middle of it makes it fail."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@lru_cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace of 32 MB or more for each stream that it has ever run on."""
    return torch.cuda.Stream(device)


def _forget_workspaces():
    """Gives cuBLAS's workspaces back to torch, as torch's own graphs do before and after a capture."""
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
