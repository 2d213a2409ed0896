"""An image that is opened but not decoded, with annotations that are not checked yet: what training reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..images.levels import to_rgb
from ..masks.rle import run_lengths
from .annotations import is_number, parse_instance
from .samples import Instance, SampleError, SkipReason


@dataclass
class LazySample:
    """One image with its annotations, checked and decoded only as far as they are asked for.

    Attributes:
        id: as in `Sample`.
        image: as PIL opened it, of which `decode` or `pixels` may be called once; or its pixels, uint8 (3, H, W).
        annotations: as JSON has them, checked instances, or the errors of those that a reader has refused.
    """

    id: str
    image: Image.Image | np.ndarray
    annotations: Sequence[dict | Instance | SampleError]

    def __post_init__(self):
        # Now: decoding at a smaller size changes the image's.
        is_decoded = isinstance(self.image, np.ndarray)
        self.width, self.height = self.image.shape[:0:-1] if is_decoded else self.image.size

    def pixels(self, min_size: tuple[int, int] | None = None) -> tuple[np.ndarray, float]:
        """The whole image as uint8 (3, H, W), and by how much it is smaller than the file says, as `decode`."""
        if isinstance(self.image, np.ndarray):
            return self.image, 1.0
        image, reduction = self.decode(min_size)
        return planes(image), reduction

    def decode(self, min_size: tuple[int, int] | None = None) -> tuple[Image.Image, float]:
        """The whole image as RGB, and by how much it is smaller than the file says: 1, 2, 4 or 8.

        A JPEG is decoded at a half, a quarter or an eighth where that is still at least `min_size`, (width, height):
        it costs a fraction, and what would be averaged away later is not computed.

        Raises:
            SampleError: for an image that is damaged or truncated.
        """
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
        """The checked instance of one annotation, see `parse_instance`.

        Raises:
            SampleError: for one that cannot be used.
        """
        annotation = self.annotations[position]
        if isinstance(annotation, Instance):
            return annotation
        return parse_instance(annotation, self.width, self.height, position, left_out)

    def area(self, position: int) -> float:
        """About how many pixels an annotation covers, at least 1; nothing is decoded where the annotation says it."""
        annotation = self.annotations[position]
        area = annotation.get("area") if isinstance(annotation, dict) else None
        if not (is_number(area) and area > 0):
            try:
                area = self.instance(position).area
            except SampleError:  # counted where it is drawn
                return 1.0
        return float(np.clip(area, 1, self.width * self.height))


def planes(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 (3, H, W), channel by channel in memory."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_columns(rle: dict, start: int, stop: int) -> np.ndarray:
    """Columns `start` to `stop` of the mask of a checked compressed RLE, uint8 0 or 1 (stop - start, H)."""
    height = rle["size"][0]
    ends = np.cumsum(run_lengths(rle["counts"])).clip(start * height, stop * height)
    values = (np.arange(len(ends)) & 1).astype(np.uint8)  # runs lie outside and inside the mask in turn
    return np.repeat(values, np.diff(ends, prepend=start * height)).reshape(stop - start, height)
