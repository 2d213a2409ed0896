"""Images that are opened but not decoded, with unchecked annotations: the input of training examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..images.levels import to_rgb
from .annotations import is_number, parse_instance
from .samples import Instance, SampleError, SkipReason


@dataclass
class LazySample:
    """An image with its annotations, each decoded and checked on first use.

    Attributes:
        id: as in `Sample`.
        image: a PIL image that is not decoded yet, for one call of `decode` or `pixels`; or the decoded pixels, uint8
            (3, H, W).
        annotations: annotations as JSON has them, checked instances, or errors of annotations that a reader refused.
        width, height: size of the image in pixels.
    """

    id: str
    image: Image.Image | np.ndarray
    annotations: Sequence[dict | Instance | SampleError]

    def __post_init__(self):
        # Read before decoding, which at a reduced size changes `image.size`.
        self.width, self.height = self.image.shape[:0:-1] if isinstance(self.image, np.ndarray) else self.image.size

    def pixels(self, min_size: tuple[int, int] | None = None) -> tuple[np.ndarray, float]:
        """Return the whole image as uint8 (3, H, W), and its reduction: see `decode`."""
        if isinstance(self.image, np.ndarray):
            return self.image, 1.0
        image, reduction = self.decode(min_size)
        return planes(image), reduction

    def decode(self, min_size: tuple[int, int] | None = None) -> tuple[Image.Image, float]:
        """Decode the whole image, at a reduced size if that is enough.

        A JPEG is decoded at a half, a quarter or an eighth of its size if that is at least `min_size`. This takes a
        fraction of the time, and the details that it loses would be averaged away by resizing.

        Args:
            min_size: (width, height) in pixels; None for the full size.

        Returns:
            The image in RGB, and by what factor it is reduced: 1, 2, 4 or 8.

        Raises:
            SampleError: if the image is damaged or truncated.
        """
        assert isinstance(self.image, Image.Image), "the image is decoded already"
        reduction = 1.0
        try:
            if min_size and (draft := self.image.draft(None, min_size)):
                reduction = self.width / draft[1][2]
            return to_rgb(self.image), reduction
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise SampleError(SkipReason.BROKEN_IMAGE) from error

    def instance(self, position: int, left_out: list[SkipReason] | None = None) -> Instance:
        """Check and convert one annotation, see `parse_instance`.

        Args:
            position: index of the annotation.
            left_out: the reasons for parts left out of the instance are appended.

        Raises:
            SampleError: if the annotation cannot be used.
        """
        annotation = self.annotations[position]
        if isinstance(annotation, Instance):
            return annotation
        return parse_instance(annotation, self.width, self.height, position, left_out)

    def area(self, position: int) -> float:
        """Return the annotated area in pixels, at least 1. The mask is decoded only if no area is annotated."""
        annotation = self.annotations[position]
        area = annotation.get("area") if isinstance(annotation, dict) else None
        if not (is_number(area) and area > 0):
            try:
                area = self.instance(position).area
            except SampleError:  # counted when the annotation is drawn
                return 1.0
        return float(np.clip(area, 1, self.width * self.height))


def planes(image: Image.Image) -> np.ndarray:
    """Convert an image of C channels to a contiguous uint8 (C, H, W) array."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_columns(rle: dict, start: int, stop: int) -> np.ndarray:
    """Decode columns `start` to `stop` (exclusive) of the mask of a checked compressed RLE.

    Returns:
        uint8 0 or 1 (stop - start, H): one row for each column of the mask.
    """
    from ..masks.rle import run_lengths

    height = rle["size"][0]
    ends = np.cumsum(run_lengths(rle["counts"])).clip(start * height, stop * height)
    values = (np.arange(len(ends)) & 1).astype(np.uint8)  # runs are outside and inside the mask in turn
    return np.repeat(values, np.diff(ends, prepend=start * height)).reshape(stop - start, height)
