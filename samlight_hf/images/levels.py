"""Conversion of images of any bit depth to 8-bit RGB: robust percentiles, nodata values, transparency on white."""

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps


logger = logging.getLogger(__name__)

# Share of the levels that may be clipped at each end: more than hot and dead pixels, less than an object.
TAIL = 0.005

GDAL_NODATA_TAG = 42113
_PHOTOMETRIC = 262  # a TIFF's tag; 0 says that low levels are bright, which Pillow obeys for 8 bits alone
# Signed levels that mean "no data" by convention, if no level of the image is lower.
SENTINELS = (-2147483648.0, -99999.0, -32768.0, -9999.0)
_TOO_LARGE = 1e30  # not a measurement: -3.4e38 and 9.97e36 are the fill values of GIS and netCDF
# Images of these formats, or of no file, keep little but their pixels. Those of others may keep a decoder, with whole
# images in it, or a TIFF's tags, with the layers of Photoshop.
_KEEP_PIXELS = (None, "JPEG", "MPO", "PNG")
_IGNORED = "its alpha hides the whole image and is ignored"
_BLOCK = 1 << 22  # levels scaled at once, in float64

_DEEP = ("RGB", "RGBA")
_SWAPPED = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}

_has_told = False  # of an image without a name


class LevelsError(ValueError):
    """An image whose levels Pillow cannot read correctly."""


def to_rgb(image: Image.Image, name: str | None = None, upright: bool = False, copies: bool = True) -> Image.Image:
    """Convert an image of any mode to RGB, 8 bits, and log one line if its levels are changed.

    8-bit levels are kept. Levels of more bits are stretched, see `stretch`. Transparency is composited on white; an
    alpha channel that hides the whole image is ignored.

    Args:
        image: any PIL image. All bits are read from a file that is not loaded yet; of 16-bit colours that are loaded,
            Pillow keeps only the high byte.
        name: names the image in the log. Without a name only the first such line of the process is logged.
        upright: turn the image as its EXIF orientation says.
        copies: copy an image that need not be converted. Without it such an image is returned itself, unless it would
            keep other memory: a copy takes as long as decoding the file, and no other thread of the process runs Python
            meanwhile.

    Raises:
        LevelsError: for 16-bit colours in separate planes without compression, which Pillow reads as 8 bits.
    """
    nodata, deep, dtype = _nodata_value(image), _deep_bytes(image), _stored_dtype(image)
    white_is_zero = _tiff_tags(image).get(_PHOTOMETRIC) == 0
    notes: list[str] = []
    if deep:  # the image itself is not loaded, which would lose its low bytes
        high, low = map(ImageOps.exif_transpose, deep) if upright else deep
        image = _deep_colours_to_rgb(high, low, nodata, notes)
        log_changes(name, notes)
        return image
    _load(image)
    if upright and is_turned(image):
        image = ImageOps.exif_transpose(image)  # which copies any other image
    if dtype is not None or image.mode.startswith(("I", "F")):
        levels = np.asarray(image)
        levels, note = stretch(levels if dtype is None else levels.view(dtype), nodata, inverted=white_is_zero)
        notes += [note] if note else []
        image = Image.fromarray(levels).convert("RGB")
    elif "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = _lay_on_white(image.convert("RGBA"), notes)
    elif copies or image.mode != "RGB" or image.format not in _KEEP_PIXELS or image.readonly:
        # The pixels of a read-only image are in a file, which may change.
        image = image.convert("RGB")
    log_changes(name, notes)
    return image


def is_upright_rgb(image: Image.Image) -> bool:
    """Return whether `to_rgb` would only copy an image, turned upright."""
    is_rgb = image.mode == "RGB" and "transparency" not in image.info and _deep_rawmode(image) is None
    return is_rgb and not is_turned(image)


