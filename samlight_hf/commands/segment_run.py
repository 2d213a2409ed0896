"""Many images through one model: the next ones are read, and the last ones written, while one is segmented."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

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
    """An image, where its masks go, and its name in results."""

    path: Path
    output: Path
    name: str = ""


@dataclass(frozen=True)
class Segmented:
    """An image with its masks; `seconds` are those of the model."""

    job: Job
    image: Image.Image
    result: GeneratedMasks | MaskResult
    seconds: float


class EverythingSegmenter:
    """Masks of everything in images: of at least `min_area` pixels, and of these the `max_masks` best."""

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
        check_size(self.generator.image_processor, image.height, image.width)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """What the readers do beforehand."""
        return image_tensor(image)

    def __call__(self, tensors: Sequence[torch.Tensor], progress=None) -> Iterator[GeneratedMasks]:
        step = self.generator.budget.images_per_encoding
        for start in range(0, len(tensors), step):
            part = tensors[start : start + step]
            for tensor, image in zip(part, self.generator.encoder(part)):
                result = self.generator.generate(tensor, self.settings, progress, image)
                yield result[np.flatnonzero(result.masks.areas >= self.min_area)[: self.max_masks]]


class PromptSegmenter:
    """One mask for each of the same boxes and points in every image."""

    def __init__(self, predictor: Predictor, boxes_xyxy: Sequence = (), points_xy: Sequence = ()):
        self.predictor, self.boxes_xyxy, self.points_xy = predictor, boxes_xyxy, points_xy

    def check(self, image: Image.Image):
        clip_prompts(image.size, self.boxes_xyxy, self.points_xy)  # those that lie outside are refused
        check_size(self.predictor.image_processor, image.height, image.width)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """What the readers do beforehand."""
        return image_tensor(image)

    def __call__(self, tensors: Sequence[torch.Tensor], progress=None) -> Iterator[MaskResult]:
        for image in self.predictor.encode(list(tensors)):
            yield predict_prompts(self.predictor, self.boxes_xyxy, self.points_xy, image=image)


class Run:
    """Segments jobs with `segment`, an `EverythingSegmenter` or a `PromptSegmenter`, and hands what comes out to `write` in other threads.

    Images that cannot be read, segmented or written are told to `skip(error, path)`: whatever is wrong with one of them, the
    others are done. A `DiskError` ends the run. At any time there are a few images in memory, however many the jobs are.
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

    def __call__(self, jobs: Iterable[Job]) -> Iterator:
        """Yield what `write` returned for each `Segmented` that was written, in order."""
        with ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="write") as pool:
            writing: deque[Future] = deque()
            try:
                with closing(read_ahead(self._read, jobs, NUM_READERS)) as read:
                    while batch := list(islice(read, self.batch_size)):
                        for segmented in self._segment([item for item in batch if item is not None]):
                            writing.append(pool.submit(self._write, segmented))
                            while len(writing) > 2 * NUM_WRITERS:
                                yield from writing.popleft().result()
                while writing:
                    yield from writing.popleft().result()
            finally:  # interrupted, perhaps: what is being written is finished, and nothing else begun
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
        """A batch that fails is tried image by image: one of them may be too large, and the others not."""
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
