"""Folders of pictures: without masks, and with masks as PNG files."""

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..image_formats import describe_left_out
from ..pictures import find_pictures
from .dataset import FileDataset, check_limit
from .samples import SampleError, SkipReason, SkipReport


logger = logging.getLogger(__name__)

# Modes of PIL whose pixels are numbers: bits, 8 and 16 bits, palette indices.
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


class ImageFolderDataset(FileDataset):
    """The pictures in a folder and its subfolders, in sorted order, without instances.

    Hidden files are left out. The sample's id is the path within the folder.

    Args:
        folder: where the pictures are.
        limit: only the first so many pictures.

    Raises:
        ValueError: where there is no such folder or no picture in it.
    """

    has_masks = False

    def __init__(self, folder: str | os.PathLike, limit: int | None = None):
        check_limit(limit)
        self.folder = Path(folder)
        self.index_report = SkipReport()
        self._set_files(_relative_paths(self.folder)[:limit])

    def __len__(self) -> int:
        return len(self._files)

    def sample_id(self, index: int) -> str:
        return str(self._files[index])

    def files(self) -> set:
        return {(self.folder / str(file)).resolve() for file in self._files}

    def _set_files(self, files: list[str]):
        # An array, because worker processes would copy millions of strings page by page as they touch them.
        self._files = np.array(files, dtype=str)
        self._check_not_empty(str(self.folder))

    def picture_bytes(self, index: int) -> bytes:
        try:
            return (self.folder / str(self._files[index])).read_bytes()
        except FileNotFoundError as error:
            raise SampleError(SkipReason.MISSING_PICTURE) from error

    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        return [], None


class MaskFolderDataset(ImageFolderDataset):
    """Pictures `images/NAME.jpg` with one's own masks: `masks/NAME.png`, or `masks/NAME/*.png`.

    A file `masks/NAME.png` is a map of labels: 0 is background, every other value one object; 8 or 16 bits, or palette
    indices. In a folder `masks/NAME/`, each PNG is one object: every pixel but 0. NAME may be in subfolders, and pictures
    may be of any kind. Masks have the size of their picture. The sample's id is the picture's path within `images`.

    Args:
        folder: the folder that has `images` and `masks`.
        limit: only the first so many pictures, without those skipped while indexing.

    Raises:
        ValueError: where there are no such folders, or no picture has masks.
    """

    has_masks = True

    def __init__(self, folder: str | os.PathLike, limit: int | None = None):
        check_limit(limit)
        self.folder, self.mask_folder = Path(folder) / "images", Path(folder) / "masks"
        if not self.mask_folder.is_dir():
            raise ValueError(f"{self.mask_folder}: no such folder. Masks are expected beside {self.folder}.")
        self.index_report = SkipReport()
        masks = {path.relative_to(self.mask_folder).as_posix() for path in self.mask_folder.rglob("[!.]*.png")}
        mask_names = {name.removesuffix(".png") for name in masks} | {os.path.dirname(name) for name in masks}
        files, seen = [], set()
        for file in _relative_paths(self.folder):
            name = os.path.splitext(file)[0]
            if name in seen:
                self.index_report.add_picture(SkipReason.DUPLICATE_IMAGE, file)
            elif name not in mask_names:
                self.index_report.add_picture(SkipReason.MISSING_MASK, file)
            else:
                files.append(file)
            seen.add(name)
            if len(files) == limit:
                break
        else:
            for name in sorted(masks):
                if not {name.removesuffix(".png"), os.path.dirname(name)} & seen:
                    self.index_report.add_picture(SkipReason.MISSING_PICTURE, name)
        self._set_files(files)

    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        name = self.mask_folder / os.path.splitext(str(self._files[index]))[0]
        label_map = name.with_name(name.name + ".png")
        if label_map.is_file():
            labels = _read_labels(label_map)
            segments = dict(_runs_of_labels(labels))
        else:
            files = sorted(name.glob("[!.]*.png"))  # none of those that macOS leaves beside them
            if not files:
                raise SampleError(SkipReason.MISSING_MASK)
            masks = {file.stem: _read_labels(file) != 0 for file in files}
            segments = {stem: runs for stem, mask in masks.items() for _, runs in _runs_of_labels(mask)}
            labels = next(iter(masks.values()))
        height, width = labels.shape
        return [{"id": key, "segmentation": runs} for key, runs in segments.items()], (width, height)


def _relative_paths(folder: Path) -> list[str]:
    """The pictures in a folder and its subfolders, sorted, as paths within it."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of pictures.")
    left_out: Counter[str] = Counter()
    pictures, problems = find_pictures([folder], left_out=left_out)
    if problems:
        raise ValueError(str(problems[0]))
    if left_out:
        logger.warning("%s: %s", folder, describe_left_out(left_out))
    return [path.relative_to(folder).as_posix() for path in pictures]


def _read_labels(path: Path) -> np.ndarray:
    """The pixels of a PNG as integers or bool, (H, W)."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            if picture.mode in _LABEL_MODES:
                return np.array(picture)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise SampleError(SkipReason.MALFORMED_MASK, str(path)) from error
    raise SampleError(SkipReason.MALFORMED_MASK, str(path))


def _runs_of_labels(labels: np.ndarray) -> Iterator[tuple[int, dict]]:
    """(label, uncompressed COCO RLE) of every label but 0, in one pass over the pixels for all labels."""
    height, width = labels.shape
    pixels = labels.T.ravel()  # column by column, as RLE goes
    starts = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])
    ends = np.append(starts[1:], pixels.size)
    values = pixels[starts]
    for label in np.unique(values[values != 0]).tolist():
        own = values == label
        edges = np.stack([starts[own], ends[own]], axis=1).ravel()
        runs = np.diff(edges, prepend=0, append=pixels.size)
        yield int(label), {"size": [height, width], "counts": runs.tolist()}
