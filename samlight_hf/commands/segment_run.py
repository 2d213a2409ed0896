"""Segmentation of many images: while a batch is on the device, the next images are read and the last ones written."""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ..images.preprocessing import check_size, image_tensor
from ..images.reading import before_error, open_image, read_ahead
from ..inference.crops import MaskGenerationSettings
from ..inference.mask_generation import MaskGenerator
from ..inference.predictor import Predictor
from ..inference.prompts import ObjectPrompt, clip_prompts
from ..inference.single_calls import predict_objects
from ..masks.regions import clean_masks
from ..masks.results import GeneratedMasks, MaskResult
from .summary import DiskError


NUM_READERS = 3  # with their waiting images, enough for the next batch while one is segmented
NUM_WRITERS = max(2, min(6, (os.cpu_count() or 1) // 2))  # drawing and compressing take longer than segmenting


@dataclass(frozen=True)
class Job:
    """An image file, the path of its masks, its name in results, and what points at its objects."""

    path: Path
    output: Path
    name: str = ""
    prompts: tuple[ObjectPrompt, ...] = ()

    def shown_prompts(self) -> tuple[list, list]:
        """Return the boxes (x1, y1, x2, y2) and the points (x, y, label) of all objects, for drawings."""
        boxes = [prompt.box_xyxy for prompt in self.prompts if prompt.box_xyxy is not None]
        return boxes, [
            (*point, label) for prompt in self.prompts for point, label in zip(prompt.points_xy, prompt.labels)
        ]


ReadImage = tuple[Job, Image.Image, Any]  # with what the segmenter has prepared of it


@dataclass(frozen=True)
class Segmented:
    """An image with its masks, and the seconds that the model took."""

    job: Job
    image: Image.Image
    result: GeneratedMasks | MaskResult
    seconds: float


class EverythingSegmenter:
    """Segmentation of everything in images.

    Args:
        generator: finds the masks of an image.
        settings: of the generator.
        min_area: in pixels of the image; smaller masks are left out.
        max_masks: keep so many of an image, the best ones. By default all.
        min_areas: of holes and of separate parts, see `clean_masks`. Duplicates among the cleaned masks are left out.
    """

    def __init__(
        self,
        generator: MaskGenerator,
        settings: MaskGenerationSettings,
        min_area: int = 0,
        max_masks: int | None = None,
        min_areas: tuple[int, int] = (0, 0),
    ):
        self.generator, self.settings = generator, settings
        self.min_area, self.max_masks, self.min_areas = min_area, max_masks, min_areas

    def check(self, image: Image.Image, job: Job):
        """Raise ValueError for an image that cannot be segmented."""
        check_size(self.generator.image_processor, image.height, image.width)

    def prepare(self, image: Image.Image, job: Job) -> torch.Tensor:
        """Convert an image to the tensor that a call takes; the reading threads do it ahead."""
        return image_tensor(image)

    def __call__(self, batches: Iterable[Sequence[torch.Tensor]], progress=None) -> Iterator[GeneratedMasks]:
        """Yield the masks of each image, which `finish` has still to see; a batch may be taken before they are all."""
        return self.generator.generate_each(self._encoded(batches), self.settings, progress)

    def _encoded(self, batches: Iterable[Sequence[torch.Tensor]]) -> Iterator[tuple[torch.Tensor, Any]]:
        step = self.generator.budget.images_per_encoding
        for batch in batches:
            for start in range(0, len(batch), step):
                part = batch[start : start + step]
                yield from zip(part, self.generator.encoder(part))

    def finish(self, result):
        """Clean masks and leave out small ones; the writing threads do it while the next image is segmented."""
        if any(self.min_areas):
            result = _without_duplicates(clean_masks(result, *self.min_areas), self.settings.crops_nms_thresh)
        chosen = np.flatnonzero(result.masks.areas >= self.min_area)[: self.max_masks]
        return result if len(chosen) == len(result) else result[chosen]


class PromptSegmenter:
    """Segmentation of the objects that the prompts of each image point at, with one mask for each of them.

    Args:
        predictor: predicts the masks of an image.
        min_areas: of holes and of separate parts, see `clean_masks`.
    """

    def __init__(self, predictor: Predictor, min_areas: tuple[int, int] = (0, 0)):
        self.predictor, self.min_areas = predictor, min_areas

    def check(self, image: Image.Image, job: Job):
        """Raise ValueError for an image that cannot be segmented, or that a prompt lies outside."""
        boxes, points = job.shown_prompts()
        clip_prompts(image.size, boxes, [point[:2] for point in points])
        check_size(self.predictor.image_processor, image.height, image.width)

    def prepare(self, image: Image.Image, job: Job) -> tuple[torch.Tensor, tuple[ObjectPrompt, ...]]:
        """Convert an image to the tensor that a call takes; the reading threads do it ahead."""
        return image_tensor(image), job.prompts

    def __call__(self, batches: Iterable[Sequence[tuple[torch.Tensor, tuple[ObjectPrompt, ...]]]], progress=None):
        """Yield the masks of each image, a `MaskResult`, which `finish` has still to see."""
        for batch in batches:
            for encoded, (_, prompts) in zip(self.predictor.encode([tensor for tensor, _ in batch]), batch):
                yield predict_objects(self.predictor, prompts, encoded)

    def finish(self, result):
        """Clean masks; the writing threads do it while the next image is segmented."""
        return clean_masks(result, *self.min_areas) if any(self.min_areas) else result


def _without_duplicates(result: GeneratedMasks, iou_thresh: float) -> GeneratedMasks:
    """Suppress duplicates by boxes as the generator does: masks may have become equal by cleaning."""
    from torchvision.ops import nms

    boxes = torch.from_numpy(result.boxes_xyxy.copy())
    boxes[:, 2:] -= torch.from_numpy(result.masks.areas > 0)[:, None].float()  # the last pixel, as in the generator
    kept = nms(boxes, torch.from_numpy(result.scores), iou_thresh)
    return result[kept.sort().values.numpy()]


class _Batches:
    """Batches of images that have been read, for a segmenter, which takes them ahead of the masks that it yields.

    Args:
        images: As `Run._read` returns them.
        size: The number of images in a batch; those that could not be read count, and are left out.

    Attributes:
        begun: The images that have been taken, and whose masks have not been yielded.
        seconds: The time in which images were waited for.
    """

    def __init__(self, images: Iterator[ReadImage | None], size: int):
        self.images, self.size = images, size
        self.begun: deque[ReadImage] = deque()
        self.seconds = 0.0

    def __iter__(self) -> Iterator[list]:
        while True:
            start = time.perf_counter()
            batch = list(islice(self.images, self.size))
            self.seconds += time.perf_counter() - start
            if not batch:
                return
            if read := [image for image in batch if image is not None]:
                self.begun.extend(read)
                yield [prepared for *_, prepared in read]


class Run:
    """A pipeline that reads, segments and writes images.

    An image that cannot be read, segmented or written is skipped, and the others are done. A `DiskError` ends the run.
    There are only a few images in memory at any time, however many jobs there are.

    Args:
        segment: segments batches of images.
        write: writes a `Segmented`; it is called in other threads.
        skip: called with the error and the path of an image that is skipped.
        batch_size: images that are encoded together.
        progress: passed to `segment`.
    """

    def __init__(
        self,
        segment: EverythingSegmenter | PromptSegmenter,
        write: Callable,
        skip: Callable,
        batch_size: int = 1,
        progress=None,
    ):
        self.segment, self.write, self.skip = segment, write, skip
        self.batch_size, self.progress = batch_size, progress

    def __call__(self, jobs: Iterable[Job]) -> Generator:
        """Yield the result of `write` for each image that was written, in order."""
        with ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="write") as pool:
            writing: deque[Future] = deque()
            failed: list[Exception] = []  # not of one image: those before it are written
            try:
                images = cast(Generator, read_ahead(self._read, jobs, NUM_READERS))
                with closing(images), closing(self._segment(before_error(images, failed))) as results:
                    for segmented in results:
                        writing.append(pool.submit(self._write, segmented))
                        while len(writing) > 2 * NUM_WRITERS:
                            yield from writing.popleft().result()
                while writing:
                    yield from writing.popleft().result()
                if failed:
                    raise failed[0]
            finally:  # after an interrupt too: writes that have begun are finished, the others dropped
                for future in writing:
                    future.cancel()

    def _read(self, job: Job) -> ReadImage | None:
        try:
            image = open_image(job.path)
            self.segment.check(image, job)
            return job, image, self.segment.prepare(image, job)
        except Exception as error:
            self.skip(error, job.path)
            return None

    def _write(self, segmented: Segmented) -> list:
        try:
            return [self.write(replace(segmented, result=self.segment.finish(segmented.result)))]
        except DiskError:
            raise
        except Exception as error:
            self.skip(error, segmented.job.path)
            return []

    def _segment(self, images: Iterator[ReadImage | None]) -> Generator[Segmented, None, None]:
        """Segment images in one stream of batches, so that the device has work from the first to the last.

        After an error the images that have begun are tried one by one, since only one of them may be too large, and a
        new stream begins behind them.
        """
        batches = _Batches(images, self.batch_size)
        is_over = False
        while not is_over:
            is_over = yield from self._stream(batches)
            alone, batches.begun = batches.begun, deque()
            while alone:
                yield from self._stream(_Batches(iter([alone.popleft()]), 1))

    def _stream(self, batches: _Batches) -> Generator[Segmented, None, bool]:
        """Segment batches up to an error, and return whether there was none. An image that was alone is skipped."""
        start = time.perf_counter() - batches.seconds
        try:
            with closing(cast(Generator, self.segment(batches, self.progress))) as results:
                for result in results:
                    seconds = time.perf_counter() - start - batches.seconds
                    yield Segmented(*batches.begun.popleft()[:2], result, seconds)
                    start = time.perf_counter() - batches.seconds
            return True
        except Exception as error:
            if not batches.begun:
                raise
            if len(batches.begun) == batches.size == 1:
                self.skip(error, batches.begun.popleft()[0].path)
            is_out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if is_out_of_memory:  # the frames of its traceback, which hold tensors, are gone by now
            torch.cuda.empty_cache()
        return False
