"""CUDA graphs of functions of tensors: captured once for each combination of shapes, then replayed."""

import contextlib
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch

from ..kernels.support import compile_ahead
from ..utils.autocast import without_autocast
from ..utils.packing import aligned, packed_bytes, views_like


_one_capture = threading.Lock()  # torch allows one capture at a time in a process


class GraphMemory:
    """Memory that the graphs of several functions share, since they are never replayed at the same time.

    Intermediate results are in a pool of torch. Inputs are at the beginning of one buffer, as large as the largest
    graph needs it: each call writes them before the replay. Behind them may be a large result, which is read before the
    next call.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._buffers: dict[torch.device, torch.Tensor] = {}
        self._captures = False
        self._result_start = 0  # behind the inputs of the graph that is captured

    def reserve(self, num_bytes: int, device: torch.device):
        """Make the buffer large enough for inputs and result of that many bytes together."""
        self._first(num_bytes, device)

    def inputs(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return the first bytes of the buffer, uint8 (num_bytes,), for the inputs of a new graph."""
        self._result_start = aligned(num_bytes)
        return self._first(num_bytes, device)[:num_bytes]

    def result(self, num_bytes: int, device: torch.device, most: int = 0) -> torch.Tensor | None:
        """Return bytes behind the new graph's inputs, or None outside of `capturing`, where nobody would share them.

        If there is no room for them, room for `most` bytes is made, so that results of other graphs find it, too.
        """
        if not self._captures:
            return None
        end = self._result_start + num_bytes
        return self._first(end, device, self._result_start + max(num_bytes, most))[self._result_start : end]

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Mark the capture of a graph and its warm-up, which allocates the result: never in the pool of a graph."""
        self._captures = True
        try:
            yield
        finally:
            self._captures = False

    def num_bytes(self) -> int:
        """Return the size of the memory that torch keeps for the graphs: segments of the pool, and the buffer."""
        segments = (part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) == tuple(self.pool))
        return sum(part["total_size"] for part in segments) + sum(buffer.nbytes for buffer in self._buffers.values())

    def _first(self, num_bytes: int, device: torch.device, wanted: int = 0) -> torch.Tensor:
        """Return the buffer if it has `num_bytes`, or else a new one of as many, or of `wanted`."""
        buffer = self._buffers.get(device)
        if buffer is None or len(buffer) < num_bytes:  # older graphs keep the one that was too small
            with torch.inference_mode(False):  # as in `StaticInputs`
                buffer = torch.empty(max(num_bytes, wanted), dtype=torch.uint8, device=device)
            self._buffers[device] = buffer
        return buffer


class GraphedFunction:
    """A function of tensors that is replayed from CUDA graphs, and called directly where there can be no graph.

    There is one graph for each combination of shapes and dtypes. The device is that of the first tensor; the other
    tensors may be on the CPU, from where they are copied together, without waiting. Autocast has no effect inside the
    function.

    Outputs are overwritten by the next call of any function that shares the `memory`. Threads that share a function
    call it, and read its outputs, within one `utils.turns.turn`.

    Args:
        function: The function, of tensors alone, to a tensor or a tuple of tensors.
        enabled: Without it the function is always called directly.
        max_graphs: The graph that was not used for the longest time is dropped to make room for one more.
        memory: The memory of the graphs, which several functions may share. Default: each graph has its own.
        has_kernels: The function launches kernels of this package: before a graph is captured they are compiled, all at
            the same time.

    Attributes:
        last_ran: How the last call ran: "graph", "eager", or None before the first one.
    """

    def __init__(
        self,
        function: Callable,
        enabled: bool = True,
        max_graphs: int = 4,
        memory: GraphMemory | None = None,
        has_kernels: bool = False,
    ):
        self.function = without_autocast(function)
        self.enabled, self.max_graphs, self.memory, self.has_kernels = enabled, max_graphs, memory, has_kernels
        self.last_ran: str | None = None
        self._graphs: OrderedDict = OrderedDict()
        self._frozen = False
        self._wanted: set[tuple] = set()  # shapes and dtypes that get a graph although frozen
        self._compiled: set[tuple] = set()  # likewise, those whose kernels are compiled
        self._lent: torch.Tensor | None = None  # returned by `empty`, to become the input of a new graph

    def __len__(self) -> int:
        return len(self._graphs)

    def freeze(self):
        """Keep the graphs that exist and capture no others: calls with other shapes then run directly."""
        self._frozen = True

    def capture_when_called(self, *examples: torch.Tensor):
        """Capture a graph at the first call with inputs like these examples, also after `freeze`."""
        self._wanted.add(_kinds(examples))

    @torch.inference_mode()
    def compile(self, *examples: torch.Tensor):
        """Compile the kernels that a call with inputs like these examples launches, see `compile_ahead`."""
        if self.has_kernels and (kinds := _kinds(examples)) not in self._compiled:
            self._compiled.add(kinds)
            compile_ahead(lambda: self.function(*examples))

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised tensor for the next call, which has no other: the graph reads it without a copy.

        It is always the same tensor, and the next call with another tensor of this kind overwrites it. From here to the
        end of the call no other thread may call a function that shares the memory: do both within one `turn`.
        """
        captured = self._graphs.get((device, (torch.Size(shape), dtype)))
        if captured is not None:
            return captured[1].tensors[0]
        with torch.inference_mode(False):  # as in `StaticInputs`
            tensor = torch.empty(shape, dtype=dtype, device=device)
        self._lent = tensor if self.enabled and not self._frozen else None  # a frozen function copies
        return tensor

    def replay(self, *tensors: torch.Tensor):
        """Replay the graph for inputs like these, and return its outputs, as a call does; None if there is no graph."""
        key = tensors[0].device, *_kinds(tensors)
        captured = self._graphs.get(key)
        return None if captured is None else self._replay(key, captured, tensors)

    def _replay(self, key: tuple, captured: tuple, tensors: Sequence[torch.Tensor]):
        graph, inputs, outputs = captured
        inputs.fill(tensors)
        graph.replay()
        self._graphs.move_to_end(key)  # like all that is not needed before, while the device is at work
        self.last_ran = "graph"
        return outputs

    def __call__(self, *tensors: torch.Tensor):
        lent, self._lent = self._lent, None
        device, kinds = tensors[0].device, _kinds(tensors)
        key = device, *kinds
        captured = self._graphs.get(key)
        if captured is None:
            with torch.inference_mode():  # not for a replay: to enter it takes longer than to launch a copy
                if not self._may_capture(device, kinds):
                    self.last_ran = "eager"
                    return self.function(*(tensor.to(device, non_blocking=True) for tensor in tensors))
                if len(self._graphs) >= self.max_graphs:
                    torch.cuda.synchronize(device)  # another stream may still run the graph that is dropped
                while len(self._graphs) >= self.max_graphs:
                    self._graphs.popitem(last=False)
                captured = self._graphs[key] = self._capture(tensors, lent)
        return self._replay(key, captured, tensors)

    def has_room_for(self, *tensors: torch.Tensor) -> bool:
        """Return whether there is a graph for inputs like these, or there can be one without dropping another."""
        return (tensors[0].device, *_kinds(tensors)) in self._graphs or len(self._graphs) < self.max_graphs

    def replays(self, *examples: torch.Tensor) -> bool:
        """Return whether a call with inputs like these examples runs from a graph."""
        device, kinds = examples[0].device, _kinds(examples)
        return (device, *kinds) in self._graphs or self._may_capture(device, kinds)

    def _may_capture(self, device: torch.device, kinds: tuple) -> bool:
        return self.enabled and device.type == "cuda" and (not self._frozen or kinds in self._wanted)

    def _capture(self, tensors: tuple[torch.Tensor, ...], lent: torch.Tensor | None):
        sharing = contextlib.nullcontext() if self.memory is None else self.memory.capturing()
        with _one_capture, torch.cuda.device(tensors[0].device), _stays_on_stream(), sharing:
            inputs = StaticInputs(tensors, lent, self.memory)
            inputs.fill(tensors)
            self.compile(*inputs.tensors)
            stream, capture_stream = _warm_up_stream(tensors[0].device), _capture_stream(tensors[0].device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function(*inputs.tensors)  # libraries choose kernels and allocate workspaces before the capture
            torch.cuda.current_stream().wait_stream(stream)
            _forget_workspaces()
            torch.cuda.empty_cache()  # the graph allocates the memory of the warm-up once more
            graph = torch.cuda.CUDAGraph()
            # Other threads may use CUDA meanwhile, and must not invalidate this capture.
            pool = None if self.memory is None else self.memory.pool
            with (
                collects_no_garbage(),
                torch.cuda.graph(graph, pool=pool, stream=capture_stream, capture_error_mode="thread_local"),
            ):
                outputs = self.function(*inputs.tensors)
            _forget_workspaces()  # the graph's workspace stays in its pool, where the next graph uses it too
        return graph, inputs, outputs


def part_size(count: int, most: int) -> int:
    """Return the size of the fewest parts of equal size, at most `most`, that cover `count` rows."""
    return -(-count // max(1, -(-count // most)))


def parts_of(count: int, most: int) -> list[slice]:
    """Divide `count` rows into parts of `part_size`; the last one may begin within the one before."""
    size = part_size(count, most)
    starts = (min(number * size, count - size) for number in range(max(1, -(-count // most))))
    return [slice(start, start + size) for start in starts]


def _kinds(tensors: Sequence[torch.Tensor]) -> tuple:
    return tuple([(tensor.shape, tensor.dtype) for tensor in tensors])


class StaticInputs:
    """Input tensors of a graph: their memory stays where it is, and `fill` copies values into it.

    Inputs whose examples are on the CPU are copied from one buffer there, since each copy between the two takes as long
    as several kernels of a short graph. Later values may be on either, wherever the examples were. `fill` is called in
    any mode of torch. Outside of inference mode it could not write to inference tensors, so the inputs are none.

    Args:
        examples: Tensors of the shapes and dtypes; all inputs are on the device of the first.
        lent: An example that becomes an input itself, so that it need not be copied.
        memory: Where the other inputs are. Default: in memory of their own.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        examples: Sequence[torch.Tensor],
        lent: torch.Tensor | None = None,
        memory: GraphMemory | None = None,
    ):
        device = examples[0].device
        from_cpu = [example for example in examples if example.is_cpu]
        others = [example for example in examples if not (example.is_cpu or example is lent)]
        # Not pinned: a copy from pageable memory has read it when it returns, so it may be filled again.
        self._buffer = torch.empty(packed_bytes(from_cpu), dtype=torch.uint8, device="cpu")
        num_bytes = len(self._buffer) + packed_bytes(others)
        if memory is None:
            inputs = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        else:
            inputs = memory.inputs(num_bytes, device)
        self._device_buffer = inputs[: len(self._buffer)]
        sources, copies = (iter(views_like(from_cpu, buffer)) for buffer in (self._buffer, self._device_buffer))
        own = iter(views_like(others, inputs[len(self._buffer) :]))
        self.tensors = [next(copies) if e.is_cpu else e if e is lent else next(own) for e in examples]
        self._targets = [next(sources) if e.is_cpu else tensor for e, tensor in zip(examples, self.tensors)]
        self._on_device = [target.is_cuda for target in self._targets]
        self._has_buffer = len(self._buffer) > 0

    def fill(self, tensors: Sequence[torch.Tensor]):
        """Copy the values of the tensors to the inputs."""
        for target, tensor, on_device in zip(self._targets, tensors, self._on_device):
            if tensor is not target:  # else the caller has written to the input itself
                target.copy_(tensor.detach() if tensor.requires_grad else tensor, non_blocking=on_device)
        if self._has_buffer:
            self._device_buffer.copy_(self._buffer, non_blocking=True)


@contextlib.contextmanager
def collects_no_garbage() -> Iterator[None]:
    """Disable garbage collection during a capture: freeing an older graph in the middle of it would make it fail."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@lru_cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures: cuBLAS keeps a workspace of 32 MB or more for each stream it has run on."""
    return torch.cuda.Stream(device)


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures on a device: that of torch is on the device of the process's first capture."""
    return torch.cuda.Stream(device)


def _stays_on_stream() -> contextlib.AbstractContextManager:
    """Return a context after which the current stream is what it was: torch's own does not end if a capture fails."""
    return torch.cuda.stream(torch.cuda.current_stream())


def _forget_workspaces():
    """Return the workspaces of cuBLAS to torch, as torch's own graphs do before and after a capture."""
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
