"""Limits of the app, and the reading of uploads within them."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import Image

from ..images.formats import image_suffixes
from ..images.reading import ImageError, open_image


# Raster formats that Pillow decodes itself: others, such as EPS, would start another program on the server.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP",
)  # fmt: skip

MEGABYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits that keep a server up and fair, whoever uses it.

    Attributes:
        upload_mb: Largest upload, in MB of 2**20 bytes.
        pixels: Largest width times height of an image.
        cache_mb: Memory of all sessions together; the one that was idle for longest is dropped first.
        sessions: Number of sessions that are kept.
        idle_seconds: A session that was idle for longer is dropped.
        queue: Number of waiting events, of all users; further ones are refused.
        clicks: Number of points for one object.
        objects: Number of objects in a session's list.
        steps: Number of steps that undo goes back.
        points_per_side: Largest grid of points in everything mode.

    Raises:
        ValueError: For a limit below 1; the message names it.
    """

    upload_mb: int = 32
    pixels: int = 25_000_000
    cache_mb: int = 2048
    sessions: int = 64
    idle_seconds: int = 1800
    queue: int = 64
    clicks: int = 64
    objects: int = 256
    steps: int = 24
    points_per_side: int = 32

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name}={value!r} must be a positive integer.")


def read_upload(path: str | os.PathLike, limits: Limits) -> Image.Image:
    """Read an uploaded file as RGB. Messages name the file as its owner does, and no folder of the server.

    Args:
        path: Of the file, where the server keeps it.
        limits: Of bytes and pixels.

    Raises:
        ImageError: For a file that is too large, no image or damaged, with what to do.
    """
    path = Path(path)
    name = short_name(path.name)
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ImageError(f"{name}: the upload is gone. Upload it again.") from error
    if num_bytes > limits.upload_mb * MEGABYTE:
        raise ImageError(
            f"{name}: {num_bytes / MEGABYTE:.0f} MB, and the limit is {limits.upload_mb} MB. Make it smaller."
        )
    image_suffixes()  # loads Pillow's plugins
    formats = tuple(name for name in FORMATS if name in Image.OPEN)
    try:
        return open_image(path, limits.pixels, formats)
    except ImageError as error:
        raise ImageError(str(error).replace(str(path), name)) from error


def short_name(name: str, length: int = 80) -> str:
    """Return a name as text for a page and for files: printable, without slashes, and not too long."""
    text = "".join(" " if letter in "/\\" or not letter.isprintable() else letter for letter in name)
    return " ".join(text.split())[:length].strip(" .") or "image"
