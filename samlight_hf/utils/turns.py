"""Threads that share a CUDA device: they run one after the other, and their streams wait for each other."""

import contextlib
import functools
import threading
from collections.abc import Callable

import torch


class _Turns:
    """The lock of one device, and the stream and the event that ended the last turn."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None


_turns: dict[torch.device, _Turns] = {}
_streams: dict[tuple[int, int], torch.cuda.Stream] = {}  # by device and handle
_handle_of_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # as Triton asks for it; private


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the current stream of a CUDA device, as one object where possible: torch takes long to make another."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if _handle_of_stream is None:
        return torch.cuda.current_stream(index)
    key = index, _handle_of_stream(index)
    stream = _streams.get(key)
    if stream is None:
        stream = _streams[key] = torch.cuda.current_stream(index)
    return stream


def is_capturing(device: torch.device) -> bool:
    """Return whether work on the device's current stream goes into a CUDA graph now."""
    return device.type == "cuda" and _is_capturing(device.index)


def _is_capturing(index: int | None) -> bool:
    if index is None or index == torch.cuda.current_device():  # making it the current one takes microseconds
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(index):
        return torch.cuda.is_current_stream_capturing()


class _Turn:
    """One turn of a thread, as a context: a class, since a generator takes longer to enter than a kernel to launch."""

    __slots__ = ("_device", "_stream", "_turns")

    def __init__(self, device: torch.device, turns: _Turns):
        self._device, self._turns = device, turns

    def __enter__(self) -> bool:
        turns = self._turns
        turns.lock.acquire()
        try:
            self._stream = None
            if _is_capturing(self._device.index):  # by the caller: a graph cannot wait for events outside of it
                return True
            stream = current_stream(self._device)
            last = turns.last
            if last is not None and last[0] is not stream and last[0] != stream:  # torch compares them in Python
                stream.wait_event(last[1])
            self._stream = stream
            return False
        except BaseException:
            turns.lock.release()
            raise

    def __exit__(self, *_) -> None:
        turns, stream = self._turns, self._stream
        try:
            if stream is not None:
                event = torch.cuda.Event() if turns.last is None else turns.last[1]
                event.record(stream)
                turns.last = stream, event
        finally:
            turns.lock.release()


def turn(device: torch.device) -> contextlib.AbstractContextManager[bool]:
    """Hold a CUDA device for one thread at a time; its work starts after that of the turn before, on any stream.

    CUDA graphs have one set of buffers, and an image that is encoded on one stream may be decoded on another. All
    models on a device take turns together, because a graph capture tolerates little other work. On other devices
    nothing is shared, and threads run side by side.

    Args:
        device: of the model.

    Returns:
        A context, whose value is whether work on the current stream goes into a CUDA graph of the caller's.
    """
    turns = _turns.get(device)
    if turns is None:
        if device.type != "cuda":
            return contextlib.nullcontext(False)
        turns = _turns.setdefault(device, _Turns())
    return _Turn(device, turns)


def takes_turns(method: Callable) -> Callable:
    """Decorate a method of an object with a `device` to run in `turn`."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with turn(self.device):
            return method(self, *args, **kwargs)

    return run


def read_here(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that another stream may have made, to be read on the current stream.

    Its memory is not reused before the current stream has read it.
    """
    if tensor.is_cuda:
        tensor.record_stream(current_stream(tensor.device))
    return tensor
