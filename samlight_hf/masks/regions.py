"""Small faults of masks: holes that are filled, and separate parts that are dropped."""

from dataclasses import replace
from typing import TypeVar

import numpy as np

from .boxes import mask_edges, mask_extent
from .formats import require_opencv
from .results import GeneratedMasks, MaskResult
from .rle import RunLengthMasks


Result = TypeVar("Result", MaskResult, GeneratedMasks)


def clean_mask(mask: np.ndarray, min_hole_area: int = 0, min_region_area: int = 0) -> np.ndarray:
    """Fill the small holes of a mask, and then drop its small parts; the largest part always stays.

    Pixels that touch at a corner are of one part, and not of one hole, as in `polygons`. What is outside the mask and
    reaches the border of the image is no hole.

    Args:
        mask: bool (H, W).
        min_hole_area: holes with fewer pixels are filled.
        min_region_area: parts with fewer pixels are dropped.

    Returns:
        bool (H, W); `mask` itself where there is nothing to change.

    Raises:
        ImportError: without OpenCV, see `require_opencv`.
    """
    cv2 = require_opencv()
    extent = mask_extent(mask)
    if extent is None:
        return mask
    inside = np.s_[extent[1] : extent[3], extent[0] : extent[2]]
    part = mask[inside]
    if min_hole_area > 1:
        _, numbers, table, _ = cv2.connectedComponentsWithStats((~part).astype(np.uint8), connectivity=4)
        x, y, width, height, areas = table.T
        # The part fits the mask tightly: what touches its edge goes on beyond it, or ends at the image's border.
        is_hole = (x > 0) & (y > 0) & (x + width < part.shape[1]) & (y + height < part.shape[0])
        part = part | _chosen(numbers, is_hole & (areas < min_hole_area))
    if min_region_area > 1:
        _, numbers, table, _ = cv2.connectedComponentsWithStats(part.astype(np.uint8), connectivity=8)
        areas = table[:, 4]
        is_small = areas < min_region_area
        is_small[1 + areas[1:].argmax()] = False
        part = part & ~_chosen(numbers, is_small)
    if np.array_equal(part, mask[inside]):
        return mask
    cleaned = np.zeros_like(mask)
    cleaned[inside] = part
    return cleaned


def clean_masks(result: Result, min_hole_area: int = 0, min_region_area: int = 0) -> Result:
    """Clean each mask of a result by `clean_mask`, and compute the boxes of those that change.

    Returns:
        A result of the same kind, with as many masks in the same order; scores are those of the masks as they were.
    """
    masks, boxes_xyxy = [], result.boxes_xyxy.copy()
    for index, mask in enumerate(result.masks):
        cleaned = clean_mask(mask, min_hole_area, min_region_area)
        if cleaned is not mask:
            boxes_xyxy[index] = mask_edges(cleaned[None])[0]
        if isinstance(result, MaskResult):
            masks.append(cleaned)
        else:  # as run lengths: the pixels of all masks need much memory
            is_new = cleaned is not mask
            masks.append(RunLengthMasks.from_masks(cleaned[None]).runs if is_new else result.masks.runs_of(index))
    if not masks:
        return result
    if isinstance(result, MaskResult):
        return replace(result, masks=np.stack(masks), boxes_xyxy=boxes_xyxy)
    # Made anew: the masks may know the compressed counts that they had before.
    run_lengths = RunLengthMasks.from_runs(result.masks.height, result.masks.width, masks)
    return replace(result, masks=run_lengths, boxes_xyxy=boxes_xyxy)


def _chosen(numbers: np.ndarray, is_chosen: np.ndarray) -> np.ndarray:
    """Return the pixels of the chosen components: bool (H, W). Number 0 is what is no component."""
    is_chosen = is_chosen.copy()
    is_chosen[0] = False
    return is_chosen[numbers]
