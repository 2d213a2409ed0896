"""Threads that share a device: one after the other where they share memory, and in order where their streams differ."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch


class _Turns:
    """Of one device: who has the turn, and where the last turn ended."""

    def __init__(self):
        self.lock = threading.RLock()
        self.last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None


_turns: dict[torch.device, _Turns] = {}


@contextlib.contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Runs on a CUDA device one thread at a time, after what the turn before asked of the device, on whatever stream.

    Graphs have one set of buffers, and what is encoded on one stream is decoded on another. All models on a device take
    turns together: a capture tolerates little beside it. Elsewhere nothing is shared, and threads run side by side.
    """
    if device.type != "cuda":
        yield
        return
    turns = _turns.setdefault(device, _Turns())
    with turns.lock:
        if torch.cuda.is_current_stream_capturing():  # by the caller, whose graph cannot wait for what is not in it
            yield
            return
        stream = torch.cuda.current_stream(device)
        if turns.last is not None and turns.last[0] != stream:
            stream.wait_event(turns.last[1])
        try:
            yield
        finally:
            event = torch.cuda.Event() if turns.last is None else turns.last[1]
            event.record(stream)
            turns.last = stream, event


def takes_turns(method: Callable) -> Callable:
    """The method of an object with a `device`, in `turn`."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with turn(self.device):
            return method(self, *args, **kwargs)

    return run


def read_here(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which another stream may have made: its memory is not given away before this stream has read it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
