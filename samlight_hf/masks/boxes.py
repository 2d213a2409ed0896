"""The tight boxes of masks."""

import numpy as np
import torch


def mask_extent(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return the tight box of a mask, or None if it is empty.

    Args:
        mask: (H, W), bool, or numbers that are not 0 inside.

    Returns:
        x1, y1, x2, y2 as pixel edges: `mask[y1:y2, x1:x2]` is the part that holds the mask.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return int(columns[0]), top, int(columns[-1]) + 1, bottom


def mask_edges(masks: np.ndarray) -> np.ndarray:
    """Return the tight boxes of masks as pixel edges.

    Args:
        masks: bool (n, H, W).

    Returns:
        float32 (n, 4), x1, y1, x2, y2 as `mask_extent` gives them; zeros for an empty mask.
    """
    boxes = [mask_extent(mask) or (0, 0, 0, 0) for mask in masks]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the tight boxes of masks as pixels, on their device and without waiting for it.

    Args:
        masks: bool (n, H, W).

    Returns:
        int64 (n, 4), the first and the last column and row as x1, y1, x2, y2: x2 and y2 are one less than those of
        `mask_extent`. Zeros for an empty mask.
    """
    if not masks.numel():
        return torch.zeros(len(masks), 4, dtype=torch.int64, device=masks.device)
    pixels = masks.contiguous().view(torch.uint8)  # on a CPU the largest of bytes is found much faster than `any`
    columns, rows = pixels.amax(dim=1), pixels.amax(dim=2)
    # argmax takes the first of equal values
    (x1, x2), (y1, y2) = (
        (inside.argmax(dim=1), inside.shape[1] - 1 - inside.flip(1).argmax(dim=1)) for inside in (columns, rows)
    )
    return torch.stack([x1, y1, x2, y2], dim=1) * columns.amax(dim=1)[:, None]


def xywh_to_xyxy(box_xywh: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Convert COCO's (x, y, width, height) to the two corners; the lower right one is exclusive."""
    x, y, width, height = box_xywh
    return x, y, x + width, y + height