def is_turned(image: Image.Image) -> bool:
    """Return whether an image's EXIF orientation says that it is shown turned or mirrored."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def has_more_than_8_bits(image: Image.Image) -> bool:
    """Return whether `to_rgb` would stretch the levels of an image; a file must not be loaded yet."""
    is_deep = image.mode.startswith(("I", "F")) or _deep_rawmode(image) is not None
    return is_deep or _stored_dtype(image) is not None


def stretch(
    levels: np.ndarray, nodata: float | None = None, hidden: np.ndarray | None = None, inverted: bool = False
) -> tuple[np.ndarray, str | None]:
    """Scale levels of any number type linearly to 0 to 255, between robust percentiles of all channels together.

    Up to 0.5 % of the levels are clipped at each end, unless all others are equal. A constant image is scaled as 16
    bits. These values are not levels, and become 0: NaN, infinities, numbers beyond +-1e30, `nodata`, and -9999, -32768
    and similar ones if no level is lower.

    Args:
        levels: (H, W) or (H, W, C), integers or floats.
        nodata: a further value that means "no data". A pixel of several channels is black only if all of them have it.
        hidden: bool (H, W), invisible pixels, which do not count for the percentiles.
        inverted: make low levels bright.

    Returns:
        uint8 levels of the same shape, and a sentence that describes the changes, or None without any.
    """
    valid = _valid_levels(levels)
    shown, black = valid, ~valid
    if nodata is not None and _fits(nodata, levels):
        shown = valid & (levels != levels.dtype.type(nodata))
        black = ~shown if levels.ndim == 2 else ~(shown.any(axis=-1, keepdims=True) & valid)
    if hidden is not None and not hidden.all():
        shown = shown & (~hidden if levels.ndim == 2 else ~hidden[..., None])
    num_black = int(black.sum() if levels.ndim == 2 else black.all(axis=-1).sum())
    values = levels[shown]
    if not values.size:
        return np.zeros(levels.shape, dtype=np.uint8), "it holds no data at all and is black"
    tail = int(TAIL * values.size)
    low, high = (float(value) for value in np.partition(values, (tail, values.size - 1 - tail))[[tail, -1 - tail]])
    if low == high:
        low, high = float(values.min()), float(values.max())
    is_constant = low == high
    if is_constant:
        low, high = 0.0, 65535.0
    scaled = np.empty(levels.shape, dtype=np.uint8)
    rows = max(1, _BLOCK // max(1, levels[:1].size))
    for start in range(0, len(levels), rows):
        part = np.s_[start : start + rows]
        block = np.where(black[part], low, levels[part]).astype(np.float64)
        scaled[part] = np.rint(((block - low) * (255 / (high - low))).clip(0, 255))
    if inverted:
        np.subtract(255, scaled, out=scaled)
    scaled[np.broadcast_to(black, levels.shape)] = 0
    notes = []
    if not is_constant and (low, high) != (0, 65535):
        notes.append(f"levels {low:.6g} to {high:.6g} became 0 to 255")
    if num_black:
        notes.append(f"{num_black:,} pixels without data became black")
    return scaled, ", ".join(notes) or None


def log_changes(name: str | None, notes: list[str]):
    """Log the changes to an image, if there are any; without a name only once in a process."""
    global _has_told
    if not notes:
        return
    if name is not None:
        logger.warning("%s: %s.", name, ", ".join(notes))
    elif not _has_told:
        _has_told = True
        logger.warning("an image of the data: %s. Further images like this are not reported.", ", ".join(notes))


def _valid_levels(levels: np.ndarray) -> np.ndarray:
    """Return a mask of the levels that are measurements, in the shape of `levels`."""
    is_float = levels.dtype.kind == "f"
    largest = (np.finfo if is_float else np.iinfo)(levels.dtype).max
    if is_float:
        valid = np.abs(levels) < min(_TOO_LARGE, float(largest))  # false for NaN
    else:
        valid = np.ones(levels.shape, dtype=bool)
    for sentinel in SENTINELS if levels.dtype.kind != "u" else ():
        if float(levels.min(where=valid, initial=largest)) == sentinel:
            valid &= levels != sentinel
    return valid


def _fits(value: float, levels: np.ndarray) -> bool:
    """Return whether the dtype of the levels can hold the value."""
    if levels.dtype.kind == "f":
        return abs(value) <= np.finfo(levels.dtype).max
    limits = np.iinfo(levels.dtype)
    return value == int(value) and limits.min <= value <= limits.max


def _nodata_value(image: Image.Image) -> float | None:
    """Return GDAL's nodata value of a TIFF, or the transparent grey of a PNG; None without a finite one."""
    value: Any = _tiff_tags(image).get(GDAL_NODATA_TAG)
    if value is None and image.mode.startswith("I"):
        value = image.info.get("transparency")
    with suppress(TypeError, ValueError):
        value = float(value.strip(" \0") if isinstance(value, str) else value)
        return value if np.isfinite(value) else None
    return None


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF by number; none for other images."""
    return getattr(image, "tag_v2", {})


def _stored_dtype(image: Image.Image) -> np.dtype | None:
    """Return the dtype of grey levels that Pillow reads bit by bit as another one, else None."""
    tags = _tiff_tags(image)
    kind = image.mode, tuple(tags.get(258) or ()), tuple(tags.get(339, (1,)))
    name = {("I", (32,), (1,)): "uint32", ("L", (8,), (2,)): "int8"}.get(kind)
    return None if name is None else np.dtype(name)


def _load(image: Image.Image):
    """Load an image. Pillow turns a TIFF as it loads it."""
    if isinstance(image, ImageFile.ImageFile) and _tiff_tags(image).get(ExifTags.Base.Orientation, 1) != 1:
        name, image.filename = image.filename, ""  # else Pillow maps the file with the width of the turned image
        image.load()
        image.filename = name
    else:
        image.load()


def _deep_rawmode(image: Image.Image) -> str | None:
    """Return the raw mode of a PNG, TIFF or PPM with several channels of 16 bits that is not loaded yet, else None."""
    if not isinstance(image, ImageFile.ImageFile) or image.format not in ("PNG", "PPM", "TIFF"):
        return None
    tiles: list[Any] = image.tile
    mode = "".join(sorted({args if isinstance(args, str) else args[0] for *_, args in tiles if args})) or None
    if image.format == "TIFF" and image.mode in _DEEP and tuple(_tiff_tags(image).get(258, ()))[:1] == (16,):
        return mode  # with separate planes, the letters of all
    if image.format == "PPM" and image.mode == "RGB" and [tile[0] for tile in tiles] == ["ppm"]:
        return mode if tiles[0][3][1] > 255 else None
    return mode if image.format == "PNG" and mode in ("LA;16B", "RGB;16B", "RGBA;16B") else None


def _deep_bytes(image: Image.Image) -> tuple[Image.Image, Image.Image] | None:
    """Read the high and the low bytes of a file with several channels of 16 bits as two images; None for other images.

    Pillow reads the high byte of each level. With the raw mode of the other byte order it reads the low one.

    Raises:
        LevelsError: for planes that Pillow reads as 8 bits.
    """
    mode = _deep_rawmode(image)
    if mode is None:
        return None
    assert isinstance(image, ImageFile.ImageFile)
    if image.format == "PPM":
        file = _file_of(image)
        file.seek(image.tile[0][2])
        levels = np.frombuffer(file.read(6 * image.width * image.height), ">u2").reshape(*image.size[::-1], 3)
        return Image.fromarray((levels >> 8).astype(np.uint8)), Image.fromarray(levels.astype(np.uint8))
    is_planar = _tiff_tags(image).get(284) == 2
    if is_planar and image.tile[0][0] == "raw":
        raise LevelsError("16-bit colours in separate planes cannot be read. Save them interleaved or compressed.")
    high = _read_as(image, None)
    if is_planar or mode.startswith("RGBa"):
        return high, high  # Pillow gives only the high bytes: 256 levels
    if mode != "LA;16B":
        return high, _read_as(image, mode[:-1] + _SWAPPED[mode[-1]])
    _, grey, _, alpha = _read_as(image, "RGBA").split()  # four bytes a pixel: grey and alpha, high and low
    low = Image.merge("RGBA", (grey, grey, grey, alpha))
    low.info = dict(high.info)
    return high, low


def _read_as(image: ImageFile.ImageFile, mode: str | None) -> Image.Image:
    """Read the file of an image that is not loaded yet, by another raw mode if one is given."""
    file = _file_of(image)
    position = file.tell()
    file.seek(0)
    twin = Image.open(file, formats=[image.format or ""])
    if image.tell():
        twin.seek(image.tell())
    if mode is not None:
        twin.tile = [_with_mode(tile, mode) for tile in twin.tile]
    twin.load()
    file.seek(position)
    return twin


def _file_of(image: ImageFile.ImageFile) -> IO[bytes]:
    assert image.fp is not None
    return image.fp


def _with_mode(tile: Any, mode: str) -> Any:
    """Return the tile by which Pillow reads a part of a file, with another raw mode; a plain tuple before Pillow 11."""
    args = mode if isinstance(tile[3], str) else (mode, *tile[3][1:])
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)


def _deep_colours_to_rgb(high: Image.Image, low: Image.Image, nodata: float | None, notes: list[str]) -> Image.Image:
    """Stretch colours whose high and low bytes are two images; sentences about the changes are added to `notes`."""
    levels = np.asarray(high).astype(np.uint16) << 8 | np.asarray(low)
    alpha = None
    if levels.shape[-1] == 4:
        levels, alpha = levels[..., :3], levels[..., 3]
        if alpha.max() >> 8 <= 1:
            notes.append(_IGNORED)
            alpha = None
    elif isinstance(transparent := high.info.get("transparency"), tuple):
        alpha = np.where((levels == transparent).all(axis=-1), 0, 65535)
    levels, note = stretch(levels, nodata, None if alpha is None else alpha == 0)
    notes += [note] if note else []
    image = Image.fromarray(levels)
    if alpha is None:
        return image
    image.putalpha(Image.fromarray((alpha >> 8).astype(np.uint8)))
    return _lay_on_white(image, notes)


def _lay_on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    """Composite RGBA on white, or ignore an alpha channel that hides everything, with a sentence in `notes`."""
    *colours, (_, most_opaque) = cast(tuple[tuple[int, int], ...], image.getextrema())
    if most_opaque <= 1 and any(low < high for low, high in colours):  # an image of one colour has nothing to show
        notes.append(_IGNORED)
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
