"""Read mask files: convert the pixels of an image file to a label map, and check that it is one."""

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ..images.formats import open_lazily
from .samples import SampleError, SkipReason


# The void value of VOC, Cityscapes' training labels and COCO-Stuff.
VOID_LABEL = 255

# Largest label beside which 255 is void. Objects painted at even distances, such as 127 and 255, exceed it.
MAX_SMALL_LABEL = 126

# Factor by which Pillow stretches PNGs of 2 and 4 bits to 8 bits, by raw mode.
_STRETCHED = {"L;2": 85, "L;4": 17}

# Title of the PNGs that `samlight segment --format labels` writes (`samlight_hf.masks.files`, which imports torch).
LABEL_MAP_TITLE = "label map"

_LOSSY = ("JPEG", "MPO", "JPEG2000")

# Largest width in pixels of an anti-aliased edge between two objects.
_MAX_EDGE_WIDTH = 3


@dataclass(frozen=True)
class MaskReading:
    """Settings for reading mask files.

    Attributes:
        ignore_label: label that is no object; None if there is none. "auto" ignores 255 if the other labels of the file
            are between 1 and 126, as in VOC and Cityscapes. In a map of 0 and 255 only, 255 is an object, and so it is
            in a PNG with the title "label map".
        binary: read each file as one object with grey edges: the pixels at least half as bright as the brightest.

    Raises:
        ValueError: if `ignore_label` is none of these, or if both settings are given.
    """

    ignore_label: int | Literal["auto"] | None = "auto"
    binary: bool = False

    def __post_init__(self):
        label = self.ignore_label
        if not (label in ("auto", None) or (isinstance(label, int) and not isinstance(label, bool))):
            raise ValueError(f'ignore_label={label!r} must be a label\'s number, "auto", or None for no label.')
        if self.binary and label not in ("auto", None):
            raise ValueError(
                f"ignore_label={label} is for label maps, and binary_masks=True reads none: give one of them."
            )

    def to_dict(self) -> dict:
        """Convert to a dict for JSON."""
        return asdict(self)


def parse_ignore_label(text: str | int) -> int | Literal["auto"] | None:
    """Parse `ignore_label` from a command line or a config: a number, "auto" or "none".

    Raises:
        ValueError: for any other text.
    """
    text = str(text).strip().lower()
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"ignore_label={text} must be a label's number, auto or none.") from error


def read_labels(data: bytes, reading: MaskReading) -> tuple[np.ndarray, int | None]:
    """Read a label map.

    Args:
        data: the bytes of the mask file.
        reading: the settings.

    Returns:
        The labels, integers or bool (H, W), 0 outside all objects; and the void label if one was detected by "auto" and
        removed, or None.

    Raises:
        SampleError: if the file is damaged, has colours, or has grey levels instead of labels.
    """
    values, is_lossy = read_values(data)
    if reading.binary:
        return _bright(values), None
    is_named = is_named_label_map(data)
    if not is_named and (has_grey_levels(values) or (is_lossy and len(np.unique(values)) > 2)):
        raise SampleError(SkipReason.GREY_MASK)
    void = reading.ignore_label
    if void == "auto":
        void = VOID_LABEL if not is_named and _has_void(values) else None
    if void is not None:
        values = np.where(values == void, 0, values)
    return values, void if reading.ignore_label == "auto" else None


def read_object(data: bytes, reading: MaskReading) -> np.ndarray:
    """Read the mask of one object: all pixels other than 0, or, in grey levels, as by `MaskReading.binary`.

    Args:
        data: the bytes of the mask file.
        reading: the settings.

    Returns:
        bool (H, W).

    Raises:
        SampleError: if the file is damaged or has colours.
    """
    values, is_lossy = read_values(data)
    return _bright(values) if reading.binary or is_lossy or has_grey_levels(values) else values != 0


def _bright(values: np.ndarray) -> np.ndarray:
    """Select the pixels at least half as bright as the brightest: bool (H, W)."""
    return (values > 0) & (values >= int(values.max()) / 2)


def read_values(data: bytes) -> tuple[np.ndarray, bool]:
    """Read the numbers in a mask file.

    Indices of a palette are numbers, and so are colours whose channels are equal; other colours are refused. Numbers
    are multiplied by the opacity: transparent pixels are 0. The first of several frames is read.

    Args:
        data: the bytes of the mask file.

    Returns:
        Integers or bool (H, W), and whether the format is lossy, as JPEG is.

    Raises:
        SampleError: if the file is damaged or has no such numbers.
    """
    try:
        with open_lazily(io.BytesIO(data)) as image:
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


