"""Convert annotations of an image, in the JSON format of COCO and SA-1B, to instances with checked masks."""

import math
from collections.abc import Container
from typing import TypeGuard

import numpy as np

from .samples import Instance, SampleError, SkipReason, SkipReport


def parse_instances(
    annotations: list, sample_id: str, width: int, height: int, report: SkipReport
) -> tuple[Instance, ...]:
    """Convert the annotations of an image to its usable instances.

    Args:
        annotations: annotations as JSON has them.
        sample_id: id of the image, for the report.
        width, height: size of the image in pixels.
        report: skipped annotations, and parts left out of instances, are added to it.

    Returns:
        The instances in the order of the annotations, with unique ids.
    """
    instances: list[Instance] = []
    ids: set[int | str] = set()
    for position, annotation in enumerate(annotations):
        where = f"{sample_id}, annotation {annotation_id(annotation, default=f'number {position}')}"
        left_out: list[SkipReason] = []
        try:
            instance = parse_instance(annotation, width, height, position, left_out)
            if instance.id in ids:
                raise SampleError(SkipReason.DUPLICATE_ANNOTATION)
        except SampleError as error:
            report.add_instances(error.reason, where)
        else:
            ids.add(instance.id)
            instances.append(instance)
            for reason in left_out:
                report.add_part(reason, where)
    return tuple(instances)


def annotation_id(annotation, default=None):
    """Return the id of an annotation or an image in JSON, an int or a string, or `default` if it has none."""
    identifier = as_id(annotation.get("id")) if isinstance(annotation, dict) else None
    return default if identifier is None else identifier


def as_id(value) -> int | str | None:
    """Return an id from JSON as an int or a string, or None if it is neither. 7.0, a common export of 7, is 7."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def matching_id(value, known: Container) -> int | str | None:
    """Convert a reference by `as_id`, or to the other spelling of the id, "7" or 7, if only that is known."""
    identifier = as_id(value)
    if identifier is None or identifier in known:
        return identifier
    other = as_integer(identifier) if isinstance(identifier, str) else str(identifier)
    return other if other is not None and other in known else identifier


def as_integer(value) -> int | None:
    """Convert an integer from JSON, written as 3, 3.0 or "3", or return None."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.strip().isdecimal() else None
    return integer if isinstance(integer := as_id(value), int) else None


def parse_instance(
    annotation: dict | SampleError,
    width: int,
    height: int,
    position: int = 0,
    left_out: list[SkipReason] | None = None,
) -> Instance:
    """Convert an annotation with polygons, uncompressed or compressed RLE.

    The mask is exact, or the annotation is refused. Other parts are optional: a malformed box, point or category is
    left out, a missing id becomes "number `position`", and polygons of under three points are dropped beside others.

    Args:
        annotation: the annotation as JSON has it; or the error of a reader that refused it, which is raised.
        width, height: size of the image in pixels.
        position: index of the annotation in its image.
        left_out: the reason for each part that is left out is appended.

    Raises:
        SampleError: if the annotation cannot be used; its `reason` says why.
    """
    from pycocotools import mask as coco_mask

    if isinstance(annotation, SampleError):
        raise annotation
    if not isinstance(annotation, dict):
        raise SampleError(SkipReason.MALFORMED_ANNOTATION)
    left_out = [] if left_out is None else left_out
    is_crowd = as_integer(annotation.get("iscrowd") or 0)
    if is_crowd not in (0, 1):
        raise SampleError(SkipReason.MALFORMED_ANNOTATION)

    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        rle, mask_area = checked_rle(segmentation, width, height)
    else:
        polygons, reasons = usable_polygons(segmentation)
        left_out += reasons
        rle = _polygons_to_rle(polygons, width, height)
        mask_area = int(coco_mask.area(rle))
    if not mask_area:
        raise SampleError(SkipReason.ZERO_AREA)

    if (identifier := annotation_id(annotation)) is None:
        left_out.append(SkipReason.MISSING_ID)
        identifier = f"number {position}"
    category_id = as_integer(annotation.get("category_id"))
    if category_id is None and annotation.get("category_id") is not None:
        left_out.append(SkipReason.BAD_CATEGORY)
    area = annotation.get("area")
    return Instance(
        id=identifier,
        rle=rle,
        bbox_xywh=_box(annotation.get("bbox"), width, height, left_out) or tuple(coco_mask.toBbox(rle).tolist()),
        area=float(area) if is_number(area) and area > 0 else float(mask_area),
        is_crowd=bool(is_crowd),
        category_id=category_id,
        point_xy=_point(annotation.get("point_coords"), width, height, left_out),
    )


