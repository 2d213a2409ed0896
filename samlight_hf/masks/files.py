"""Masks of an image as files of several formats, and COCO's JSON of many images; each is written atomically."""

import csv
import errno
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
from PIL import Image, PngImagePlugin

from ..utils.atomic_files import atomic_write, replace_folder
from ..utils.json_files import read_json
from .drawing import draw_overlay
from .formats import label_map, labelme_document, yolo_lines
from .results import GeneratedMasks, MaskResult
from .rle import RunLengthMasks


# The end of a result's name, behind that of the image. One without a suffix is a folder.
ENDINGS = {
    "overlay": "_masks.png", "png": "_masks", "labels": ".png", "coco": ".json", "labelme": ".json", "yolo": ".txt",
    "npz": ".npz",
}  # fmt: skip
POLYGON_FORMATS = ("labelme", "yolo")  # which need OpenCV
CATEGORY = "object"  # of all masks: their class is not known
# In the PNG, and beside PNGs: by them `samlight_hf.data` knows masks of the image as its EXIF orientation turns it, and
# by the first also that a label map has no grey levels.
LABEL_MAP_TITLE, TABLE_NAME = "label map", "masks.csv"


def write_masks(
    path: Path,
    file_format: str,
    image: Image.Image,
    image_name: str,
    result: GeneratedMasks | MaskResult,
    boxes_xyxy=(),
    points_xy=(),
) -> int:
    """Write the masks of an image as a file or a folder; an interruption leaves the earlier one as it was.

    Args:
        path: where it is written; its name ends as `ENDINGS` says.
        file_format: "overlay", the image with masks and prompts; "png", a folder of 0000.png and so on, 255 inside,
            with masks.csv; "labels", a PNG of 16 bits, see `label_map`; "coco", `images`, `annotations` and
            `categories` of one image, with SA-1B's fields; "labelme" and "yolo", polygons; "npz", the arrays of the
            result, with masks as bool (n, H, W).
        image: for an overlay, and for its size.
        image_name: the image's name in COCO's JSON, and its path from the folder of labelme's document.
        result: masks of the image.
        boxes_xyxy: box prompts that an overlay shows, in pixels of the image.
        points_xy: point prompts that an overlay shows, (x, y) or (x, y, label), in pixels of the image.

    Returns:
        The number of masks that the file lacks: those that others cover in a label map, and polygons of empty masks.

    Raises:
        OSError: if it cannot be written.
        ImportError: for polygons without OpenCV.
    """
    if file_format == "overlay":
        overlay = draw_overlay(image, result, boxes_xyxy, points_xy)
        atomic_write(path, lambda aside: overlay.save(aside, format="PNG", compress_level=4))
    elif file_format == "png":
        _write_folder(path, result)
    elif file_format == "labels":
        labels = label_map(result.masks, result.scores.tolist())
        atomic_write(path, lambda aside: save_label_map(aside, labels))
        return len(result) - int(np.count_nonzero(np.unique(labels)))
    elif file_format in ("coco", "labelme", "yolo"):
        text = _text(file_format, image_name, image.size, result)
        atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))
        if file_format in POLYGON_FORMATS:
            return sum(not mask.any() for mask in result.masks)
    else:
        arrays = {"masks": _pixels(result), **_columns(result)}
        atomic_write(path, lambda aside: _save_arrays(aside, arrays))
    return 0


def save_label_map(file: Path | BinaryIO, labels: np.ndarray):
    """Write a label map as PNG, with a title by which training takes it for one, whatever its numbers look like.

    Args:
        file: a path, or a file that is open for writing.
        labels: uint16 (H, W), see `label_map`.
    """
    note = PngImagePlugin.PngInfo()
    note.add_text("Title", LABEL_MAP_TITLE)
    Image.fromarray(labels).save(file, format="PNG", pnginfo=note)


def _text(file_format: str, image_name: str, size: tuple[int, int], result: GeneratedMasks | MaskResult) -> str:
    if file_format == "coco":
        return coco_text(image_name, size, result)
    if file_format == "labelme":
        return json.dumps(labelme_document(result.masks, [CATEGORY] * len(result), size, image_name))
    return "".join(f"{line}\n" for line in yolo_lines(result.masks, [0] * len(result), size))


def coco_text(image_name: str, size: tuple[int, int], result: GeneratedMasks | MaskResult) -> str:
    """Return `coco_document` as JSON, in less time than `json.dumps` takes to write the same.

    While it runs, other threads of the process do not, and one of them keeps the GPU at work.
    """
    columns = {name: values.astype(np.float64) for name, values in _columns(result).items()}
    if not all(np.isfinite(values).all() for values in columns.values()):  # `json` spells NaN and inf in its own way
        return json.dumps(coco_document(image_name, size, result))
    form = _ANNOTATION
    parts = [_as_xywh(columns["boxes_xyxy"]), columns["scores"][:, None]]
    if "points_xy" in columns:
        form += _OF_EVERYTHING
        parts += [columns["stability_scores"][:, None], columns["points_xy"], _as_xywh(columns["crop_boxes_xyxy"])]
    masks = _run_lengths(result)
    form = form.replace("SIZE", f"{masks.height}, {masks.width}") + "}"
    rows = zip(masks.to_coco(), masks.areas.tolist(), np.concatenate(parts, axis=1).tolist())
    # The backslash is the only character of run lengths that JSON escapes.
    annotations = [
        form % (number, rle["counts"].replace("\\", "\\\\"), area, *numbers)
        for number, (rle, area, numbers) in enumerate(rows, start=1)
    ]
    # In the image's name, the quotes of this key would be escaped.
    before, key, after = json.dumps(_document(image_name, size, [])).partition('"annotations": [')
    return f"{before}{key}{', '.join(annotations)}{after}"


