"""Finding of image files by path, folder and pattern, and reading of a file of any format as RGB."""

import glob
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from ..utils.messages import one_line
from .formats import describe_left_out, image_suffixes, open_lazily, opening_hint
from .levels import LevelsError, to_rgb


# The file of `samlight segment` in a folder of results: their settings, and the images that they belong to.
NOTE_NAME = ".samlight.json"

_NO_ADDRESS = "{}: is an address, but only files are read. Download it."

Item = TypeVar("Item")
Result = TypeVar("Result")

# 300 MB as RGB. Each mask of an image can take as many bytes as the image has pixels.
MAX_PIXELS = 100_000_000


class ImageError(ValueError):
    """An image that cannot be used; the message is one line with what is wrong and what to do."""


def find_images(
    paths: Iterable[str | os.PathLike],
    exclude: str | os.PathLike | None = None,
    left_out: Counter[str] | None = None,
) -> tuple[list[Path], list[ImageError]]:
    """Find all images that `paths` name, each once.

    A file is accepted with any suffix. A folder stands for the images in it and in its subfolders, sorted and without
    hidden ones: files with a suffix, in upper or lower case, that Pillow opens here. A path that does not exist is read
    as a pattern (`*`, `?`, `**`).

    Args:
        paths: files, folders and patterns.
        exclude: the folder that results are written to. It is left out of the folders that are searched, as are the
            results of earlier runs.
        left_out: counts, by suffix in lower case, the files in folders and patterns that are not images.

    Returns:
        The images, and an error for each path that names none.
    """
    left_out = Counter() if left_out is None else left_out
    images_by_file: dict[str, Path] = {}
    problems: list[ImageError] = []
    excluded = None if exclude is None else Path(exclude).resolve()
    suffixes = image_suffixes()
    for name in paths:
        if not os.fspath(name) or _is_address(name):
            problems.append(ImageError(_NO_ADDRESS.format(name) if name else "an empty name: give a file or a folder."))
            continue
        path, others = Path(name), Counter[str]()
        if path.is_dir():
            files = _in_folder(path, excluded, problems)
        elif path.exists():
            files = None
        else:
            files = sorted(match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file())
        images = [path] if files is None else [file for file in files if file.suffix.lower() in suffixes]
        if files is not None:
            others.update(file.suffix.lower() for file in files if file.suffix.lower() not in suffixes)
        left_out.update(others)
        if not images:
            reason = "no images in this folder" if path.is_dir() else "no such file or folder. Check the name"
            reason = "no image matches this pattern" if others and not path.is_dir() else reason
            problems.append(ImageError(f"{path}: {reason}" + (f": {describe_left_out(others)}" if others else ".")))
        for image in images:
            images_by_file.setdefault(os.path.realpath(image), image)  # Path.resolve raises for links in a circle
    return list(images_by_file.values()), problems


def common_folder(paths: Iterable[str | os.PathLike]) -> Path | None:
    """Return the deepest folder that holds all paths, as an absolute path.

    A folder stands for itself, a file for the folder that it is in, and a pattern for its part before the first `*`,
    `?` or `[`.

    Returns:
        The folder, or None if there is none: the paths are on several drives, or none of them exists.
    """
    folders = []
    for path in (Path(path) for path in paths if not _is_address(path)):
        if path.is_dir():
            folders.append(path)
        elif path.exists():
            folders.append(path.parent)
        elif any(glob.iglob(str(path), recursive=True)):
            folders.append(Path(*takewhile(lambda part: not glob.has_magic(part), path.parts)))
    try:
        return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
    except ValueError:
        return None