def usable_polygons(segmentation) -> tuple[list[list], list[SkipReason]]:
    """Select the polygons of three points or more. Their coordinates are not checked.

    Args:
        segmentation: `[[x, y, x, y, ...], ...]`, or a single polygon `[x, y, x, y, ...]`.

    Returns:
        The polygons, and the reasons for each change.

    Raises:
        SampleError: if it is no list of lists, or if no polygon is left.
    """
    if segmentation is None or segmentation == []:
        raise SampleError(SkipReason.NO_MASK)
    reasons = []
    if isinstance(segmentation, list) and all(map(is_number, segmentation)):
        segmentation, reasons = [segmentation], [SkipReason.FLAT_POLYGON]
    if not isinstance(segmentation, list) or not all(isinstance(ring, list) for ring in segmentation):
        raise SampleError(SkipReason.MALFORMED_ANNOTATION)
    rings = [ring for ring in segmentation if len(ring) >= 6]  # pycocotools would read four numbers as a box
    if not rings:
        raise SampleError(SkipReason.TOO_FEW_POINTS)
    return rings, reasons + [SkipReason.STRAY_RING] * (len(segmentation) - len(rings))


def checked_rle(segmentation: dict, width: int, height: int) -> tuple[dict, int]:
    """Check an RLE of an image; return it compressed, with counts as bytes, and the number of pixels in the mask.

    Raises:
        SampleError: for an RLE that is malformed, or of another size than the image.
    """
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
        from ..masks.rle import run_lengths

        try:
            runs = run_lengths(counts)
        except ValueError as error:
            raise SampleError(SkipReason.MALFORMED_RLE) from error
    elif isinstance(counts, list) and all(map(_is_integer, counts)) and counts:
        runs = np.array(counts, dtype=object)  # integers of any size, so that the check below cannot overflow
    else:
        raise SampleError(SkipReason.MALFORMED_RLE)
    if runs.min() < 0 or runs.sum() != height * width:
        raise SampleError(SkipReason.MALFORMED_RLE)

    if isinstance(counts, list):
        from pycocotools import mask as coco_mask

        counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    return {"size": [height, width], "counts": counts}, int(runs[1::2].sum())


def _polygons_to_rle(polygons: list[list], width: int, height: int) -> dict:
    """Rasterize the union of polygons `[[x, y, x, y, ...], ...]` in pixels of the image."""
    from pycocotools import mask as coco_mask

    for polygon in polygons:
        if not all(map(is_number, polygon)) or len(polygon) % 2:
            raise SampleError(SkipReason.MALFORMED_ANNOTATION)
        # pycocotools clips at the border, but takes time and memory in proportion to the distance of a point from it
        if not all(-width <= x <= 2 * width for x in polygon[0::2]) or not all(
            -height <= y <= 2 * height for y in polygon[1::2]
        ):
            raise SampleError(SkipReason.OUTSIDE)
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def _box(bbox, width: int, height: int, left_out: list[SkipReason]) -> tuple[float, float, float, float] | None:
    """Return the annotated box, xywh, or None if there is no usable box with an area."""
    if bbox is None:
        return None
    if isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox)):
        x, y, box_width, box_height = map(float, bbox)
        if box_width <= 0 or box_height <= 0:
            return None
        if x < width and y < height and x + box_width > 0 and y + box_height > 0:
            return x, y, box_width, box_height
    left_out.append(SkipReason.BAD_BOX)
    return None


def _point(points, width: int, height: int, left_out: list[SkipReason]) -> tuple[float, float] | None:
    """Return the first of SA-1B's `point_coords`, `[[x, y], ...]`, or None if there is no usable one."""
    if not points:
        return None
    point = points[0] if isinstance(points, list) else None
    if isinstance(point, list) and len(point) == 2 and all(map(is_number, point)):
        x, y = map(float, point)
        if 0 <= x <= width and 0 <= y <= height:
            return x, y
    left_out.append(SkipReason.BAD_POINT)
    return None


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> TypeGuard[float]:
    """Return whether a value is a finite number that fits a float. JSON also has NaN, Infinity and huge integers."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