def is_named_label_map(file: bytes | Path) -> bool:
    """Return whether a file, or its bytes, say that it is a label map, whatever its numbers look like."""
    with open_lazily(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        return image.format == "PNG" and image.info.get("Title") == LABEL_MAP_TITLE


def _raw_mode(image: Image.Image) -> str:
    """Return the pixel format of the file, which Pillow converts to `image.mode`; "" if unknown."""
    tiles = getattr(image, "tile", ())  # of images from files
    arguments = tiles[0][3] if tiles else ""
    arguments = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""


def _grey(pixels: np.ndarray, has_alpha: bool) -> np.ndarray:
    """Merge equal channels, and multiply by alpha: (H, W, channels) -> uint8 (H, W)."""
    colours = pixels[..., :-1] if has_alpha else pixels
    grey = colours[..., 0]
    alpha = pixels[..., -1] if has_alpha else np.full_like(grey, 255)
    if ((colours != grey[..., None]).any(-1) & (alpha > 0)).any():
        raise SampleError(SkipReason.COLOURED_MASK)
    return (grey.astype(np.uint16) * alpha // 255).astype(np.uint8) if has_alpha else grey


def has_grey_levels(values: np.ndarray) -> bool:
    """Return whether the numbers (H, W) are brightness, as in an anti-aliased, blurred or JPEG mask, and not labels.

    Each value other than 0 is classified:

    - It is an *edge* if at least half of its pixels are in runs of up to three pixels between a lower and a higher
      value, along a row or a column.
    - It is *scattered* if it has two or more pixels, and at least half of them are in such runs or touch no pixel of
      the same value.

    The numbers are grey levels in two cases:

    - At least eight values, and at least half of all values, are edges or scattered.
    - At least half of all values are edges, and values are spread as grey levels are: the largest is at least 16 times
      the number of values.

    Objects are compact and rarely that thin. Maps of many small, touching objects pass as labels; so do a thin object
    between two others, and a map with 1 for borders and 2 for the areas inside.
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
    rows, columns = _passages(values), [pixels.T for pixels in _passages(values.T)]
    is_edge, is_alone = rows[0] | columns[0], rows[1] & columns[1]
    edges, loose = (
        np.bincount(places[pixels.ravel()], minlength=len(sizes))[is_label] for pixels in (is_edge, is_edge | is_alone)
    )
    sizes = sizes[is_label]
    num_edges = np.count_nonzero(2 * edges >= sizes)
    num_loose = np.count_nonzero((2 * edges >= sizes) | ((2 * loose >= sizes) & (sizes >= 2)))
    is_noisy = num_loose >= 8 and 2 * num_loose >= num_labels
    return bool(is_noisy or (is_spread and num_edges >= 1 and 2 * num_edges >= num_labels))


def _passages(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find edge pixels and single pixels along the rows of (H, W).

    Returns:
        Two bool (H, W): pixels in a run of up to three between a lower and a higher value, and pixels that are a run
        of one.
    """
    height, width = values.shape
    is_start = np.ones((height, width), dtype=bool)
    is_start[:, 1:] = values[:, 1:] != values[:, :-1]
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=values.size)
    levels = values.ravel()[starts].astype(np.int64)
    is_inner = np.zeros(len(starts), dtype=bool)  # between two runs of the same row
    rows = starts // width
    is_inner[1:-1] = (rows[:-2] == rows[1:-1]) & (rows[2:] == rows[1:-1])
    is_between = np.zeros(len(starts), dtype=bool)
    is_between[1:-1] = (levels[1:-1] - levels[:-2] > 0) == (levels[2:] - levels[1:-1] > 0)
    is_edge = is_inner & is_between & (lengths <= _MAX_EDGE_WIDTH)
    return (
        np.repeat(is_edge, lengths).reshape(height, width),
        np.repeat(lengths == 1, lengths).reshape(height, width),
    )


def _has_void(values: np.ndarray) -> bool:
    """Return whether 255 is void: see `MaskReading.ignore_label`."""
    if values.dtype == bool or values.max() != VOID_LABEL:
        return False
    others = values[(values != 0) & (values != VOID_LABEL)]
    return others.size > 0 and others.max() <= MAX_SMALL_LABEL
