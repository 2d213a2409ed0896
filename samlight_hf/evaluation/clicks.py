"""Simulated clicks, as the interactive segmentation literature and the Segment Anything paper place them.

The first click is the point deepest inside the mask, where the distance to everything outside is greatest, the outside of
the picture included. Each next click is the deepest point of the larger of two error regions, measured by that depth:
what the prediction misses (a positive click) and what it has too much (a negative one).
"""

import numpy as np
from scipy.ndimage import distance_transform_edt


def deepest_point(mask: np.ndarray) -> tuple[tuple[int, int], float]:
    """The pixel (x, y) of a bool (H, W) mask that lies deepest in it, and its depth in pixels; ((0, 0), 0.0) if it is empty.

    The depth is the Euclidean distance to the nearest pixel outside the mask, where all pixels around the picture are
    outside. Among equals the first in raster order.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return (0, 0), 0.0
    top, left = rows[0], columns[0]
    # Nothing of the mask lies outside its own box: padded by a row of zeros, the box has the distances of the whole.
    box = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    distance = distance_transform_edt(box)
    row, column = np.unravel_index(np.argmax(distance), distance.shape)
    return (int(left + column - 1), int(top + row - 1)), float(distance[row, column])


def next_click(predicted: np.ndarray, target: np.ndarray) -> tuple[tuple[int, int], int]:
    """Where to click next, (x, y), and with which label, 1 (object) or 0 (background). Both masks bool (H, W).

    Where nothing is wrong, the deepest point of the target is confirmed once more.
    """
    missing_point, missing_depth = deepest_point(target & ~predicted)
    excess_point, excess_depth = deepest_point(predicted & ~target)
    if max(missing_depth, excess_depth) == 0:
        return deepest_point(target)[0], 1
    return (missing_point, 1) if missing_depth >= excess_depth else (excess_point, 0)
