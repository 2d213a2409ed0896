"""Masks in the formats of other tools: label maps, Ultralytics' YOLO lines and labelme's documents.

A polygon has its vertices at the centres of pixels, as OpenCV traces outlines. YOLO's and labelme's loaders draw the
outline of a polygon as well as its inside, so that they get the traced pixels back, and no others.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from .boxes import mask_extent
from .rle import RunLengthMasks


MAX_LABEL = np.iinfo(np.uint16).max
_LABELME_VERSION = "5.5.0"  # of the format, which later versions read; 5.2 added the field "mask"


def label_map(masks: np.ndarray | RunLengthMasks | Sequence[np.ndarray], scores: Sequence[float]) -> np.ndarray:
    """Paint masks into one map of labels. Where masks overlap, a pixel has the label of the highest score.

    Args:
        masks: n masks of one size, bool (H, W).
        scores: (n,), such as the predicted IoU. Of equal ones the first mask wins.

    Returns:
        uint16 (H, W): 0 outside all masks, and i + 1 in `masks[i]`. A mask below others may have no pixel.

    Raises:
        ValueError: for more masks than labels, for another number of scores, and for an empty list, which has no size.
    """
    if len(masks) > MAX_LABEL:
        raise ValueError(f"{len(masks):,} masks do not fit into a label map of 16 bits: keep at most {MAX_LABEL:,}.")
    if len(scores) != len(masks):
        raise ValueError(f"there are {len(scores)} scores and {len(masks)} masks: each mask needs one.")
    labels = np.zeros(_size_of(masks), dtype=np.uint16)
    for index in np.argsort(-np.asarray(scores, dtype=float), kind="stable")[::-1].tolist():
        labels[np.asarray(masks[index], dtype=bool)] = index + 1
    return labels


def polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the outline of a mask: one polygon for each connected part, the largest first.

    Pixels that touch at a corner are connected. A hole is a part of the ring: a line that runs there and back through
    pixels of the mask joins it to the outline, so that neither an outline that is filled nor one that is drawn changes
    a pixel.

    Args:
        mask: bool (H, W).

    Returns:
        float64 (k, 2) for each part, with k of at least 3: x and y in pixels of the image, where the centre of the
        first pixel is (0.5, 0.5). The last vertex is joined to the first.

    Raises:
        ImportError: without OpenCV, see `require_opencv`.
    """
    cv2 = require_opencv()
    mask = np.asarray(mask, dtype=bool)
    extent = mask_extent(mask)
    if extent is None:
        return []
    x1, y1, x2, y2 = extent
    part = mask[y1:y2, x1:x2]
    # Two levels: outlines, and the outlines of holes, each with the one that it lies in as parent (last column).
    outlines, tree = cv2.findContours(part.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outlines, parents = [outline.reshape(-1, 2) for outline in outlines], tree.reshape(-1, 4)[:, 3]
    rings = []
    for index in np.flatnonzero(parents < 0).tolist():
        ring = outlines[index]
        holes = [outlines[hole] for hole in np.flatnonzero(parents == index).tolist()]
        for hole in sorted(holes, key=lambda hole: hole[:, 0].min()):  # what lies to the left of it is joined already
            ring = _join_hole(ring, hole, part)
        rings.append(_corners(ring) + np.array([x1 + 0.5, y1 + 0.5]))
    return sorted(rings, key=_box_area, reverse=True)


def yolo_lines(masks: Iterable[np.ndarray], class_ids: Sequence[int], size: tuple[int, int]) -> list[str]:
    """Return Ultralytics' lines for segmentation: a class and one polygon, as fractions of width and height.

    The format has one polygon for each object, so that parts which are not connected are joined by lines from one
    vertex to another, there and back, as in Ultralytics' own conversion of COCO: they are one pixel wide where drawn.

    Args:
        masks: n masks, bool (H, W). An empty one has no line.
        class_ids: (n,), the class of each, from 0.
        size: (width, height) of the image.

    Returns:
        The lines, without line breaks.

    Raises:
        ImportError: without OpenCV, see `require_opencv`.
    """
    lines = []
    for mask, class_id in zip(masks, class_ids, strict=True):
        rings = polygons(mask)
        if rings:
            numbers = (_join_parts(rings) / size).ravel().tolist()
            lines.append(" ".join([str(int(class_id)), *(f"{number:.6f}" for number in numbers)]))
    return lines


def labelme_document(
    masks: Iterable[np.ndarray], labels: Sequence[str], size: tuple[int, int], image_name: str
) -> dict:
    """Return labelme's document of one image, without the image's data.

    Args:
        masks: n masks, bool (H, W). An empty one has no shape. The parts of one that is not connected are shapes of
            one `group_id`, which labelme's converters put together.
        labels: (n,), the name of each mask's class.
        size: (width, height) of the image.
        image_name: the image's path, from the folder of the document: labelme opens it there.

    Returns:
        A dict for JSON.

    Raises:
        ImportError: without OpenCV, see `require_opencv`.
    """
    shapes = []
    for index, (mask, label) in enumerate(zip(masks, labels, strict=True)):
        rings = polygons(mask)
        for ring in rings:
            shapes.append({
                "label": label, "points": ring.tolist(), "group_id": index if len(rings) > 1 else None,
                "description": "", "shape_type": "polygon", "flags": {}, "mask": None,
            })  # fmt: skip
    return {
        "version": _LABELME_VERSION, "flags": {}, "shapes": shapes, "imagePath": image_name, "imageData": None,
        "imageHeight": size[1], "imageWidth": size[0],
    }  # fmt: skip


def require_opencv():
    """Return the module cv2. Raises ImportError, which says what to install, where there is none."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError('outlines of masks need OpenCV: pip install "samlight-hf[polygons]".') from error
    return cv2


def _size_of(masks) -> tuple[int, ...]:
    """Return (height, width) of masks, also where there is none."""
    if isinstance(masks, RunLengthMasks):
        return masks.height, masks.width
    shape = tuple(masks.shape[1:] if hasattr(masks, "shape") else np.shape(masks[0]) if len(masks) else ())
    if len(shape) != 2:
        raise ValueError("masks must be bool (n, H, W), or a list of at least one mask, bool (H, W).")
    return shape


def _join_hole(ring: np.ndarray, hole: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Join the outline of a hole to the outline that is next to the left of its first column, along a row of pixels."""
    start = int(hole[:, 0].argmin())
    x, y = hole[start].tolist()
    outside = np.flatnonzero(~mask[y, :x])
    end = int(outside[-1]) + 1 if len(outside) else 0  # its left neighbour is outside, so an outline passes here
    place = np.flatnonzero((ring[:, 0] == end) & (ring[:, 1] == y))[0]
    return _insert(ring, int(place), hole, start)


def _join_parts(rings: list[np.ndarray]) -> np.ndarray:
    """Join rings into one, each to a near vertex of those before."""
    joined = rings[0]
    for ring in rings[1:]:
        place = int(((joined - ring.mean(axis=0)) ** 2).sum(axis=1).argmin())
        start = int(((ring - joined[place]) ** 2).sum(axis=1).argmin())
        joined = _insert(joined, place, ring, start)
    return joined


def _insert(ring: np.ndarray, place: int, other: np.ndarray, start: int) -> np.ndarray:
    """Go along `ring` to `place`, from there to `start` of `other`, around it, and back to `place`."""
    return np.concatenate([ring[: place + 1], other[start:], other[: start + 1], ring[place:]])


def _corners(ring: np.ndarray) -> np.ndarray:
    """Drop the vertices at which a ring goes straight on; at least three are left, if need be the same one again."""
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)] if len(ring) > 1 else ring
    directions = np.sign(np.roll(ring, -1, axis=0) - ring)
    ring = ring[(directions != np.roll(directions, 1, axis=0)).any(axis=1) | (len(ring) < 3)]
    return np.concatenate([ring, ring[-1:].repeat(max(0, 3 - len(ring)), axis=0)])


def _box_area(ring: np.ndarray) -> float:
    return float(np.prod(ring.max(axis=0) - ring.min(axis=0) + 1))
