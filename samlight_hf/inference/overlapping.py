"""Images that overlap on a CUDA device: the next one begins before the last steps of one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from ..images.errors import IMAGE_ERRORS
from ..images.reading import before_error
from ..masks.results import GeneratedMasks
from ..utils.autocast import without_autocast
from .candidates import Candidates
from .crops import MaskGenerationSettings


Result = TypeVar("Result")


@dataclass
class Running:
    """An image whose points are being decoded.

    Attributes:
        size: (height, width).
        settings: Of the image.
        candidates: The masks that have passed the filters so far.
        batches: What is left to be decoded, see `MaskGenerator._decode_crop`.
        stream: On a CUDA device, the stream that the first batch was launched on.
        end: On a CUDA device, where on the stream all candidates are measured.
    """

    size: tuple[int, int]
    settings: MaskGenerationSettings
    candidates: Candidates
    batches: Iterator[None]
    stream: torch.cuda.Stream | None
    end: torch.cuda.Event | None = None

    @without_autocast
    @torch.inference_mode()
    def finish(self):
        """Decode the other points."""
        with torch.cuda.stream(self.stream):  # between two images the caller may have changed it
            for _ in self.batches:
                pass
        if self.stream is not None:
            self.end = torch.cuda.Event()
            self.end.record(self.stream)


def overlapped(
    starts: Iterable[Callable[[], Running]], end: Callable[[Running], GeneratedMasks]
) -> Iterator[GeneratedMasks | Exception]:
    """Yield the masks of each image, or its error.

    The end of an image is many short steps, between which the device waits for the CPU. So the first points of the next
    image are launched before, and the end runs beside its other points in another thread, on a stream of its own. A
    result is yielded when the image behind the next one has begun, so that the device has work while the caller uses
    it, and before that thread has, which would share Python's lock with the caller. What runs out of memory beside
    another image is done again without it.

    Args:
        starts: Each encodes an image, and launches its first points. Their own error is raised behind the last image.
        end: Chooses among the masks of an image.
    """
    decoded: list[Running | Exception] = []  # at most one image, whose masks take memory
    finished: list[GeneratedMasks | Exception] = []  # likewise
    failed: list[Exception] = []
    with ThreadPoolExecutor(1, thread_name_prefix="end_of_image") as pool:
        for start in before_error(starts, failed):
            now = attempt(start)
            if finished:
                yield finished.pop()
            ending = pool.submit(_ended_beside, decoded.pop(), end) if decoded else None
            if isinstance(now, Running):
                now = attempt(now.finish) or now
            if ending is not None and isinstance(now, torch.OutOfMemoryError):
                wait([ending])  # there is more memory then
                now = attempt(partial(_decoded, start))
            decoded.append(now)
            del now
            if ending is not None:
                before = ending.result()
                finished.append(_ended(before, end) if isinstance(before, Running) else before)
                del ending, before
        yield from finished
        if decoded:
            yield _ended(decoded.pop(), end)
    if failed:
        raise failed[0]


def _decoded(start: Callable[[], Running]) -> Running:
    running = start()
    running.finish()
    return running


def _ended_beside(
    image: Running | Exception, end: Callable[[Running], GeneratedMasks]
) -> GeneratedMasks | Running | Exception:
    """Compute `_ended` beside the next image; without the memory for it return the image, to be ended after that."""
    result = _ended(image, end)
    return image if isinstance(result, torch.OutOfMemoryError) else result


def _ended(image: Running | Exception, end: Callable[[Running], GeneratedMasks]) -> GeneratedMasks | Exception:
    return image if isinstance(image, Exception) else attempt(partial(end, image))


def attempt(work: Callable[[], Result]) -> Result | Exception:
    """Return the result of `work`, or its error if it concerns one image alone."""
    try:
        return work()
    except IMAGE_ERRORS as error:
        # The frames of the traceback hold tensors.
        return error.with_traceback(None) if isinstance(error, torch.OutOfMemoryError) else error
