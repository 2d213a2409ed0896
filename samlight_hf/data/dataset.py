"""Base classes of the readers: random access to images with annotations."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from ..images.formats import open_lazily
from ..images.levels import is_turned, to_rgb
from .annotations import parse_instances
from .lazy import LazySample
from .samples import Sample, SampleError, SkipReason, SkipReport


if TYPE_CHECKING:
    from .image_cache import ImageCache


class ImageDataset(ABC):
    """Base class of all readers: random access to images with instances, as `Sample`s.

    A dataset keeps an index in memory and no file open: it can be pickled, and threads and forked processes can share
    it.

    Skipped data is reported in two places. `index_report` has the images and instances left out while indexing.
    `load(index)` returns a report for the image that it reads. The sum of `index_report` and one report for each image
    counts everything once, however many processes share the work.

    Attributes:
        index_report: the images and instances left out while indexing.
        has_masks: False if no image has instances.

    Example:
        >>> dataset = load_dataset("instances_val2017.json", images="val2017")
        >>> report = SkipReport().merge(dataset.index_report)
        >>> for sample in dataset.samples(report):
        ...     masks = sample.masks()  # bool (num_instances, height, width)
        >>> print(report.summary(total=dataset.num_images))
    """

    index_report: SkipReport
    has_masks: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of indexed images. Reading may still find some of them unusable."""

    @property
    def num_images(self) -> int:
        """Number of all images, including those skipped while indexing: the `total` of `SkipReport.too_many`."""
        return len(self) + self.index_report.num_images

    @abstractmethod
    def load(self, index: int) -> tuple[Sample | None, SkipReport]:
        """Read one image with its usable instances. Every call gives the same result.

        Args:
            index: from 0; a negative one counts from the end.

        Returns:
            The sample, or None if the image cannot be used, and a report of the skipped data.
        """

    @abstractmethod
    def open(self, index: int) -> LazySample:
        """Open one image without decoding it or checking annotations. Training uses only a few of them.

        Args:
            index: from 0; a negative one counts from the end.

        Raises:
            SampleError: if the image or its annotations cannot be read.
        """

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """Return the id of a sample without reading the sample."""

    def where(self, index: int) -> str:
        """Return where a sample is, for messages: its id, behind the name of its tar where it is in one."""
        return self.sample_id(index)

    def annotated_indices(self) -> Sequence[int]:
        """Return the indices of the images that may have instances, as far as it is known without reading them."""
        return range(len(self))

    def files(self) -> set:
        """Return the resolved paths of all files read. Two datasets that share a path share images."""
        return set()

    def __getitem__(self, index: int) -> Sample:
        """Read one image with its usable instances, as `load` does.

        Raises:
            SampleError: if the image cannot be used.
            IndexError: if there is no such index.
        """
        sample, report = self.load(index)
        if sample is None:
            ((reason, skipped),) = report.images.items()
            raise SampleError(SkipReason(reason), skipped.examples[0])
        return sample

    def samples(self, report: SkipReport, indices: Iterable[int] | None = None) -> Iterator[Sample]:
        """Iterate over the usable samples in order.

        Args:
            report: the data skipped on the way is added to it. `index_report` is not: several processes that each read
                a part of the dataset would all count it.
            indices: the images to read; by default all.
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
    """Base class of readers whose images are files or parts of files, with annotations in COCO's JSON format.

    Attributes:
        image_cache: cache of decoded images that `open` uses, or None.
    """

    image_cache: "ImageCache | None" = None

    def load(self, index: int) -> tuple[Sample | None, SkipReport]:
        index = range(len(self))[index]  # accepts negative indices, raises IndexError
        sample_id, report = self.sample_id(index), SkipReport()
        annotations: list = []
        try:
            annotations, size = self._annotations(index)
            image = decode_image(self.image_bytes(index), size, self._are_upright(index))
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
        decode = open_stored_image if self.image_cache is None else self.image_cache.pixels
        image = decode(data, size, self._are_upright(index))
        return LazySample(self.sample_id(index), image, annotations)

    @abstractmethod
    def image_bytes(self, index: int) -> bytes:
        """Return the bytes of the image file. Raises SampleError if there is none."""

    @abstractmethod
    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        """Read the annotations of an image.

        Returns:
            Annotations as JSON has them, where a `SampleError` stands for an annotation to skip and count; (width,
            height) of the annotated image in pixels, or None if unknown.

        Raises:
            SampleError: if they cannot be read.
        """

    def _are_upright(self, index: int) -> bool:
        """Return whether it is known that the annotations belong to the image as its EXIF orientation turns it.

        The size alone cannot tell this of a square image, nor of one that is mirrored or turned by half a turn.
        """
        return False


def check_limit(limit: int | None, name: str = "limit"):
    """Raise ValueError unless `limit`, the setting called `name`, is None or an integer of at least 1."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{name}={limit!r} must be None or an integer of at least 1.")


def decode_image(data: bytes, size: tuple[int, int] | None = None, upright: bool = False) -> Image.Image:
    """Decode an image file in the frame of its annotations.

    Annotations usually refer to the stored pixels, before EXIF orientation. If the stored size is not `size`, the image
    is turned upright by its EXIF orientation. A TIFF always is, because Pillow does it.

    Args:
        data: the bytes of the file.
        size: (width, height) of the annotated image in pixels, or None if unknown.
        upright: turn the image upright in any case.

    Returns:
        PIL image in mode RGB, see `to_rgb`, without EXIF data.

    Raises:
        SampleError: if the file is no image, is damaged or truncated, or has another size.
    """
    try:
        with open_lazily(io.BytesIO(data)) as image:
            rgb = to_rgb(image, upright=upright or bool(size and image.size != size))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(SkipReason.UNKNOWN_FORMAT) from error
    except Exception as error:  # decoders raise nearly anything on damaged files: struct.error, zlib.error, IndexError
        raise SampleError(SkipReason.BROKEN_IMAGE) from error
    if size and rgb.size != size:
        raise SampleError(SkipReason.IMAGE_SIZE)
    rgb.getexif().clear()  # otherwise the predictor would turn the image out of the frame of its annotations
    return rgb


def open_stored_image(data: bytes, size: tuple[int, int] | None = None, upright: bool = False) -> Image.Image:
    """Open an image file as `decode_image` does, but leave decoding and conversion to RGB for later where possible.

    Raises:
        SampleError: if the file is no image or has another size.
    """
    try:
        image = open_lazily(io.BytesIO(data))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(SkipReason.UNKNOWN_FORMAT) from error
    except Exception as error:  # as in decode_image
        raise SampleError(SkipReason.BROKEN_IMAGE) from error
    is_as_stored = size in (None, image.size) and not (upright and is_turned(image))
    return image if is_as_stored else decode_image(data, size, upright)
