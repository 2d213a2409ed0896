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
from ..images.reading import open_image, read_ahead
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

    def __call__(self, tensors: Sequence[torch.Tensor], progress=None) -> Iterator[GeneratedMasks]:
        """Yield the masks of each image, which `finish` has still to see."""
        step = self.generator.budget.images_per_encoding
        for start in range(0, len(tensors), step):
            part = tensors[start : start + step]
            yield from self.generator.generate_each(zip(part, self.generator.encoder(part)), self.settings, progress)

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

    def __call__(self, batch: Sequence[tuple[torch.Tensor, tuple[ObjectPrompt, ...]]], progress=None):
        """Yield the masks of each image, a `MaskResult`, which `finish` has still to see."""
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

    def _read(self, job: Job) -> tuple[Job, Image.Image, Any] | None:
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

    def _segment(self, batch: list[tuple[Job, Image.Image, Any]]) -> Iterator[Segmented]:
        """Segment a batch; after an error its images are tried one by one, since only one of them may be too large."""
        if not batch:
            return
        done, start = 0, time.perf_counter()
        try:
            for result in self.segment([prepared for *_, prepared in batch], self.progress):
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
