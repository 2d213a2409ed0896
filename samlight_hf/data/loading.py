"""Open the dataset that a path, a pattern or a name refers to."""

import os
from collections.abc import Sequence
from typing import Literal

from .coco import CocoDataset
from .dataset import ImageDataset
from .folders import ImageFolderDataset, MaskFolderDataset
from .sa1b import Sa1bDataset


def load_dataset(
    name_or_path: str | os.PathLike | Sequence[str | os.PathLike],
    annotations: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    limit: int | None = None,
    require_masks: bool = True,
    ignore_label: int | Literal["auto"] | None = "auto",
    binary_masks: bool = False,
) -> ImageDataset:
    """Open a dataset with the reader that fits the arguments.

    - `load_dataset("sa_000000.tar")`, a folder of tars, a pattern or a sequence of these: `Sa1bDataset`.
    - `load_dataset("instances_val2017.json", images="val2017")`: `CocoDataset`, for COCO, LVIS and other JSON files in
      this format.
    - `load_dataset("val2017", annotations="instances_val2017.json")`: the same, folder first.
    - `load_dataset("mine")`, a folder with `images` and `masks`: `MaskFolderDataset`.
    - `load_dataset("photos", require_masks=False)`, a folder of images: `ImageFolderDataset`.
    - `load_dataset("coco" or "lvis", annotations=..., images=...)`, `load_dataset("sa1b", images="*.tar")`: by name.

    Args:
        name_or_path: "coco", "lvis" or "sa1b"; or a path, a pattern or a sequence of these.
        annotations: the annotation JSON, if it is not the first argument.
        images: the folder of images or the tars, if they are not the first argument.
        limit: read the first `limit` images only; by default all.
        require_masks: raise an error for a folder without masks.
        ignore_label, binary_masks: how mask files are read, see `MaskFolderDataset`; unused by other readers.

    Raises:
        ValueError: if the arguments describe no dataset, or if it cannot be read.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        if annotations is not None or images is not None:
            raise ValueError("Several paths are tars of SA-1B, which take neither annotations nor images.")
        return Sa1bDataset(name_or_path, limit)
    name = os.fspath(name_or_path)
    if name == "sa1b":
        if images is None or annotations is not None:
            raise ValueError('"sa1b" needs images=, its tars, and takes no annotations: they are in the tars.')
        return Sa1bDataset(images, limit)
    if name in ("coco", "lvis"):
        if annotations is None or images is None:
            raise ValueError(f'"{name}" needs annotations=, its JSON, and images=, the folder of its images.')
        return CocoDataset(annotations, images, limit)
    if name.lower().endswith(".json"):
        if images is None or annotations is not None:
            raise ValueError(f"{name}: an annotation JSON needs images=, the folder of its images, and nothing else.")
        return CocoDataset(name, images, limit)
    if annotations is not None:
        if images is not None:
            raise ValueError(f"{name}: give the folder of images once, as the first argument or as images=.")
        return CocoDataset(annotations, name, limit)
    if images is not None:
        raise ValueError(f'{name}: images= goes with an annotation JSON or with the names "coco", "lvis" and "sa1b".')
    if not os.path.isdir(name) or any(entry.name.endswith(".tar") for entry in os.scandir(name)):
        return Sa1bDataset(name, limit)
    if all(os.path.isdir(os.path.join(name, part)) for part in ("images", "masks")):
        return MaskFolderDataset(name, limit, ignore_label, binary_masks)
    return _image_folder(name, limit, require_masks)


def _image_folder(folder: str, limit: int | None, require_masks: bool) -> ImageFolderDataset:
    if require_masks:
        raise ValueError(
            f"{folder}: a folder with neither *.tar files nor the folders images and masks. For a folder of images, "
            "give annotations= too, or require_masks=False where no masks are needed."
        )
    return ImageFolderDataset(folder, limit)
