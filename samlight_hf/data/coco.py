"""Read COCO, LVIS and other data sets in COCO's JSON format, with a folder of images."""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..utils.json_files import read_json
from .annotations import annotation_id, matching_id
from .dataset import FileDataset, check_limit
from .samples import SampleError, SkipReason, SkipReport


class CocoDataset(FileDataset):
    """Reader of an annotation file in COCO format, such as those of COCO and LVIS.

    The JSON has `images` with `id` and `file_name`, and `annotations` with `image_id` and `segmentation`: polygons,
    uncompressed or compressed RLE. Images are in the order of the JSON. The id of a sample is the image id as a string.

    Images are found in `image_folder` by the whole `file_name`, by its last folder and name
    (`val2017/000000000139.jpg`), or by its name only. Windows paths (`C:\\data\\val2017\\139.jpg`) are read too. An
    image without `file_name`, as in LVIS v1, is found by its `coco_url`.

    Args:
        annotation_json: the annotation file.
        image_folder: the folder of the images.
        limit: read the first `limit` images only, not counting those skipped while indexing; by default all.

    Raises:
        ValueError: if the file cannot be read or has another format, or if no image is found.

    Example:
        >>> dataset = CocoDataset("annotations/instances_val2017.json", "val2017")
        >>> dataset[0].instances[0].category_id
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
        # One string for each image: forked workers copy the memory pages of Python objects when they count references.
        self._json = [json.dumps(by_image[image_id]) for image_id in self._ids]
        self._check_not_empty(str(annotation_json))

    @property
    def ids(self) -> list[int | str]:
        """Image ids in order, with the types of the JSON."""
        return list(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def _index_images(self, images: list, limit: int | None) -> tuple[set, set]:
        """Fill the index of images; return the ids of all images, and of the skipped ones."""
        known, skipped = set(), set()
        for image in images:
            image_id, name = annotation_id(image), _image_name(image)
            if len(self._ids) == limit:  # still known, so that their annotations do not count as skipped
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
        """Group annotations by indexed image. Duplicate ids are found here: ids are unique in the whole file."""
        by_image: dict[int | str, list] = {image_id: [] for image_id in self._ids}
        ids = set()
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
                if identifier in ids:
                    self.index_report.add_instances(SkipReason.DUPLICATE_ANNOTATION, where)
                    continue
                if identifier is not None:  # annotations without an id are numbered when they are read
                    ids.add(identifier)
                by_image[image_id].append(annotation)
        return by_image

    def _find_image(self, name: str) -> str | None:
        """Find an image by name; return its path within the folder, or None."""
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

    def annotated_indices(self) -> list[int]:
        return [index for index, annotations in enumerate(self._json) if annotations != "[]"]

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
    """Return the `file_name` of an image, or the path of its `coco_url`, or None."""
    if not isinstance(image, dict):
        return None
    name = image.get("file_name")
    if not name and isinstance(url := image.get("coco_url"), str):
        name = url.partition("://")[2].partition("/")[2]
    return name if isinstance(name, str) and PurePosixPath(name).name else None


def _read_json(path: Path) -> tuple[list, list]:
    """Read (images, annotations) from a JSON in COCO format."""
    content = read_json(path)
    if isinstance(content, list):
        raise ValueError(f"{path}: a list, as results files are. An annotation file has 'images' and 'annotations'.")
    images, annotations = (content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError(f"{path}: not of COCO's shape, an object with the lists 'images' and 'annotations'.")
    return images, annotations
