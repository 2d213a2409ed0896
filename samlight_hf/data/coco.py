"""COCO, LVIS and any JSON of COCO's shape, with its folder of images."""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..utils.json_files import read_json
from .annotations import annotation_id, matching_id
from .dataset import FileDataset, check_limit
from .samples import SampleError, SkipReason, SkipReport


class CocoDataset(FileDataset):
    """The images of a COCO-shaped JSON, in its order: `images` with `id` and `file_name`, `annotations` with `image_id`.

    Masks are polygons, uncompressed or compressed RLE. Where an image has no `file_name`, as in LVIS v1, the end of its
    `coco_url` is taken. An image is looked for in `image_folder` by its whole name, by its last folder and name
    (`val2017/000000000139.jpg`) and by its name alone, then by the same of the name as Windows writes it
    (`C:\\data\\val2017\\139.jpg`). The sample's id is the image id as a string.

    Args:
        annotation_json: the file.
        image_folder: the folder of the images.
        limit: only the first so many images, without those skipped while indexing.

    Raises:
        ValueError: for a file that is not there or not of this shape, and where no image is found.
    """

    def __init__(self, annotation_json: str | os.PathLike, image_folder: str | os.PathLike, limit: int | None = None):
        check_limit(limit)
        self.image_folder = Path(image_folder)
        if not self.image_folder.is_dir():
            raise ValueError(f"{image_folder}: no such folder of images.")
        images, annotations = _read_json(Path(annotation_json))
        self.index_report = SkipReport()
        self._ids: list[int | str] = []
        self._files: list[str] = []
        self._sizes: list[tuple[int, int] | None] = []
        known, skipped = self._index_images(images, limit)
        by_image = self._index_annotations(annotations, known, skipped)
        # One string for each image: worker processes would copy millions of small objects as they touch them.
        self._json = [json.dumps(by_image[image_id]) for image_id in self._ids]
        self._check_not_empty(str(annotation_json))

    @property
    def ids(self) -> list[int | str]:
        """The ids of the images, as the JSON has them, in order."""
        return list(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def _index_images(self, images: list, limit: int | None) -> tuple[set, set]:
        """Fills the index; the ids of all images, and of those that were skipped."""
        known, skipped = set(), set()
        for image in images:
            image_id, name = annotation_id(image), _image_name(image)
            if len(self._ids) == limit:  # the ids are still needed: the annotations of these images are no orphans
                known.add(image_id)
                continue
            file = None if name is None else self._find_image(name)
            if image_id in known:
                self.index_report.add_image(SkipReason.DUPLICATE_IMAGE, str(image_id))
            elif image_id is None or file is None:
                reason = SkipReason.MALFORMED_IMAGE if image_id is None or name is None else SkipReason.MISSING_IMAGE
                self.index_report.add_image(reason, f"{image_id} ({name})")
                skipped.add(image_id)
            else:
                width, height = image.get("width"), image.get("height")
                self._ids.append(image_id)
                self._files.append(file)
                self._sizes.append((width, height) if isinstance(width, int) and isinstance(height, int) else None)
            if image_id is not None:
                known.add(image_id)
        return known, skipped

    def _index_annotations(self, annotations: list, known: set, skipped: set) -> dict[int | str, list]:
        """The annotations of each indexed image; ids are checked here, because they are unique in the whole file."""
        by_image: dict[int | str, list] = {image_id: [] for image_id in self._ids}
        seen = set()
        for position, annotation in enumerate(annotations):
            identifier = annotation_id(annotation)
            image_id = matching_id(annotation.get("image_id"), known) if isinstance(annotation, dict) else None
            where = f"annotation {position if identifier is None else identifier}"
            if image_id is None:
                self.index_report.add_instances(SkipReason.MALFORMED_ANNOTATION, where)
            elif image_id not in known:
                self.index_report.add_instances(SkipReason.UNKNOWN_IMAGE, f"{where} of image {image_id}")
            elif image_id in skipped:
                self.index_report.add_instances(SkipReason.IMAGE_SKIPPED, f"{where} of image {image_id}")
            elif image_id in by_image:
                if identifier in seen:
                    self.index_report.add_instances(SkipReason.DUPLICATE_ANNOTATION, where)
                    continue
                if identifier is not None:  # one without an id is numbered when it is read
                    seen.add(identifier)
                by_image[image_id].append(annotation)
        return by_image

    def _find_image(self, name: str) -> str | None:
        """The image's path within the folder."""
        names = [PurePosixPath(name).parts]
        if "\\" in name:
            windows = PureWindowsPath(name)
            names.append(windows.parts[bool(windows.anchor) :])  # without the drive
        for parts in names:
            for end in dict.fromkeys((parts, parts[-2:], parts[-1:])):
                file = os.path.join("", *end)
                if (self.image_folder / file).is_file():
                    return file
        return None

    def files(self) -> set:
        return {(self.image_folder / file).resolve() for file in self._files}

    def sample_id(self, index: int) -> str:
        return str(self._ids[index])

    def image_bytes(self, index: int) -> bytes:
        try:
            return (self.image_folder / self._files[index]).read_bytes()
        except FileNotFoundError as error:
            raise SampleError(SkipReason.MISSING_IMAGE) from error

    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        return json.loads(self._json[index]), self._sizes[index]


def _image_name(image) -> str | None:
    """`file_name`, or the part of `coco_url` behind the host, or None."""
    if not isinstance(image, dict):
        return None
    name = image.get("file_name")
    if not name and isinstance(url := image.get("coco_url"), str):
        name = url.partition("://")[2].partition("/")[2]
    return name if isinstance(name, str) and PurePosixPath(name).name else None


def _read_json(path: Path) -> tuple[list, list]:
    """(images, annotations) of a COCO-shaped JSON."""
    content = read_json(path)
    if isinstance(content, list):
        raise ValueError(f"{path}: a list, as results files are. An annotation file has 'images' and 'annotations'.")
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations")]
    if not all(isinstance(found, list) for found in lists):
        raise ValueError(f"{path}: not of COCO's shape, an object with the lists 'images' and 'annotations'.")
    return lists[0], lists[1]
