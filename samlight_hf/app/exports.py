"""Files to download: the shown objects of a session in the formats of other tools, as bytes and never on the disk."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..masks.boxes import mask_extent
from ..masks.formats import label_map, labelme_document, yolo_lines
from .session import Session, SessionError
from .state import KeptObject


@dataclass(frozen=True)
class Download:
    """A file.

    Attributes:
        name: As the browser saves it.
        media_type: Such as "image/png".
        content: The bytes.
    """

    name: str
    media_type: str
    content: bytes


def export(session: Session, file_format: str) -> Download:
    """Write the shown objects of a session, and its current mask.

    Args:
        session: With at least one mask.
        file_format: "png", a PNG mask, 255 inside, or a zip of them where there are several; "labels", a PNG of 16 bits
            with the number of each object, by score where they overlap; "coco", JSON with run lengths; "yolo", a zip
            with Ultralytics' lines and data.yaml; "labelme", JSON with polygons; "cutout", the image as RGBA, cut to
            the masks' box and transparent beside the masks.

    Raises:
        SessionError: For another format, and where there is no mask.
    """
    if file_format not in WRITERS:
        raise SessionError(f"{str(file_format)[:40]!r} is no format. Use one of {', '.join(WRITERS)}.")
    objects = session.shown_objects()
    if not objects:
        raise SessionError("there is nothing to download yet: click on an object, or draw a box.")
    return WRITERS[file_format](session, objects)


def class_names(objects: list[KeptObject]) -> list[str]:
    """Return the names of objects, each once, in the order of the list: the classes of a file."""
    return list(dict.fromkeys(kept.name for kept in objects))


def coco_document(session: Session, objects: list[KeptObject]) -> dict:
    """Return COCO's document of the image: a category for each name, masks as run lengths."""
    width, height = session.image.size
    names = class_names(objects)
    annotations = []
    for index, kept in enumerate(objects):
        x1, y1, x2, y2 = mask_extent(kept.mask) or (0, 0, 0, 0)
        annotations.append({
            "id": index + 1, "image_id": 1, "category_id": names.index(kept.name) + 1, "iscrowd": 0,
            "segmentation": kept.masks.to_coco()[0], "area": int(kept.masks.areas[0]),
            "bbox": [x1, y1, x2 - x1, y2 - y1], "predicted_iou": round(kept.score, 6),
        })  # fmt: skip
    return {
        "images": [{"id": 1, "file_name": session.name, "width": width, "height": height}],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(names)],
    }


def _write_masks(session: Session, objects: list[KeptObject]) -> Download:
    files = [_png(Image.fromarray(kept.mask)) for kept in objects]  # bool: one bit a pixel
    if len(files) == 1:
        return Download(f"{session.stem}_mask.png", "image/png", files[0])
    names = [f"{number:03}_{_file_name(kept.name)}.png" for number, kept in enumerate(objects, 1)]
    return Download(f"{session.stem}_masks.zip", "application/zip", _zip(dict(zip(names, files))))


def _write_labels(session: Session, objects: list[KeptObject]) -> Download:
    labels = label_map([kept.mask for kept in objects], [kept.score for kept in objects])
    return Download(f"{session.stem}_labels.png", "image/png", _png(Image.fromarray(labels)))


def _write_coco(session: Session, objects: list[KeptObject]) -> Download:
    return Download(f"{session.stem}_coco.json", "application/json", _json(coco_document(session, objects)))


def _write_yolo(session: Session, objects: list[KeptObject]) -> Download:
    names = class_names(objects)
    lines = yolo_lines(
        [kept.mask for kept in objects], [names.index(kept.name) for kept in objects], session.image.size
    )
    settings = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(names))}
    files = {
        f"labels/{session.stem}.txt": "".join(f"{line}\n" for line in lines).encode(),
        "data.yaml": _json(settings),  # JSON is YAML, and names need no quoting rules of their own
    }
    return Download(f"{session.stem}_yolo.zip", "application/zip", _zip(files))


def _write_labelme(session: Session, objects: list[KeptObject]) -> Download:
    document = labelme_document(
        [kept.mask for kept in objects], [kept.name for kept in objects], session.image.size, session.name
    )
    return Download(f"{session.stem}.json", "application/json", _json(document))


def _write_cutout(session: Session, objects: list[KeptObject]) -> Download:
    mask = np.logical_or.reduce([kept.mask for kept in objects])
    extent = mask_extent(mask)
    if extent is None:
        raise SessionError("the masks are empty: there is nothing to cut out.")
    image = session.image.convert("RGB")
    image.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
    return Download(f"{session.stem}_cutout.png", "image/png", _png(image.crop(extent)))


WRITERS: dict[str, Callable[[Session, list[KeptObject]], Download]] = {
    "png": _write_masks, "labels": _write_labels, "coco": _write_coco, "yolo": _write_yolo, "labelme": _write_labelme,
    "cutout": _write_cutout,
}  # fmt: skip


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def _json(document: dict) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name) or "object"
