"""Read folders of images, without masks or with masks in image files."""

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
from .label_maps import MaskReading, is_named_label_map, read_labels, read_object
from .samples import SampleError, SkipReason, SkipReport


# The table beside the masks that `samlight segment --format png` writes (`samlight_hf.masks.files`).
TABLE_NAME = "masks.csv"

logger = logging.getLogger(__name__)


class ImageFolderDataset(FileDataset):
    """Reader of the images in a folder and its subfolders, in sorted order, without instances.

    Hidden files are left out. The id of a sample is the path of the image within the folder.

    Args:
        folder: the folder of the images.
        limit: read the first `limit` images only; by default all.

    Raises:
        ValueError: if there is no such folder, or no image in it.

    Example:
        >>> dataset = ImageFolderDataset("photos", limit=100)
        >>> dataset[0].image
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
        # An array: forked workers copy the memory pages of Python objects when they count references.
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
    """Reader of your own images and masks: `images/NAME.jpg` with a label map or one mask file for each object.

    A folder of this form is read:

    ```
    folder/
        images/NAME.jpg       an image
        masks/NAME.png        its label map: 0 is background, every other value is one object
        masks/NAME/*.png      or its objects: a folder with one mask file for each
    ```

    - A label map has integers of any bit depth, palette indices, or colours with equal channels. Anti-aliased masks and
      other images of grey levels are refused: see `has_grey_levels` in label_maps.py.
    - A mask file of one object has it at all pixels other than 0. In a mask of grey levels, the object has the pixels
      that are at least half as bright as the brightest.
    - NAME may be in subfolders. Images and masks may have any format that Pillow reads; suffixes match in any case.
    - The masks of `NAME.jpg` may also be called `NAME.jpg.png`, `NAME_mask.png` or `NAME.jpg_mask.png`, and their
      folder accordingly, or `NAME_masks`. Masks have the size of their image.
    - `samlight segment folder/images --out folder/masks` writes `--format labels` or `--format png` so. Its masks
      belong to the image as its EXIF orientation turns it; those of other programs belong to the stored pixels, unless
      only the other orientation has their size.

    The id of a sample is the path of the image within `images`.

    Args:
        folder: the folder that has `images` and `masks`.
        limit: read the first `limit` images only, not counting those skipped while indexing; by default all.
        ignore_label: label that is no object in label maps; None if there is none. "auto" ignores 255 if the other
            labels of the map are between 1 and 126, as in VOC and Cityscapes, and counts this in the report. In a map
            of 0 and 255 only, 255 is an object.
        binary_masks: read each file as one object with grey edges: the pixels at least half as bright as the brightest.

    Raises:
        ValueError: if one of the folders does not exist, or no image has masks.

    Example:
        >>> dataset = MaskFolderDataset("mine")
        >>> dataset[0].masks()  # bool (num_instances, height, width)
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
        files: list[str] = []
        masks_of_files: list[str] = []
        names: set[str] = set()
        for file in images:
            name, masks_of_file = os.path.splitext(file)[0], masks.get(file, set())
            if len(masks_of_file) == 1:
                files.append(file)
                masks_of_files += masks_of_file
            elif masks_of_file:
                self.index_report.add_image(SkipReason.SEVERAL_MASKS, f"{file} ({', '.join(sorted(masks_of_file))})")
            else:
                reason = SkipReason.DUPLICATE_IMAGE if name in names else SkipReason.MISSING_MASK
                self.index_report.add_image(reason, file)
            names.add(name)
            if len(files) == limit:
                break
        else:
            for mask in orphans:
                self.index_report.add_image(SkipReason.MISSING_IMAGE, mask)
        self._masks = np.array(masks_of_files, dtype=str)
        self._set_files(files)

    def mask_files(self) -> list[Path]:
        """List all mask files, sorted, including those without an image."""
        return _mask_files(self.mask_folder, "**/*")

    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        path = self.mask_folder / str(self._masks[index])
        if not path.is_dir():
            labels, void = self._read(read_labels, path)
            segments: dict[int | str, dict] = dict(_runs_of_labels(labels))
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
        annotations: list = [{"id": key, "segmentation": runs} for key, runs in segments.items()]
        if void is not None:
            annotations.append(SampleError(SkipReason.VOID_LABEL))
        return annotations, (width, height)

    def _are_upright(self, index: int) -> bool:
        path = self.mask_folder / str(self._masks[index])
        return (path / TABLE_NAME).is_file() if path.is_dir() else is_named_label_map(path)

    def _read(self, read: Callable, path: Path):
        """Read a mask file by `read_labels` or `read_object`; errors name the file."""
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
    """List the image files that match a pattern, sorted, without hidden ones, such as the `._NAME` of macOS."""
    # Not find_images, which lists a file once: links to one mask file may belong to several images.
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in image_suffixes()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _masks_of(images: list[str], masks: list[Path]) -> tuple[dict[str, set[str]], list[str]]:
    """Assign mask files and folders of masks to images by name.

    An image of the same name takes precedence over one whose name the mask extends.

    Args:
        images, masks: paths of images and mask files within their folders.

    Returns:
        The mask file or folder of masks of each image that has any: several if the names are ambiguous; and the mask
        files that belong to no image.
    """
    owners: dict[str, str] = {}
    for ending in ("", "_mask"):
        for name_of in (lambda file: os.path.splitext(file)[0], str):
            for file in images:
                owners.setdefault(name_of(file) + ending, file)
    masks_of_images: dict[str, set[str]] = {}
    orphans = []
    for mask in masks:
        file, folder = mask.as_posix(), mask.parent.as_posix()
        if owner := owners.get(os.path.splitext(file)[0]):
            masks_of_images.setdefault(owner, set()).add(file)
        elif owner := owners.get(folder) or owners.get(folder.removesuffix("_masks")):
            masks_of_images.setdefault(owner, set()).add(folder)
        else:
            orphans.append(file)
    return masks_of_images, orphans


def _relative_paths(folder: Path) -> list[str]:
    """List the images in a folder and its subfolders, sorted, as paths within it."""
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
    """Encode a label map in one pass over its pixels: yield (label, uncompressed COCO RLE) of each label except 0."""
    height, width = labels.shape
    pixels = labels.T.ravel()  # column by column, the order of RLE
    starts = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])
    ends = np.append(starts[1:], pixels.size)
    values = pixels[starts]
    for label in np.unique(values[values != 0]).tolist():
        is_label = values == label
        edges = np.stack([starts[is_label], ends[is_label]], axis=1).ravel()
        runs = np.diff(edges, prepend=0, append=pixels.size)
        yield int(label), {"size": [height, width], "counts": runs.tolist()}
