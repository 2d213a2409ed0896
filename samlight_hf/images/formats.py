"""Image formats that Pillow opens here, and hints for those that it does not."""

import os
from collections import Counter
from functools import lru_cache
from typing import IO

from PIL import Image, features


# Formats of Pillow that are not raster images: documents, drawings, videos, and data that it only identifies.
_NO_IMAGES = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"))
_READ_AS_OTHERS = frozenset(("MPO",))  # opened by the JPEG plugin
_MAX_SUFFIXES = 8  # listed one by one in a message

_HEIF = "pip install pillow-heif"
_HINTS = {
    ".heic": _HEIF, ".heif": _HEIF, ".heics": _HEIF, ".heifs": _HEIF, ".hif": _HEIF,
    ".avif": "pip install 'pillow>=11.3' or pillow-heif", ".avifs": "pip install 'pillow>=11.3' or pillow-heif",
    ".webp": "needs a Pillow with WebP", ".jxl": "convert it to PNG",
    **dict.fromkeys((".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"), "needs a Pillow with OpenJPEG"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"), "camera raw: convert it to TIFF"),
}  # fmt: skip


def open_lazily(file: str | os.PathLike | IO[bytes], formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open a raster image with Pillow, without decoding it.

    Args:
        file: a path, or a file that is open for reading.
        formats: Pillow's names of the formats that are tried. Default: all of raster images. Others are not tried,
            whatever the suffix says: Pillow would start Ghostscript for EPS.
    """
    return Image.open(file, formats=_image_formats() if formats is None else formats)


def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of all raster images that Pillow and its plugins open here."""
    readable = {*_image_formats(), *_READ_AS_OTHERS}
    if not features.check("jpg_2000"):
        readable -= {"JPEG2000"}
    return frozenset(suffix.lower() for suffix, name in Image.registered_extensions().items() if name in readable)


def opening_hint(suffix: str, header: bytes = b"") -> str | None:
    """Return how to make a file readable, from its suffix or its first bytes; None if no way is known."""
    suffix = suffix.lower()
    if header[4:8] == b"ftyp":  # HEIC under any name: phones and messengers rename it to .jpg
        suffix = ".avif" if header[8:12] in (b"avif", b"avis") else ".heic"
    return None if suffix in image_suffixes() else _HINTS.get(suffix)


def describe_left_out(left_out: Counter[str]) -> str | None:
    """Return a line with the number of files that were left out, by suffix, and hints; None if there are none."""
    if not left_out:
        return None
    parts = []
    for suffix, number in sorted(left_out.items(), key=lambda item: (opening_hint(item[0]) is None, -item[1], item[0])):
        hint = opening_hint(suffix)
        parts.append(f"{number:,} {suffix or 'without a suffix'}" + (f" ({hint})" if hint else ""))
    if len(parts) > _MAX_SUFFIXES:
        parts[_MAX_SUFFIXES:] = [f"{len(parts) - _MAX_SUFFIXES} further kinds"]
    total = left_out.total()
    return f"left out {total:,} file{'s' * (total > 1)} of other formats: {', '.join(parts)}."


def _image_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats of raster images that it and its plugins open here."""
    _register_openers()
    return tuple(name for name in Image.OPEN if name not in _NO_IMAGES)


@lru_cache(maxsize=1)
def _register_openers():
    """Load the plugins of Pillow, and that of HEIC if it is installed."""
    Image.init()
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()
    if ".avif" not in Image.registered_extensions() and hasattr(pillow_heif, "register_avif_opener"):
        pillow_heif.register_avif_opener()
