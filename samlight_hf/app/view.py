"""What the page shows of a session, as JSON: image and masks as small PNGs that the browser tints and lays over it."""

import base64
import io

import numpy as np
from PIL import Image

from ..masks.boxes import mask_extent
from ..masks.drawing import COLOURS
from ..masks.results import GeneratedMasks
from .session import Session


LONGEST_SIDE = 1400  # of the image in the page, in pixels
_FILL, _EDGE = 120, 255  # opacity in everything mode, of 255


def view(session: Session, known: frozenset[int] = frozenset(), with_image: bool = False) -> dict:
    """Return a session as the page draws it.

    Args:
        session: With an image.
        known: Numbers of objects whose masks the page has already.
        with_image: Include the image, which the page keeps.
    """
    with session.lock:
        state = session.state
        width, height = session.image.size
        size = fit(session.image.size)
        candidates = []
        if state.candidates is not None:
            found = state.candidates
            for title, mask, score in zip(found.titles, found.masks, found.scores.tolist()):
                candidates.append({"title": title, "score": score, "mask": mask_uri(mask, size)})
        objects = [
            {
                "number": kept.number, "name": kept.name, "colour": kept.colour, "is_visible": kept.is_visible,
                "score": kept.score, "mask": None if kept.number in known else mask_uri(kept.mask, size),
            }
            for kept in state.objects
        ]  # fmt: skip
        everything = state.everything
        return {
            "image": {
                "id": session.key, "name": session.name, "width": width, "height": height,
                "uri": image_uri(session.image) if with_image else None,
            },
            "points": [list(point) for point in state.prompt.points],
            "box": state.prompt.box_xyxy,
            "candidates": candidates, "chosen": state.chosen or 0, "colour": session.next_colour(),
            "objects": objects,
            "everything": None if everything is None else {
                "count": len(everything), "picture": everything_uri(everything, size), "ms": session.everything_ms,
            },
            "can_undo": session.can_undo, "encode_ms": session.encode_ms, "decode_ms": session.decode_ms,
            "message": None, "download": None,
        }  # fmt: skip


def summary(session: Session) -> dict:
    """Return the present masks of a session for programs: run lengths, scores and boxes, without drawings."""
    with session.lock:
        state, candidates = session.state, []
        if state.candidates is not None:
            found = state.candidates
            for title, mask, rle, score in zip(
                found.titles, found.masks, found.masks.to_coco(), found.scores.tolist(), strict=True
            ):
                candidates.append({
                    "title": title, "score": score, "segmentation": rle, "area": int(mask.sum()),
                    "box_xyxy": list(mask_extent(mask) or (0, 0, 0, 0)),
                })  # fmt: skip
        objects = [
            {"number": kept.number, "name": kept.name, "colour": kept.colour, "score": kept.score}
            for kept in state.objects
        ]
        return {
            "width": session.image.width, "height": session.image.height,
            "candidates": candidates, "chosen": state.chosen if candidates else None, "objects": objects,
            "encode_ms": session.encode_ms, "decode_ms": session.decode_ms,
        }  # fmt: skip


TABLE_COLUMNS = ("mask", "predicted IoU", "stability", "area, px", "area, %", "x", "y", "width", "height")


def table(result: GeneratedMasks) -> list[list[float]]:
    """Return a row for each mask of everything mode, as `TABLE_COLUMNS` says."""
    areas, num_pixels = result.masks.areas.tolist(), result.masks.height * result.masks.width
    rows = []
    columns = (areas, result.scores.tolist(), result.stability_scores.tolist(), result.boxes_xyxy.tolist())
    for number, (area, score, stability, (x1, y1, x2, y2)) in enumerate(zip(*columns), 1):
        share = round(100 * area / num_pixels, 2)
        rows.append([number, round(score, 3), round(stability, 3), area, share, *map(int, (x1, y1, x2 - x1, y2 - y1))])
    return rows


def fit(size: tuple[int, int], longest: int = LONGEST_SIDE) -> tuple[int, int]:
    """Return (width, height) with a longest side of at most `longest`, and no side of 0."""
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def image_uri(image: Image.Image, longest: int = LONGEST_SIDE) -> str:
    """Return an image as a data URI for a page."""
    small = image.resize(fit(image.size, longest), Image.Resampling.LANCZOS)
    return _uri(small, "JPEG", quality=88)


def mask_uri(mask: np.ndarray, size: tuple[int, int]) -> str:
    """Return a mask, bool (H, W), at `size` (width, height): white inside, transparent outside, one bit a pixel."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return _uri(image.point(lambda level: 255 * (level > 127), mode="1"), "PNG", transparency=0)


def everything_uri(result: GeneratedMasks, size: tuple[int, int]) -> str:
    """Return all masks as one transparent drawing with outlines, small masks above large ones."""
    labels = np.zeros(size[::-1], dtype=np.uint16)
    for rank, index in enumerate(np.argsort(-result.masks.areas, kind="stable").tolist()):
        mask = Image.fromarray(result.masks[index].astype(np.uint8) * 255)
        labels[np.asarray(mask.resize(size, Image.Resampling.BILINEAR)) > 127] = rank + 1
    edges = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        for shift in (-1, 1):
            edges |= labels != np.roll(labels, shift, axis)
    colours = np.array([(0, 0, 0), *COLOURS], dtype=np.uint8)
    levels = np.empty((*labels.shape, 4), dtype=np.uint8)
    levels[..., :3] = colours[np.where(labels > 0, (labels - 1) % len(COLOURS) + 1, 0)]
    levels[..., 3] = np.where(labels > 0, np.where(edges, _EDGE, _FILL), 0)
    return _uri(Image.fromarray(levels), "PNG", compress_level=3)


def _uri(image: Image.Image, file_format: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
