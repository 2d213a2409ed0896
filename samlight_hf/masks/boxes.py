"""The tight boxes of masks."""

import numpy as np
import torch


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """bool (n, H, W) to int64 (n, 4): first and last column and row, as x1, y1, x2, y2; zeros for an empty mask."""
    if not masks.numel():
        return torch.zeros(len(masks), 4, dtype=torch.int64, device=masks.device)
    edges = []
    for inside in (masks.any(dim=1), masks.any(dim=2)):  # columns, rows
        inside = inside.byte()  # argmax takes the first of equal values
        edges.append((inside.argmax(dim=1), inside.shape[1] - 1 - inside.flip(1).argmax(dim=1)))
    (x1, x2), (y1, y2) = edges
    return torch.stack([x1, y1, x2, y2], dim=1) * masks.flatten(1).any(dim=1)[:, None]


def mask_edges(masks: np.ndarray) -> np.ndarray:
    """bool (n, H, W) to the boxes of `MaskResult`, float32 (n, 4)."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(columns):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
