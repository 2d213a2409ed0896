"""Where a person would click on an object."""

import numpy as np


def deepest_point(mask: np.ndarray) -> tuple[tuple[int, int], float]:
    """The pixel (x, y) of a bool (H, W) mask that lies deepest in it, and its depth in pixels; ((0, 0), 0.0) if it is empty.

    The depth is the Euclidean distance to the nearest pixel outside the mask, where all pixels around the image are
    outside. Among equals the first in raster order.
    """
    from scipy.ndimage import distance_transform_edt

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return (0, 0), 0.0
    top, left = rows[0], columns[0]
    # Nothing of the mask lies outside its own box: padded by a row of zeros, the box has the distances of the whole.
    box = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    distance = distance_transform_edt(box)
    row, column = np.unravel_index(np.argmax(distance), distance.shape)
    return (int(left + column - 1), int(top + row - 1)), float(distance[row, column])
