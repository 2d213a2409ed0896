"""Random access to images with annotations: what all readers share."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from PIL import Image

from ..images.levels import to_rgb
from .annotations import parse_instances
from .lazy import LazySample
from .samples import Sample, SampleError, SkipReason, SkipReport


if TYPE_CHECKING:
    from .image_cache import ImageCache


class ImageDataset(ABC):
    """Random access to samples. Instances hold an index and no open file: they pickle, and threads and forks may share one.

    What cannot be used shows up in two places: `index_report` has what was found while indexing, and `load(i)` returns
    a report for the image that it reads. Adding up the first and each of the others once counts everything once,
    however many processes share the work.

    Attributes:
        index_report: images and instances that were left out when the index was made.
        has_masks: False where no image has instances.
    """

    index_report: SkipReport
    has_masks: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """The number of indexed images; reading may still find some of them bad."""

    @property
    def num_images(self) -> int:
        """All images, with those that were skipped while indexing: the `total` of `SkipReport.too_many`."""
        return len(self) + self.index_report.num_images

    @abstractmethod
    def load(self, index: int) -> tuple[Sample | None, SkipReport]:
        """The sample, or None where the image cannot be used, and what was skipped on the way. The same at each call."""

    @abstractmethod
    def open(self, index: int) -> LazySample:
        """The same image with nothing decoded and no annotation checked yet, for training, which needs few of them.

        Raises:
            SampleError: for an image or annotations that cannot be read.
        """

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """The id of the sample, without reading it."""

    def files(self) -> set:
        """What is read, wherever it is named from: two datasets that share a file share images."""
        return set()

    def __getitem__(self, index: int) -> Sample:
        """The sample without its bad instances. Raises `SampleError` where the image itself cannot be used."""
        sample, report = self.load(index)
        if sample is None:
            ((reason, skipped),) = report.images.items()
            raise SampleError(SkipReason(reason), skipped.examples[0])
        return sample

    def samples(self, report: SkipReport, indices: Iterable[int] | None = None) -> Iterator[Sample]:
        """The usable samples in order, of all images or of `indices`; what is skipped is added to `report`.

        `index_report` is not added: each process that reads a part of the dataset would count it again.
        """
        for index in range(len(self)) if indices is None else indices:
            sample, skipped = self.load(index)
            report.merge(skipped)
            if sample is not None:
                yield sample

    def _check_not_empty(self, source: str):
        if not len(self):
            reasons = "; ".join(f"{s.count} x {reason}" for reason, s in self.index_report.images.items())
            raise ValueError(f"{source}: no image that can be used ({reasons or 'there are none'}).")


class FileDataset(ImageDataset):
    """Images from files or parts of files, annotations as JSON has them.

    Attributes:
        image_cache: where `open` finds and keeps decoded images; None for nowhere.
    """

    image_cache: "ImageCache | None" = None

    def load(self, index: int) -> tuple[Sample | None, SkipReport]:
        index = range(len(self))[index]  # negative ones, and IndexError
        sample_id, report = self.sample_id(index), SkipReport()
        annotations = []
        try:
            annotations, size = self._annotations(index)
            image = decode_image(self.image_bytes(index), size)
        except SampleError as error:
            report.add_image(error.reason, f"{sample_id} ({error.where})" if error.where else sample_id)
            report.add_instances(SkipReason.IMAGE_SKIPPED, sample_id, len(annotations))
            return None, report
        width, height = image.size
        instances = parse_instances(annotations, sample_id, width, height, report)
        return Sample(sample_id, image, instances, width, height), report

    def open(self, index: int) -> LazySample:
        index = range(len(self))[index]
        annotations, size = self._annotations(index)
        data = self.image_bytes(index)
        image = open_stored_image(data, size) if self.image_cache is None else self.image_cache.pixels(data, size)
        return LazySample(self.sample_id(index), image, annotations)

    @abstractmethod
    def image_bytes(self, index: int) -> bytes:
        """The image's file. Raises `SampleError`."""

    @abstractmethod
    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        """The annotations as JSON has them, and (width, height) of the image if it is said. Raises `SampleError`.

        A `SampleError` among the annotations stands for one that is left out, and is counted.
        """


def check_limit(limit: int | None):
    """Raises ValueError unless `limit` is None or at least 1."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit={limit!r} must be None or an integer of at least 1.")


def decode_image(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file as RGB, see `to_rgb`, pixels where they are stored: annotations are made in that frame.

    `size` is the (width, height) of the annotations. Where it fits only the image turned upright by its EXIF
    orientation, the annotations were made on that, and that is returned.

    Raises:
        SampleError: for a file that is no image, damaged or truncated, or of another size.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            rgb = to_rgb(image, upright=bool(size and image.size != size))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files: struct.error, zlib.error, IndexError
        raise SampleError(SkipReason.BROKEN_IMAGE) from error
    if size and rgb.size != size:
        raise SampleError(SkipReason.IMAGE_SIZE)
    rgb.getexif().clear()  # or who segments it would turn it, away from its annotations
    return rgb


def open_stored_image(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """`decode_image` with the decoding left for later where that can be, and the mode as it is."""
    try:
        image = Image.open(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:  # as in decode_image
        raise SampleError(SkipReason.BROKEN_IMAGE) from error
    return image if size in (None, image.size) else decode_image(data, size)
