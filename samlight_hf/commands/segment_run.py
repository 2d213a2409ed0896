"""Segmentation of many images: while a batch is on the device, the next images are read and the last ones written."""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

from ..images.preprocessing import check_size, image_tensor
from ..images.reading import open_image, read_ahead
from ..inference.crops import MaskGenerationSettings
from ..inference.mask_generation import MaskGenerator
from ..inference.predictor import Predictor
from ..inference.prompts import clip_prompts
from ..inference.single_calls import predict_prompts
from ..masks.results import GeneratedMasks, MaskResult
from .summary import DiskError


NUM_READERS = 3  # with their waiting images, enough for the next batch while one is segmented
NUM_WRITERS = max(2, min(6, (os.cpu_count() or 1) // 2))  # drawing and compressing take longer than segmenting


@dataclass(frozen=True)
class Job:
    """An image file, the path of its masks, and its name in results."""

    path: Path
    output: Path
    name: str = ""


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
    """

    def __init__(
        self,
        generator: MaskGenerator,
        settings: MaskGenerationSettings,
        min_area: int = 0,
        max_masks: int | None = None,
    ):
        self.generator, self.settings = generator, settings
        self.min_area, self.max_masks = min_area, max_masks

    def check(self, image: Image.Image):
        """Raise ValueError for an image that cannot be segmented."""
        check_size(self.generator.image_processor, image.height, image.width)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Convert an image to the tensor that a call takes; the reading threads do it ahead."""
        return image_tensor(image)

    def __call__(self, tensors: Sequence[torch.Tensor], progress=None) -> Iterator[GeneratedMasks]:
        """Yield the masks of each image."""
        step = self.generator.budget.images_per_encoding
        for start in range(0, len(tensors), step):
            part = tensors[start : start + step]
            for tensor, encoded in zip(part, self.generator.encoder(part)):
                result = self.generator.generate(tensor, self.settings, progress, encoded)
                yield result[np.flatnonzero(result.masks.areas >= self.min_area)[: self.max_masks]]


class PromptSegmenter:
    """Segmentation of the same boxes and points in each image, with one mask for each of them.

    Args:
        predictor: predicts the masks of an image.
        boxes_xyxy: (K, 4), in pixels of the image.
        points_xy: (K, 2), in pixels of the image; each point is an object of its own.
    """

    def __init__(self, predictor: Predictor, boxes_xyxy: Sequence = (), points_xy: Sequence = ()):
        self.predictor, self.boxes_xyxy, self.points_xy = predictor, boxes_xyxy, points_xy

    def check(self, image: Image.Image):
        """Raise ValueError for an image that cannot be segmented, or that a prompt lies outside."""
        clip_prompts(image.size, self.boxes_xyxy, self.points_xy)
        check_size(self.predictor.image_processor, image.height, image.width)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Convert an image to the tensor that a call takes; the reading threads do it ahead."""
        return image_tensor(image)

    def __call__(self, tensors: Sequence[torch.Tensor], progress=None) -> Iterator[MaskResult]:
        """Yield the masks of each image."""
        for encoded in self.predictor.encode(list(tensors)):
            yield predict_prompts(self.predictor, self.boxes_xyxy, self.points_xy, image=encoded)


class Run:
    """A pipeline that reads, segments and writes images.

    An image that cannot be read, segmented or written is skipped, and the others are done. A `DiskError` ends the run.
    There are only a few images in memory at any time, however many jobs there are.

    Args:
        segment: segments a batch of images.
        write: writes a `Segmented`; it is called in other threads.
        skip: called with the error and the path of an image that is skipped.
        batch_size: images that are segmented together.
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
            try:
                with closing(cast(Generator, read_ahead(self._read, jobs, NUM_READERS))) as images:
                    while batch := list(islice(images, self.batch_size)):
                        for segmented in self._segment([item for item in batch if item is not None]):
                            writing.append(pool.submit(self._write, segmented))
                            while len(writing) > 2 * NUM_WRITERS:
                                yield from writing.popleft().result()
                while writing:
                    yield from writing.popleft().result()
            finally:  # after an interrupt too: writes that have begun are finished, the others dropped
                for future in writing:
                    future.cancel()

    def _read(self, job: Job) -> tuple[Job, Image.Image, torch.Tensor] | None:
        try:
            image = open_image(job.path)
            self.segment.check(image)
            return job, image, self.segment.prepare(image)
        except Exception as error:
            self.skip(error, job.path)
            return None

    def _write(self, segmented: Segmented) -> list:
        try:
            return [self.write(segmented)]
        except DiskError:
            raise
        except Exception as error:
            self.skip(error, segmented.job.path)
            return []

    def _segment(self, batch: list[tuple[Job, Image.Image, torch.Tensor]]) -> Iterator[Segmented]:
        """Segment a batch; after an error its images are tried one by one, since only one of them may be too large."""
        if not batch:
            return
        done, start = 0, time.perf_counter()
        try:
            for result in self.segment([tensor for *_, tensor in batch], self.progress):
                seconds = time.perf_counter() - start
                yield Segmented(*batch[done][:2], result, seconds)
                done, start = done + 1, time.perf_counter()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(batch) == 1:
                self.skip(error, batch[0][0].path)
                return
            for item in batch[done:]:
                yield from self._segment([item])
