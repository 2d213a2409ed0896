"""Pictures from files, folders and patterns, and one picture of any kind as RGB."""

import glob
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .messages import one_line


PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))

# In a folder of results of `samlight segment`: the settings they were made with, and of which pictures.
NOTE_NAME = ".samlight.json"

_NO_ADDRESS = "{}: is an address, and files alone are read. Download it."

Item, Read = TypeVar("Item"), TypeVar("Read")

# 300 MB as RGB. The masks of one picture can take as many bytes each as it has pixels.
MAX_PIXELS = 100_000_000


class PictureError(ValueError):
    """A picture that cannot be used; the message is one line with what is wrong and what to do."""


def find_pictures(
    paths: Iterable[str | os.PathLike], exclude: str | os.PathLike | None = None
) -> tuple[list[Path], list[PictureError]]:
    """All pictures that `paths` name, each once, and an error for each path that names none.

    A file is taken whatever its suffix. A folder stands for the pictures in it and in its subfolders, in sorted order,
    without hidden ones; suffixes match in any case. A path that does not exist is read as a pattern (`*`, `?`, `**`).

    `exclude` is the folder that results are written to: inside a searched one it is left out, as are those of earlier runs.
    """
    found: dict[Path, Path] = {}
    problems = []
    excluded = None if exclude is None else Path(exclude).resolve()
    for path in paths:
        if _is_address(path):
            problems.append(PictureError(_NO_ADDRESS.format(path)))
            continue
        path = Path(path)
        if path.is_dir():
            pictures = _in_folder(path, excluded)
            missing = f"{path}: no pictures in this folder (looked for {', '.join(sorted(PICTURE_SUFFIXES))})."
        elif path.exists():
            pictures, missing = [path], ""
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            pictures = [match for match in matches if match.is_file() and _is_picture(match)]
            missing = f"{path}: no such file or folder. Check the name."
        if not pictures:
            problems.append(PictureError(missing))
        for picture in pictures:
            found.setdefault(picture.resolve(), picture)
    return list(found.values()), problems


def open_picture(path: str | os.PathLike) -> Image.Image:
    """The picture as RGB, 8 bits, upright as its EXIF orientation says.

    Transparency is laid on white. Grey levels of more than 8 bits are stretched from the lowest and highest in the
    picture to 0 and 255. Of several frames the first is taken.

    Raises:
        PictureError: for a file that is not there, is no picture, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    if _is_address(path):
        raise PictureError(_NO_ADDRESS.format(path))
    path = Path(path)
    if not path.exists():
        raise PictureError(f"{path}: no such file. Check the name.")
    if path.is_dir():
        raise PictureError(f"{path}: is a folder. Give a file.")
    if path.stat().st_size == 0:
        raise PictureError(f"{path}: the file is empty. Copy or download it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: the limit here is checked below
            with Image.open(path) as picture:
                _check_size(path, *picture.size)
                picture.load()
                return to_rgb(ImageOps.exif_transpose(picture))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{path}: more than {MAX_PIXELS:,} pixels, the limit here. Make it smaller, or cut it up."
        ) from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{path}: not a picture that can be read. Convert it to JPEG or PNG.") from error
    except PermissionError as error:
        raise PictureError(f"{path}: no permission to read it. Check its permissions.") from error
    except MemoryError as error:
        raise PictureError(f"{path}: does not fit into memory. Make it smaller.") from error
    except Exception as error:  # decoders raise nearly anything on damaged files: struct.error, zlib.error, IndexError
        raise PictureError(f"{path}: truncated or damaged ({one_line(error)}). Copy or download it again.") from error


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], num_threads: int = 1) -> Iterator[Read]:
    """`read(item)` of each item in their order, of which up to `num_threads + 1` are read meanwhile by other threads.

    What `read` raises is raised where its result would come. Items are taken as they are needed: there may be any number.
    """
    items = iter(items)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="read_ahead") as pool:
        waiting = deque(pool.submit(read, item) for item in islice(items, num_threads + 1))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in islice(items, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def _is_address(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)  # of which a Path would keep one slash


def _in_folder(folder: Path, excluded: Path | None) -> list[Path]:
    pictures = []
    for root, folders, files in os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".") and not _holds_results(Path(root) / name, excluded)
        ]
        pictures += [Path(root) / name for name in files if not name.startswith(".")]
    return sorted(picture for picture in pictures if _is_picture(picture))


def _holds_results(folder: Path, excluded: Path | None) -> bool:
    return excluded is not None and (folder.resolve() == excluded or (folder / NOTE_NAME).is_file())


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _check_size(path: Path, width: int, height: int):
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"{path}: {width}x{height} is {width * height:,} pixels, and the limit is {MAX_PIXELS:,}. "
            "Make it smaller, or cut it up."
        )


def to_rgb(picture: Image.Image) -> Image.Image:
    """8 bits; transparency and grey levels of more bits as `open_picture` tells."""
    if picture.mode.startswith(("I", "F")):
        return _stretch_grey(picture)
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _stretch_grey(picture: Image.Image) -> Image.Image:
    """Modes I, I;16 and F, where Pillow's conversion would clip everything above 255 to white."""
    levels = np.nan_to_num(np.asarray(picture).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = levels.min(), levels.max()
    if low == high:  # one grey: nothing to stretch, and 16 bits are the usual meaning
        levels = np.clip(levels / 257, 0, 255)
    else:
        levels = (levels - low) * (255 / (high - low))
    return Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")
