"""Annotations of one picture, as COCO and SA-1B write them in JSON, to instances with checked masks."""

import math
from functools import lru_cache

import numpy as np

from .samples import Instance, SampleError, SkipReason, SkipReport


def parse_instances(
    annotations: list, sample_id: str, width: int, height: int, report: SkipReport
) -> tuple[Instance, ...]:
    """The usable instances of a picture of `width` x `height` pixels; the others are added to `report`."""
    instances, seen = [], set()
    for position, annotation in enumerate(annotations):
        where = f"{sample_id}, annotation {annotation_id(annotation, default=f'number {position}')}"
        try:
            instance = parse_instance(annotation, width, height)
            if instance.id in seen:
                raise SampleError(SkipReason.DUPLICATE_ANNOTATION)
        except SampleError as error:
            report.add_instances(error.reason, where)
        else:
            seen.add(instance.id)
            instances.append(instance)
    return tuple(instances)


def annotation_id(annotation, default=None):
    """The id of an annotation, an int or a string, or `default`."""
    found = annotation.get("id") if isinstance(annotation, dict) else None
    return found if isinstance(found, (int, str)) and not isinstance(found, bool) else default


def parse_instance(annotation: dict, width: int, height: int) -> Instance:
    """One annotation with polygons, uncompressed or compressed RLE.

    Raises:
        SampleError: whose `reason` says what is wrong with it.
    """
    from pycocotools import mask as coco_mask

    identifier = annotation_id(annotation)
    if identifier is None:
        raise SampleError(SkipReason.MALFORMED_ANNOTATION)
    is_crowd, category_id = annotation.get("iscrowd", 0), annotation.get("category_id")
    if is_crowd not in (0, 1) or not (category_id is None or _is_integer(category_id)):
        raise SampleError(SkipReason.MALFORMED_ANNOTATION)

    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        rle, mask_area = _checked_rle(segmentation, width, height)
    else:
        rle = _polygons_to_rle(segmentation, width, height)
        mask_area = int(coco_mask.area(rle))
    if not mask_area:
        raise SampleError(SkipReason.ZERO_AREA)

    area = annotation.get("area")
    return Instance(
        id=identifier,
        rle=rle,
        bbox_xywh=_box(annotation.get("bbox"), width, height) or tuple(coco_mask.toBbox(rle).tolist()),
        area=float(area) if is_number(area) and area > 0 else float(mask_area),
        is_crowd=bool(is_crowd),
        category_id=category_id,
        point_xy=_point(annotation.get("point_coords"), width, height),
    )


def text_rle(rle: dict) -> dict:
    """A compressed RLE as JSON takes it: counts as a string."""
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


@lru_cache(maxsize=1)  # a mask is checked, and then decoded
def run_lengths(counts: str | bytes) -> np.ndarray:
    """The runs of a compressed COCO RLE, int64 (runs,), not to be changed: pixels outside and inside the mask in turn, column by column.

    Each number is written in groups of 5 bits, lowest first, one character each: 48 + bits + 32 where another group
    follows. The highest bit of the last group is the sign. From the fourth run on, the difference from the run before
    the last is written. Needed because pycocotools takes runs that end too early without a word, and then decodes
    uninitialised memory or does not return.

    Raises:
        SampleError: for counts that no encoder writes. The sum of the runs is for the caller to check.
    """
    try:
        codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64)
    except UnicodeEncodeError as error:
        raise SampleError(SkipReason.MALFORMED_RLE) from error
    codes -= 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise SampleError(SkipReason.MALFORMED_RLE)
    ends = np.flatnonzero((codes & 32) == 0) + 1
    starts = np.concatenate(([0], ends[:-1]))
    num_groups = ends - starts
    if num_groups.max() > 7:  # 35 bits: more than any run of a picture, and no overflow below
        raise SampleError(SkipReason.MALFORMED_RLE)
    group = np.arange(len(codes)) - np.repeat(starts, num_groups)
    runs = np.add.reduceat((codes & 31) << (5 * group), starts)
    runs -= (codes[ends - 1] & 16 > 0) * (1 << 5 * num_groups)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    runs.flags.writeable = False
    return runs


def _checked_rle(segmentation: dict, width: int, height: int) -> tuple[dict, int]:
    """Compressed RLE with counts as bytes, and the mask's count of pixels."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_integer, size))):
        raise SampleError(SkipReason.MALFORMED_RLE)
    if tuple(size) != (height, width):
        raise SampleError(SkipReason.RLE_SIZE)
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError as error:
            raise SampleError(SkipReason.MALFORMED_RLE) from error
    if isinstance(counts, bytes):
        runs = run_lengths(counts)
    elif isinstance(counts, list) and all(map(_is_integer, counts)) and counts:
        runs = np.array(counts, dtype=object)  # as large as they come: the check below must not overflow
    else:
        raise SampleError(SkipReason.MALFORMED_RLE)
    if runs.min() < 0 or runs.sum() != height * width:
        raise SampleError(SkipReason.MALFORMED_RLE)

    if isinstance(counts, list):
        from pycocotools import mask as coco_mask

        counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    return {"size": [height, width], "counts": counts}, int(runs[1::2].sum())


def _polygons_to_rle(segmentation, width: int, height: int) -> dict:
    """The union of the polygons `[[x, y, x, y, ...], ...]`, in pixels of the picture."""
    from pycocotools import mask as coco_mask

    if segmentation is None or segmentation == []:
        raise SampleError(SkipReason.NO_MASK)
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise SampleError(SkipReason.MALFORMED_ANNOTATION)
    for polygon in segmentation:
        if not all(map(is_number, polygon)) or len(polygon) % 2:
            raise SampleError(SkipReason.MALFORMED_ANNOTATION)
        if len(polygon) < 6:  # pycocotools would take four numbers for a box
            raise SampleError(SkipReason.TOO_FEW_POINTS)
        # pycocotools clips at the border, in time and memory that grow with how far a point lies outside
        if not all(-width <= x <= 2 * width for x in polygon[0::2]) or not all(
            -height <= y <= 2 * height for y in polygon[1::2]
        ):
            raise SampleError(SkipReason.OUTSIDE)
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))


def _box(bbox, width: int, height: int) -> tuple[float, float, float, float] | None:
    """The annotated box, or None where there is none with an area."""
    if bbox is None:
        return None
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox))):
        raise SampleError(SkipReason.MALFORMED_ANNOTATION)
    x, y, box_width, box_height = map(float, bbox)
    if box_width <= 0 or box_height <= 0:
        return None
    if x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
        raise SampleError(SkipReason.OUTSIDE)
    return x, y, box_width, box_height


def _point(points, width: int, height: int) -> tuple[float, float] | None:
    """The first of SA-1B's `point_coords`, `[[x, y], ...]`, or None where there is none."""
    if not points:
        return None
    point = points[0] if isinstance(points, list) else None
    if not (isinstance(point, list) and len(point) == 2 and all(map(is_number, point))):
        raise SampleError(SkipReason.MALFORMED_ANNOTATION)
    x, y = map(float, point)
    if not (0 <= x <= width and 0 <= y <= height):
        raise SampleError(SkipReason.OUTSIDE)
    return x, y


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """A finite number that fits a float: JSON also has NaN, Infinity and integers of any length."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
