"""Mask files: from the pixels of an image file to a map of labels, with the checks that it is one."""

import io
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image

from .samples import SampleError, SkipReason


# The void value of VOC, Cityscapes' training labels and COCO-Stuff.
VOID_LABEL = 255

# Labels above it are no small ones: objects painted at even distances, such as 127 and 255, reach it.
MAX_SMALL_LABEL = 126

# PNGs of 2 and 4 bits, which Pillow stretches to 8.
_STRETCHED = {"L;2": 85, "L;4": 17}

_LOSSY = ("JPEG", "MPO", "JPEG2000")

# A passage from one object into another that is an edge and no object is at most so many pixels wide.
_MAX_EDGE_WIDTH = 3


@dataclass(frozen=True)
class MaskReading:
    """How mask files are read.

    Attributes:
        ignore_label: the label of a map that is no object. "auto": 255 where the file has it beside small labels, from 1
            to 126, and no others but 0, as VOC and Cityscapes write their void; a map of 0 and 255 alone is an object
            of value 255. None: no label.
        binary: each file is one object, however grey its edges are: what is at least half as bright as the brightest
            pixel.
    """

    ignore_label: int | Literal["auto"] | None = "auto"
    binary: bool = False

    def __post_init__(self):
        label = self.ignore_label
        if not (label in ("auto", None) or (isinstance(label, int) and not isinstance(label, bool))):
            raise ValueError(f'ignore_label={label!r} must be a label\'s number, "auto", or None for no label.')
        if self.binary and label not in ("auto", None):
            raise ValueError(
                f"ignore_label={label} is of label maps, and binary_masks=True reads none: give one of them."
            )

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def parse_ignore_label(text: str | int) -> int | str | None:
    """The `ignore_label` that a command line or a config says: a number, "auto" or "none"."""
    text = str(text).strip().lower()
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"ignore_label={text} must be a label's number, auto or none.") from error


def read_labels(data: bytes, reading: MaskReading) -> tuple[np.ndarray, int | None]:
    """The label map of a file, integers or bool (H, W), 0 outside all objects, and the void label that was taken out.

    The latter is None where `reading` names the label itself, or there is none.

    Raises:
        SampleError: for a file that is damaged, in colours, or of grey levels that are no labels.
    """
    values, is_lossy = read_values(data)
    if reading.binary:
        return _bright(values), None
    if has_grey_levels(values) or (is_lossy and len(np.unique(values)) > 2):
        raise SampleError(SkipReason.GREY_MASK)
    void = reading.ignore_label
    if void == "auto":
        void = VOID_LABEL if _has_void(values) else None
    if void is not None:
        values = np.where(values == void, 0, values)
    return values, void if reading.ignore_label == "auto" else None


def read_object(data: bytes, reading: MaskReading) -> np.ndarray:
    """The one object of a file, bool (H, W): every pixel but 0; of grey levels, what `MaskReading.binary` says.

    Raises:
        SampleError: for a file that is damaged or in colours.
    """
    values, is_lossy = read_values(data)
    return _bright(values) if reading.binary or is_lossy or has_grey_levels(values) else values != 0


def _bright(values: np.ndarray) -> np.ndarray:
    return (values > 0) & (values >= int(values.max()) / 2)


