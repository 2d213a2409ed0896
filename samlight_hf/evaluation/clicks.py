"""Simulated clicks, as in the literature on interactive segmentation and the Segment Anything paper.

The first click is the deepest point of the mask, where the distance to its outside, including the outside of the image,
is greatest. Each further click is the deepest point of the larger of two error regions, measured by that depth: the
missed pixels (a positive click) and the excess pixels (a negative one).
"""

import numpy as np

from ..data.clicks import deepest_point


def next_click(predicted: np.ndarray, target: np.ndarray) -> tuple[tuple[int, int], int]:
    """Return the next click for a predicted mask.

    Args:
        predicted: bool (H, W).
        target: bool (H, W). Where nothing is wrong, its deepest point is clicked again.

    Returns:
        The (x, y) of the click, and its label: 1 (object) or 0 (background).
    """
    missing_point, missing_depth = deepest_point(target & ~predicted)
    excess_point, excess_depth = deepest_point(predicted & ~target)
    if max(missing_depth, excess_depth) == 0:
        return deepest_point(target)[0], 1
    return (missing_point, 1) if missing_depth >= excess_depth else (excess_point, 0)
