"""Simulated clicks, as in the literature on interactive segmentation and the Segment Anything paper.

The first click is the deepest point of the mask, where the distance to its outside, including the outside of the image,
is greatest. Each further click is the deepest point of the larger of two error regions, measured by that depth: the
missed pixels (a positive click) and the excess pixels (a negative one).

On a GPU with Triton `kernels/deepest_pixels.py` computes the deepest points of all instances at once, and nothing waits
for it. Elsewhere they are searched for one by one, in the tight boxes of the masks.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..data.clicks import Point, deepest_of, deepest_point
from ..kernels.deepest_pixels import launch_deepest_pixels, why_not_triton
from ..masks.boxes import mask_boxes, mask_extent


def next_clicks(predicted: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next click for each of n predicted masks, as `next_click` does.

    Args:
        predicted: bool (n, H, W), on any device.
        targets: bool (n, H, W), on the same device.

    Returns:
        int64 (n, 2), x and y, and int64 (n,), the labels, on that device.
    """
    if why_not_triton(targets) is None:
        return _next_clicks_at_once(predicted, targets)
    clicks = []
    for own, target, (left, top, right, bottom) in zip(predicted, targets, _joint_boxes(predicted, targets)):
        box = slice(top, bottom), slice(left, right)
        (x, y), label = next_click(own[box].cpu().numpy(), target[box].cpu().numpy())
        clicks.append((x + left, y + top, label))
    numbers = torch.tensor(clicks, dtype=torch.int64, device=targets.device).view(-1, 3)
    return numbers[:, :2], numbers[:, 2]


def _joint_boxes(predicted: torch.Tensor, targets: torch.Tensor) -> Iterable[Sequence[int]]:
    """Return the tight box of each pair of masks together, as `mask_extent` does; that of the first pixel for none."""
    if predicted.is_cpu:  # one pair after another stays in the caches
        pairs = zip(predicted.numpy(), targets.numpy())
        return (mask_extent(own | target) or (0, 0, 1, 1) for own, target in pairs)
    boxes = mask_boxes(predicted | targets)
    return (boxes + torch.tensor([0, 0, 1, 1], device=boxes.device)).tolist()


def _next_clicks_at_once(predicted: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wrong = predicted ^ targets
    is_right = ~wrong.flatten(1).any(dim=1)[:, None, None]  # then the target is clicked again
    errors = torch.cat([targets & (wrong | is_right), predicted & wrong])
    missed, excess = launch_deepest_pixels(errors).view(2, -1, 3)  # x, y and squared depth of each
    is_missed = missed[:, 2] >= excess[:, 2]
    return torch.where(is_missed[:, None], missed, excess)[:, :2], is_missed.long()


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