def open_image(
    path: str | os.PathLike, max_pixels: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Read an image file as RGB, 8 bits, turned upright as its EXIF orientation says.

    Transparency is composited on white. Levels of more than 8 bits are stretched between robust percentiles, and a line
    is logged, see `levels.to_rgb`. Only the first frame of a file is read.

    Args:
        path: of the file, with any suffix.
        max_pixels: the largest width times height. Default: `MAX_PIXELS`.
        formats: Pillow's names of the formats that are tried. Default: all of raster images.

    Raises:
        ImageError: for a file that does not exist, is not an image, is damaged, or has more than `max_pixels` pixels.
    """
    path, max_pixels = check_file(path), MAX_PIXELS if max_pixels is None else max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warning of the size, which is checked below
            with open_lazily(path, formats) as image:
                _check_size(path, *image.size, max_pixels)
                return to_rgb(image, str(path), upright=True, copies=False)
    except ImageError:
        raise
    except LevelsError as error:
        raise ImageError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))  # Pillow has a limit of its own
        raise ImageError(
            f"{path}: more than {limit:,} pixels, the limit here. Make it smaller, or cut it up; "
            "a TIFF is segmented as it is by samlight segment --tile."
        ) from error
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            hint = opening_hint(path.suffix, file.read(16))
        raise ImageError(f"{path}: not an image that can be read. {_remedy(hint)}") from error
    except PermissionError as error:
        raise ImageError(f"{path}: no permission to read it. Check its permissions.") from error
    except MemoryError as error:
        raise ImageError(f"{path}: does not fit into memory. Make it smaller.") from error
    except Exception as error:  # decoders raise nearly anything on damaged files: struct.error, zlib.error, IndexError
        raise ImageError(f"{path}: truncated or damaged ({one_line(error)}). Copy or download it again.") from error


def check_file(path: str | os.PathLike) -> Path:
    """Return the path. Raises ImageError for an address, a folder, and a file that does not exist or is empty."""
    if _is_address(path):
        raise ImageError(_NO_ADDRESS.format(path))
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path}: no such file. Check the name.")
    if path.is_dir():
        raise ImageError(f"{path}: is a folder. Give a file.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty. Copy or download it again.")
    return path


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], num_threads: int = 1) -> Iterator[Result]:
    """Yield `read(item)` of each item, in order, while other threads read the next `num_threads + 1` items.

    An error of `read` is raised in the place of its result, one of the iterable behind the items before it.

    Args:
        read: called in another thread.
        items: any number of them; each is taken from the iterable only when a thread is to read it.
        num_threads: that read at the same time.
    """
    failed: list[Exception] = []
    items = before_error(items, failed)
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
    if failed:
        raise failed[0]


def before_error(items: Iterable[Item], failed: list[Exception]) -> Iterator[Item]:
    """Yield items up to an error of their iterable, which is appended to `failed`.

    So the items before the error can be finished, and it can be raised then. The iterable itself is not closed.
    """
    try:
        for item in items:  # noqa: UP028  # `yield from` would close a generator of the caller's
            yield item
    except Exception as error:
        failed.append(error)


def _is_address(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)  # a Path would keep only one slash


def _in_folder(folder: Path, excluded: Path | None, problems: list[ImageError]) -> list[Path]:
    def refuse(error: OSError):
        problems.append(ImageError(f"{error.filename}: cannot be listed ({error.strerror}). Check its permissions."))

    images = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [
            name for name in folders if not name.startswith(".") and not _holds_results(Path(root) / name, excluded)
        ]
        images += [Path(root) / name for name in files if not name.startswith(".")]
    return sorted(images)


def _holds_results(folder: Path, excluded: Path | None) -> bool:
    return excluded is not None and (folder.resolve() == excluded or (folder / NOTE_NAME).is_file())


def _remedy(hint: str | None) -> str:
    return "Convert it to JPEG or PNG" + (f", or: {hint}." if hint else ".")


def _check_size(path: Path, width: int, height: int, max_pixels: int):
    if width * height > max_pixels:
        raise ImageError(
            f"{path}: {width}x{height} is {width * height:,} pixels, and the limit is {max_pixels:,}. "
            "Make it smaller, or cut it up; a TIFF is segmented as it is by samlight segment --tile."
        )
