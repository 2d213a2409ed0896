"""Simulated clicks, as in the literature on interactive segmentation and the Segment Anything paper.

The first click is the deepest point of the mask, where the distance to its outside, including the outside of the image,
is greatest. Each further click is the deepest point of the larger of two error regions, measured by that depth: the
missed pixels (a positive click) and the excess pixels (a negative one).

Only the tight boxes of masks are looked at. They are found, and copied from the device, for all instances at once.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch

from ..data.clicks import Point, deepest_of, deepest_point
from ..masks.boxes import mask_boxes, mask_extent


def next_clicks(predicted: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next click for each of n predicted masks, as `next_click` does.

    Args:
        predicted: bool (n, H, W), on any device.
        targets: bool (n, H, W), on the same device.

    Returns:
        int64 (n, 2), x and y, and int64 (n,), the labels, on the CPU.
    """
    clicks = []
    for left, top, (own, target) in boxed(predicted, targets):
        (x, y), label = next_click(own, target)
        clicks.append((x + left, y + top, label))
    numbers = torch.tensor(clicks, dtype=torch.int64).view(-1, 3)
    return numbers[:, :2], numbers[:, 2]


def next_click(predicted: np.ndarray, target: np.ndarray) -> tuple[Point, int]:
    """Return the next click for a predicted mask.

    Args:
        predicted: bool (H, W).
        target: bool (H, W). Where nothing is wrong, its deepest point is clicked again.

    Returns:
        The (x, y) of the click, and its label: 1 (object) or 0 (background).
    """
    excess, point, depth = deepest_of([target & ~predicted, predicted & ~target])
    return (point, 1 - excess) if depth else (deepest_point(target)[0], 1)


def boxed(*masks: torch.Tensor) -> list[tuple[int, int, list[np.ndarray]]]:
    """Return the parts of masks in their tight boxes. A device is waited for twice, however many masks there are.

    Args:
        *masks: bool (n, H, W) each, on one device. The n-th mask of all of them together have one box.

    Returns:
        For each of n the first column and the first row of the box, and the parts, bool (h, w), of each tensor; the
        first pixel where all are empty.
    """
    if masks[0].is_cpu:
        results = []
        for together in zip(*(one.numpy() for one in masks)):
            x1, y1, x2, y2 = mask_extent(reduce(np.logical_or, together)) or (0, 0, 1, 1)
            results.append((x1, y1, [mask[y1:y2, x1:x2] for mask in together]))
        return results
    codes = sum(one.byte() << place for place, one in enumerate(masks))
    assert isinstance(codes, torch.Tensor)
    boxes = mask_boxes(codes > 0).tolist()
    return [
        (box[0], box[1], [part >> place & 1 == 1 for place in range(len(masks))])
        for box, part in zip(boxes, gather_boxes(codes, boxes))
    ]


def gather_boxes(masks: torch.Tensor, boxes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Copy the pixels of masks (n, H, W) in boxes (first and last column and row, XYXY) to the CPU, all at once."""
    device, (num_masks, height, width) = masks.device, masks.shape
    if not num_masks:
        return []
    x1, y1, x2, y2 = torch.tensor(boxes).unbind(1)
    widths, heights = x2 - x1 + 1, y2 - y1 + 1
    counts = widths * heights
    ends = counts.cumsum(0)
    begins = (torch.arange(num_masks) * height + y1) * width + x1
    table = torch.stack([ends - counts, begins, widths, counts]).to(device)
    first, begin, wide = table[:3].repeat_interleave(table[3], dim=1, output_size=int(ends[-1]))
    place = torch.arange(int(ends[-1]), device=device) - first
    row = place // wide
    pixels = masks.reshape(-1)[begin + row * width + place - row * wide].cpu().numpy()
    parts = np.split(pixels, ends[:-1].numpy())
    return [part.reshape(size) for part, *size in zip(parts, heights.tolist(), widths.tolist())]