def read_values(data: bytes) -> tuple[np.ndarray, bool]:
    """The numbers in a mask file, integers or bool (H, W), and whether its format has changed them: JPEG's.

    Colours are refused, but for those whose channels are equal, and palettes, whose indices are the numbers. What is
    transparent is 0; of half transparent pixels the number is a part, as of a grey edge. Of several frames the first
    is taken.

    Raises:
        SampleError: for a file that is damaged, or has no such numbers.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            raw_mode, is_lossy = _raw_mode(image), image.format in _LOSSY
            mode, pixels = image.mode, np.array(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise SampleError(SkipReason.MALFORMED_MASK) from error
    if mode == "PA":
        pixels = np.where(pixels[..., 1] > 0, pixels[..., 0], 0)
    elif mode == "L":
        pixels //= _STRETCHED.get(raw_mode, 1)
    elif mode in ("RGB", "RGBA", "LA"):
        if raw_mode.endswith("16B"):  # Pillow keeps 8 of the 16 bits: labels up to 255 would be 0
            raise SampleError(SkipReason.DEEP_COLOUR_MASK)
        pixels = _grey(pixels, has_alpha=mode.endswith("A"))
    elif mode == "F" or mode.startswith("I"):
        if not (np.isfinite(pixels).all() and np.array_equal(pixels, np.rint(pixels)) and pixels.min() >= 0):
            raise SampleError(SkipReason.MALFORMED_MASK)
        pixels = pixels.astype(np.int64)
    elif mode not in ("1", "P"):
        raise SampleError(SkipReason.COLOURED_MASK)
    return pixels, is_lossy


def _raw_mode(image: Image.Image) -> str:
    """How the file has the pixels, which Pillow turns into `image.mode`; "" where it does not say."""
    arguments = image.tile[0][3] if image.tile else ""
    arguments = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""


def _grey(pixels: np.ndarray, has_alpha: bool) -> np.ndarray:
    """The equal channels of (H, W, channels) as one, uint8 (H, W)."""
    colours = pixels[..., :-1] if has_alpha else pixels
    grey = colours[..., 0]
    alpha = pixels[..., -1] if has_alpha else np.full_like(grey, 255)
    if ((colours != grey[..., None]).any(-1) & (alpha > 0)).any():
        raise SampleError(SkipReason.COLOURED_MASK)
    return (grey.astype(np.uint16) * alpha // 255).astype(np.uint8) if has_alpha else grey


def has_grey_levels(values: np.ndarray) -> bool:
    """Whether the numbers (H, W) are brightness, as of an anti-aliased, blurred or JPEG mask, and not labels.

    Looked at is every value but 0. It is an *edge* where at least half of its pixels lie in passages of up to three
    pixels between a lower and a higher value, along a row or a column. It is *scattered* where at least half of its
    pixels, and two or more, touch none of the same value. The numbers are grey levels

    - with eight values or more that are one or the other, and at least half of all; or
    - with any edge, edges being at least half of all values, where the values are spread as grey levels are: the
      largest is at least 16 times their number.

    Objects are compact, and rarely so thin: maps of many small, touching objects pass, and so do a thin object
    between two others, and a map of 0, 1 for borders and 2 for what they enclose.
    """
    if values.dtype == bool:
        return False
    places, largest = values.ravel(), int(values.max())
    if largest >= 2**16:
        labels, places = np.unique(places, return_inverse=True)
    else:
        labels = np.arange(largest + 1)
    sizes = np.bincount(places)
    is_label = (labels != 0) & (sizes > 0)
    num_labels = np.count_nonzero(is_label)
    is_spread = largest >= 16 * num_labels
    if num_labels < 2 or (num_labels < 8 and not is_spread):
        return False
    rows, columns = _passages(values), [each.T for each in _passages(values.T)]
    is_edge, is_alone = rows[0] | columns[0], rows[1] & columns[1]
    edges, loose = (
        np.bincount(places[pixels.ravel()], minlength=len(sizes))[is_label] for pixels in (is_edge, is_edge | is_alone)
    )
    sizes = sizes[is_label]
    num_edges = np.count_nonzero(2 * edges >= sizes)
    num_loose = np.count_nonzero((2 * edges >= sizes) | ((2 * loose >= sizes) & (sizes >= 2)))
    return (num_loose >= 8 and 2 * num_loose >= num_labels) or (
        is_spread and num_edges >= 1 and 2 * num_edges >= num_labels
    )


def _passages(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of (H, W), along its row: whether it is in a short run between a lower and a higher one; alone in its run."""
    height, width = values.shape
    is_start = np.ones((height, width), dtype=bool)
    is_start[:, 1:] = values[:, 1:] != values[:, :-1]
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=values.size)
    levels = values.ravel()[starts].astype(np.int64)
    is_inner = np.zeros(len(starts), dtype=bool)  # with a run of the same row on either side
    rows = starts // width
    is_inner[1:-1] = (rows[:-2] == rows[1:-1]) & (rows[2:] == rows[1:-1])
    is_between = np.zeros(len(starts), dtype=bool)
    is_between[1:-1] = (levels[1:-1] - levels[:-2] > 0) == (levels[2:] - levels[1:-1] > 0)
    is_edge = is_inner & is_between & (lengths <= _MAX_EDGE_WIDTH)
    return tuple(np.repeat(each, lengths).reshape(height, width) for each in (is_edge, lengths == 1))


def _has_void(values: np.ndarray) -> bool:
    """Whether 255 is void: see `MaskReading.ignore_label`."""
    if values.dtype == bool or values.max() != VOID_LABEL:
        return False
    others = values[(values != 0) & (values != VOID_LABEL)]
    return others.size > 0 and others.max() <= MAX_SMALL_LABEL
