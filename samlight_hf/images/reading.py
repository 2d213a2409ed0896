"""Images from files, folders and patterns, and one image of any kind as RGB."""

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
from .formats import describe_left_out, image_suffixes, opening_hint
from .levels import LevelsError, to_rgb


# In a folder of results of `samlight segment`: the settings they were made with, and of which images.
NOTE_NAME = ".samlight.json"

_NO_ADDRESS = "{}: is an address, and files alone are read. Download it."

Item, Read = TypeVar("Item"), TypeVar("Read")

# 300 MB as RGB. The masks of one image can take as many bytes each as it has pixels.
MAX_PIXELS = 100_000_000


class ImageError(ValueError):
    """An image that cannot be used; the message is one line with what is wrong and what to do."""


def find_images(
    paths: Iterable[str | os.PathLike],
    exclude: str | os.PathLike | None = None,
    left_out: Counter[str] | None = None,
) -> tuple[list[Path], list[ImageError]]:
    """Find all images that `paths` name, each once, and make an error for each path that names none.

    A file is taken whatever its suffix. A folder stands for the images in it and in its subfolders, in sorted order,
    without hidden ones: all suffixes that Pillow opens here, in any case. A path that does not exist is read as a pattern
    (`*`, `?`, `**`).

    Args:
        paths: files, folders and patterns.
        exclude: the folder that results are written to: inside a searched one it is left out, as are those of earlier runs.
        left_out: where files of folders and patterns that are no images are counted, by suffix in lower case.
    """
    left_out = Counter() if left_out is None else left_out
    found: dict[str, Path] = {}
    problems = []
    excluded = None if exclude is None else Path(exclude).resolve()
    suffixes = image_suffixes()
    for path in paths:
        if _is_address(path):
            problems.append(ImageError(_NO_ADDRESS.format(path)))
            continue
        path, others = Path(path), Counter()
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
            what = "no images in this folder" if path.is_dir() else "no such file or folder. Check the name"
            what = "no image matches this pattern" if others and not path.is_dir() else what
            problems.append(ImageError(f"{path}: {what}" + (f": {describe_left_out(others)}" if others else ".")))
        for image in images:
            found.setdefault(os.path.realpath(image), image)  # Path.resolve raises for links in a circle
    return list(found.values()), problems


def common_folder(paths: Iterable[str | os.PathLike]) -> Path | None:
    """Return the folder that was asked for, absolute: of several paths, the deepest one that holds them all.

    A folder stands for itself, a file for the folder that it is in, a pattern for its part before the first `*`, `?` or
    `[`. None where there is no such folder: on several drives, or where no path exists.
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


def open_image(path: str | os.PathLike) -> Image.Image:
    """The image as RGB, 8 bits, upright as its EXIF orientation says.

    Transparency is laid on white. Levels of more than 8 bits are stretched between robust percentiles, and a line is
    logged, see `levels.to_rgb`. Of several frames the first is taken.

    Raises:
        ImageError: for a file that is not there, is no image, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    if _is_address(path):
        raise ImageError(_NO_ADDRESS.format(path))
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path}: no such file. Check the name.")
    if path.is_dir():
        raise ImageError(f"{path}: is a folder. Give a file.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty. Copy or download it again.")
    image_suffixes()  # with the plugins of formats that Pillow has not itself
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: the limit here is checked below
            with Image.open(path) as image:
                _check_size(path, *image.size)
                return to_rgb(image, str(path), upright=True)
    except ImageError:
        raise
    except LevelsError as error:
        raise ImageError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path}: more than {MAX_PIXELS:,} pixels, the limit here. Make it smaller, or cut it up."
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


def _check_size(path: Path, width: int, height: int):
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{path}: {width}x{height} is {width * height:,} pixels, and the limit is {MAX_PIXELS:,}. "
            "Make it smaller, or cut it up."
        )
