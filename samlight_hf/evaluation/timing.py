"""Time spent in a model's forward calls, measured without making the host wait for the device."""

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterator

import torch


class ForwardTimer:
    """A sum of seconds by name. CUDA work is timed by events in its own stream, so that the host does not wait.

    A pair of events spans the device's first to last kernel, including its waits for launches.
    """

    def __init__(self):
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def measure(self, name: str, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began
            return
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        yield
        end.record(stream)
        self._pending.append((name, start, end))
        self._collect(wait=False)  # finished ones, so that their number stays small

    def seconds(self, name: str) -> float:
        """Return the seconds so far. Waits for running work."""
        self._collect(wait=True)
        return self._seconds[name]

    def _collect(self, wait: bool):
        while self._pending and (wait or self._pending[0][2].query()):
            name, start, end = self._pending.popleft()
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1e3