# JSON of an annotation, as `coco_document` makes it, for %.
_ANNOTATION = (
    '{"id": %d, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": {"size": [SIZE], "counts": "%s"}, '
    '"area": %d, "bbox": [%r, %r, %r, %r], "predicted_iou": %r'
)
_OF_EVERYTHING = ', "stability_score": %r, "point_coords": [[%r, %r]], "crop_box": [%r, %r, %r, %r]'


def _as_xywh(boxes_xyxy: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def _run_lengths(result: GeneratedMasks | MaskResult) -> RunLengthMasks:
    return result.masks if isinstance(result.masks, RunLengthMasks) else RunLengthMasks.from_masks(result.masks)


def coco_document(image_name: str, size: tuple[int, int], result: GeneratedMasks | MaskResult) -> dict:
    """Return COCO's document of one image, `size` (width, height), with its masks; boxes are x, y, width, height."""
    masks, annotations = _run_lengths(result), []
    columns = {name: values.tolist() for name, values in _columns(result).items()}
    for index, (rle, area) in enumerate(zip(masks.to_coco(), masks.areas.tolist())):
        x1, y1, x2, y2 = columns["boxes_xyxy"][index]
        annotation = {
            "id": index + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": rle, "area": area,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "predicted_iou": columns["scores"][index],
        }  # fmt: skip
        if "points_xy" in columns:
            x1, y1, x2, y2 = columns["crop_boxes_xyxy"][index]
            annotation |= {
                "stability_score": columns["stability_scores"][index], "point_coords": [columns["points_xy"][index]],
                "crop_box": [x1, y1, x2 - x1, y2 - y1],
            }  # fmt: skip
        annotations.append(annotation)
    return _document(image_name, size, annotations)


def _document(image_name: str, size: tuple[int, int], annotations: list) -> dict:
    return {
        "images": [{"id": 1, "file_name": image_name, "width": size[0], "height": size[1]}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": CATEGORY}],
    }


def write_coco_of_many(path: Path, documents: Iterable[Path]):
    """Put the documents that `write_masks` wrote for single images into one, in which each id occurs once.

    Images are numbered from 1 in the order of the documents, and so are annotations. There is never more than one of
    the documents in memory.

    Args:
        path: where it is written; an interruption leaves the earlier file as it was.
        documents: paths of COCO's documents of one image.

    Raises:
        ValueError: for a document that is not one of `write_masks`; its path is in the message.
        OSError: if it cannot be written.
    """

    def write(aside: Path):
        with aside.open("w", encoding="utf-8") as file:
            _write_coco(file, documents)

    atomic_write(path, write)


def _write_coco(file: TextIO, documents: Iterable[Path]):
    images: list[dict] = []
    num_annotations = 0
    file.write('{"annotations": [')
    for path in documents:
        document = read_json(path, dict)
        try:
            (image,), annotations = document["images"], document["annotations"]
            images.append({**image, "id": len(images) + 1})
            for annotation in annotations:
                file.write(",\n" if num_annotations else "\n")
                num_annotations += 1
                json.dump({**annotation, "id": num_annotations, "image_id": len(images)}, file)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: is no COCO document of one image. Remove it, and run again.") from error
    file.write(f'],\n"images": {json.dumps(images)},\n')
    file.write(f'"categories": {json.dumps([{"id": 1, "name": CATEGORY}])}}}\n')


def _columns(result: GeneratedMasks | MaskResult) -> dict[str, np.ndarray]:
    return {name: values for name, values in vars(result).items() if name != "masks"}


def _pixels(result: GeneratedMasks | MaskResult) -> np.ndarray:
    return result.masks.to_masks() if isinstance(result.masks, RunLengthMasks) else result.masks


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]):
    with path.open("wb") as file:  # numpy would add a suffix to a name
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # it takes arrays by name


def _write_folder(path: Path, result: GeneratedMasks | MaskResult):
    def write(aside: Path):
        aside.mkdir()
        columns = _columns(result)
        with (aside / TABLE_NAME).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["file", "predicted_iou", "x1", "y1", "x2", "y2"])
            for index, mask in enumerate(result.masks):
                name = f"{index:04}.png"
                Image.fromarray(mask).save(aside / name, format="PNG")  # bool: one bit a pixel
                table.writerow([name, *(f"{v:g}" for v in (columns["scores"][index], *columns["boxes_xyxy"][index]))])

    if path.exists() and any(entry.is_dir() for entry in path.iterdir()):
        raise FileExistsError(errno.EEXIST, "it holds folders that are no masks", str(path))
    replace_folder(path, write)
