"""IoU and boundary IoU of masks, for numpy arrays and torch tensors on any device.

All functions take bool masks (..., H, W), and return float64 arrays of the same library (float32 on mps, which has
no float64). Counts are exact integers, so that values equal pycocotools' to the last bit. As in pycocotools the IoU of
two empty masks is 0: an empty reference is a fault of the data, and must not raise a mean.
"""

import math

import numpy as np


# Cheng et al. use 2 % of the image's diagonal for COCO, and 0.5 % for finer annotations.
DILATION_RATIO = 0.02

# The matrix product counts in float32, which is exact up to 2**24. Masks are converted in chunks of this many pixels.
_CHUNK_PIXELS = 2**16


def mask_iou(predictions, references):
    """Compute |P & R| / |P | R| of each pair of masks.

    Args:
        predictions: bool (..., H, W).
        references: bool (..., H, W); leading dimensions are broadcast.

    Returns:
        (...).

    Raises:
        ValueError: for masks that are not bool, of different H x W, or one numpy and the other torch.
    """
    _check(predictions, references)
    intersection = mask_area(predictions & references)
    return _ratio(intersection, mask_area(predictions) + mask_area(references) - intersection)


def mask_iou_matrix(predictions, references):
    """Compute the IoU of each prediction with each reference: (N, H, W) x (M, H, W) -> (N, M).

    Raises:
        ValueError: as `mask_iou`, and for masks of other than three dimensions.
    """
    _check(predictions, references)
    if predictions.ndim != 3 or references.ndim != 3:
        raise ValueError(
            f"Masks of shape {tuple(predictions.shape)} and {tuple(references.shape)}: expected (N, H, W) and "
            "(M, H, W)."
        )
    num_pixels = predictions.shape[-2] * predictions.shape[-1]
    predictions, references = (masks.reshape(len(masks), num_pixels) for masks in (predictions, references))
    count = _count_common_numpy if isinstance(predictions, np.ndarray) else _count_common_torch
    intersection = sum(
        count(predictions[:, start : start + _CHUNK_PIXELS], references[:, start : start + _CHUNK_PIXELS])
        for start in range(0, max(num_pixels, 1), _CHUNK_PIXELS)
    )
    areas = (mask_area(masks[:, None]) for masks in (predictions, references))
    return _ratio(intersection, next(areas)[:, None] + next(areas)[None] - intersection)


def mask_area(masks):
    """Count the pixels of each bool mask: (..., H, W) -> int64 (...)."""
    if isinstance(masks, np.ndarray):
        # Counting one mask at a time is several times faster than a sum over two axes.
        single = masks.reshape(-1, *masks.shape[-2:]) if masks.size else np.zeros((math.prod(masks.shape[:-2]), 1, 1))
        return np.array([np.count_nonzero(mask) for mask in single], dtype=np.int64).reshape(masks.shape[:-2])
    if masks.device.type == "cpu":
        import torch

        return torch.from_numpy(mask_area(masks.numpy()))
    return masks.sum((-2, -1))


def mask_boundary(masks, dilation_ratio: float = DILATION_RATIO):
    """Return the pixels of each mask within a distance of its contour: bool (..., H, W) -> (..., H, W).

    The distance is `dilation_ratio` of the image's diagonal, rounded, at least 1 pixel, along rows, columns and
    diagonals alike: the pixels that as many steps of 3x3 erosion remove. Pixels beyond the image's border count as
    outside the mask, so the border is a contour too.

    Source: Cheng et al., Boundary IoU, CVPR 2021, section 4.

    Raises:
        ValueError: for masks that are not bool, and a ratio that is not positive.
    """
    _check(masks, masks)
    if not dilation_ratio > 0:
        raise ValueError(f"dilation_ratio={dilation_ratio} must be positive.")
    height, width = masks.shape[-2:]
    distance = max(1, round(dilation_ratio * math.hypot(height, width)))
    boundary = masks.copy(order="K") if isinstance(masks, np.ndarray) else masks.clone()
    window = 2 * distance + 1
    if window <= min(height, width):
        inner = _all_in_window(_all_in_window(masks, window, -2), window, -1)
        boundary[..., distance : height - distance, distance : width - distance] &= ~inner
    return boundary


def boundary_iou(predictions, references, dilation_ratio: float = DILATION_RATIO):
    """Compute the IoU of the boundaries of each pair of masks: (..., H, W) x 2 -> (...).

    Unlike IoU it is as strict for large objects as for small ones.

    Raises:
        ValueError: as `mask_iou` and `mask_boundary`.
    """
    _check(predictions, references)
    return mask_iou(mask_boundary(predictions, dilation_ratio), mask_boundary(references, dilation_ratio))


def boundary_iou_matrix(predictions, references, dilation_ratio: float = DILATION_RATIO):
    """Compute the boundary IoU of each prediction with each reference: (N, H, W) x (M, H, W) -> (N, M).

    Raises ValueError as `mask_iou_matrix` does.
    """
    _check(predictions, references)
    return mask_iou_matrix(mask_boundary(predictions, dilation_ratio), mask_boundary(references, dilation_ratio))


def _check(predictions, references):
    for masks in (predictions, references):
        if not hasattr(masks, "ndim") or masks.ndim < 2:
            raise ValueError(f"Masks must be arrays or tensors of shape (..., H, W), not {type(masks).__name__}.")
        if str(masks.dtype).removeprefix("torch.") != "bool":
            raise ValueError(f"Masks must be bool, not {masks.dtype}: threshold logits first (masks > 0).")
    if isinstance(predictions, np.ndarray) != isinstance(references, np.ndarray):
        raise ValueError("Predictions and references must both be numpy arrays or both torch tensors.")
    if predictions.shape[-2:] != references.shape[-2:]:
        raise ValueError(
            f"Predictions of {tuple(predictions.shape[-2:])} and references of {tuple(references.shape[-2:])} pixels: "
            "IoU needs the same height and width. Resize the predictions to the image's own size."
        )


def _ratio(intersection, union):
    if isinstance(intersection, np.ndarray):
        return intersection / np.maximum(union, 1)
    union = union.clamp(min=1)
    if intersection.device.type == "mps":
        return intersection.float() / union.float()
    return intersection.double() / union.double()


def _count_common_numpy(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Count the pixels that two masks share: (N, pixels) x (M, pixels) -> int64 (N, M)."""
    return (predictions.astype(np.float32) @ references.astype(np.float32).T).astype(np.int64)


def _count_common_torch(predictions, references):
    import torch

    with torch.autocast(predictions.device.type, enabled=False):  # bfloat16 is exact only up to 256
        return (predictions.float() @ references.float().T).long()


def _all_in_window(masks, window: int, axis: int):
    """Return whether `window` pixels along `axis`, beginning at each pixel, are all in the mask.

    The result is shorter by window - 1 along that axis. The length doubles with each step, so a window of 60 pixels
    takes six steps instead of sixty.
    """
    length = 1
    while length < window:
        step = min(length, window - length)
        remaining = masks.shape[axis] - step
        if axis == -1:
            masks = masks[..., :remaining] & masks[..., step:]
        else:
            masks = masks[..., :remaining, :] & masks[..., step:, :]
        length += step
    return masks
