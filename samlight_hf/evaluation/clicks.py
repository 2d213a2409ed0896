"""Simulated clicks, as the interactive segmentation literature and the Segment Anything paper place them.

The first click is the point deepest inside the mask, where the distance to everything outside is greatest, the outside of
the image included. Each next click is the deepest point of the larger of two error regions, measured by that depth:
what the prediction misses (a positive click) and what it has too much (a negative one).
"""

import numpy as np

from ..data.clicks import deepest_point


def next_click(predicted: np.ndarray, target: np.ndarray) -> tuple[tuple[int, int], int]:
    """Where to click next, (x, y), and with which label, 1 (object) or 0 (background). Both masks bool (H, W).

    Where nothing is wrong, the deepest point of the target is confirmed once more.
    """
    missing_point, missing_depth = deepest_point(target & ~predicted)
    excess_point, excess_depth = deepest_point(predicted & ~target)
    if max(missing_depth, excess_depth) == 0:
        return deepest_point(target)[0], 1
    return (missing_point, 1) if missing_depth >= excess_depth else (excess_point, 0)
