"""Folders of images: without masks, and with masks as image files."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from ..images.formats import describe_left_out, image_suffixes
from ..images.reading import find_images
from .dataset import FileDataset, check_limit
from .label_maps import MaskReading, read_labels, read_object
from .samples import SampleError, SkipReason, SkipReport


logger = logging.getLogger(__name__)


class ImageFolderDataset(FileDataset):
    """The images in a folder and its subfolders, in sorted order, without instances.

    Hidden files are left out. The sample's id is the path within the folder.

    Args:
        folder: where the images are.
        limit: only the first so many images.

    Raises:
        ValueError: where there is no such folder or no image in it.
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

    def image_bytes(self, index: int) -> bytes:
        try:
            return (self.folder / str(self._files[index])).read_bytes()
        except FileNotFoundError as error:
            raise SampleError(SkipReason.MISSING_IMAGE) from error

    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        return [], None


class MaskFolderDataset(ImageFolderDataset):
    """Images `images/NAME.jpg` with one's own masks: a file `masks/NAME.png`, or files in a folder `masks/NAME/`.

    A file `masks/NAME.png` is a map of labels: 0 is background, every other value one object; of any number of bits,
    palette indices, or colours whose channels are equal. Grey levels, as of anti-aliased masks, are refused: see
    `has_grey_levels` in label_maps.py. In a folder `masks/NAME/`, each file is one object: every pixel but 0, or, of grey
    levels, those at least half as bright as the brightest.

    NAME may be in subfolders, and images and masks of any kind that Pillow reads; suffixes match in any case. The masks of
    `NAME.jpg` may also be called `NAME.jpg.png`, `NAME_mask.png` or `NAME.jpg_mask.png`, and their folder likewise. Masks
    have the size of their image. The sample's id is the image's path within `images`.

    Args:
        folder: the folder that has `images` and `masks`.
        limit: only the first so many images, without those skipped while indexing.
        ignore_label: the label of a map that is no object, "auto" or None for none. "auto": 255 where the map has it beside
            labels from 1 to 126 alone, as VOC and Cityscapes write their void, which is counted in the report; in a
            map of 0 and 255 it is an object.
        binary_masks: each file is one object, however grey its edges are: every pixel at least half as bright as the
            brightest.

    Raises:
        ValueError: where there are no such folders, or no image has masks.
    """

    has_masks = True

    def __init__(
        self,
        folder: str | os.PathLike,
        limit: int | None = None,
        ignore_label: int | Literal["auto"] | None = "auto",
        binary_masks: bool = False,
    ):
        check_limit(limit)
        self.reading = MaskReading(ignore_label, binary_masks)
        self.folder, self.mask_folder = Path(folder) / "images", Path(folder) / "masks"
        if not self.mask_folder.is_dir():
            raise ValueError(f"{self.mask_folder}: no such folder. Masks are expected beside {self.folder}.")
        self.index_report = SkipReport()
        images = _relative_paths(self.folder)
        masks, orphans = _masks_of(images, [path.relative_to(self.mask_folder) for path in self.mask_files()])
        files, masks_of_files, seen = [], [], set()
        for file in images:
            name, own = os.path.splitext(file)[0], masks.get(file, ())
            if len(own) == 1:
                files.append(file)
                masks_of_files += own
            elif own:
                self.index_report.add_image(SkipReason.SEVERAL_MASKS, f"{file} ({', '.join(sorted(own))})")
            else:
                reason = SkipReason.DUPLICATE_IMAGE if name in seen else SkipReason.MISSING_MASK
                self.index_report.add_image(reason, file)
            seen.add(name)
            if len(files) == limit:
                break
        else:
            for name in orphans:
                self.index_report.add_image(SkipReason.MISSING_IMAGE, name)
        self._masks = np.array(masks_of_files, dtype=str)
        self._set_files(files)

    def mask_files(self) -> list[Path]:
        """All mask files, sorted, whether they have an image or not."""
        return _mask_files(self.mask_folder, "**/*")

    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        path = self.mask_folder / str(self._masks[index])
        if not path.is_dir():
            labels, void = self._read(read_labels, path)
            segments = dict(_runs_of_labels(labels))
        else:
            files, void = _mask_files(path, "*"), None
            if not files:
                raise SampleError(SkipReason.MISSING_MASK)
            stems = {file.stem for file in files}
            masks = {
                file.stem if len(stems) == len(files) else file.name: self._read(read_object, file) for file in files
            }
            segments = {name: runs for name, mask in masks.items() for _, runs in _runs_of_labels(mask)}
            labels = next(iter(masks.values()))
        height, width = labels.shape
        annotations = [{"id": key, "segmentation": runs} for key, runs in segments.items()]
        if void is not None:
            annotations.append(SampleError(SkipReason.VOID_LABEL))
        return annotations, (width, height)

    def _read(self, read: Callable, path: Path):
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise SampleError(SkipReason.MISSING_MASK) from error
        try:
            return read(data, self.reading)
        except SampleError as error:
            where = f"masks/{path.relative_to(self.mask_folder).as_posix()}"
            raise SampleError(error.reason, where) from error


def _mask_files(folder: Path, pattern: str) -> list[Path]:
    """The image files that a pattern finds, sorted, none of them hidden, such as those that macOS leaves beside others."""
    # Not find_images: masks that are links to one file are the masks of several images.
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in image_suffixes()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _masks_of(images: list[str], masks: list[Path]) -> tuple[dict[str, set[str]], list[str]]:
    """The mask files and the folders of masks of each image that has any, and the mask files of none; paths within their folders.

    A name belongs to one image: to that of the same name, before that of which it is a longer form.
    """
    owners: dict[str, str] = {}
    for ending in ("", "_mask"):
        for name_of in (lambda file: os.path.splitext(file)[0], str):
            for file in images:
                owners.setdefault(name_of(file) + ending, file)
    found: dict[str, set[str]] = {}
    orphans = []
    for mask in masks:
        file, folder = mask.as_posix(), mask.parent.as_posix()
        if owner := owners.get(os.path.splitext(file)[0]):
            found.setdefault(owner, set()).add(file)
        elif owner := owners.get(folder):
            found.setdefault(owner, set()).add(folder)
        else:
            orphans.append(file)
    return found, orphans


def _relative_paths(folder: Path) -> list[str]:
    """The images in a folder and its subfolders, sorted, as paths within it."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images.")
    left_out: Counter[str] = Counter()
    images, problems = find_images([folder], left_out=left_out)
    if problems:
        raise ValueError(str(problems[0]))
    if left_out:
        logger.warning("%s: %s", folder, describe_left_out(left_out))
    return [path.relative_to(folder).as_posix() for path in images]


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
