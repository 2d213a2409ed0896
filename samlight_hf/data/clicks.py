"""Choose the pixel of an object that a person would click on."""

import numpy as np


def deepest_point(mask: np.ndarray) -> tuple[tuple[int, int], float]:
    """Find the deepest pixel of a mask: the one farthest from the outside of the mask.

    Depth is the Euclidean distance to the nearest pixel outside the mask; all pixels beyond the image border are
    outside. Of several deepest pixels, the first in raster order is chosen.

    Args:
        mask: bool (H, W).

    Returns:
        The pixel (x, y) and its depth in pixels; ((0, 0), 0.0) for an empty mask.
    """
    from scipy.ndimage import distance_transform_edt

    from ..masks.boxes import mask_extent

    extent = mask_extent(mask)
    if extent is None:
        return (0, 0), 0.0
    left, top, right, bottom = extent
    # The tight box, padded by one pixel of zeros, gives the same distances as the whole mask.
    box = np.pad(mask[top:bottom, left:right], 1)
    distance = distance_transform_edt(box)
    row, column = np.unravel_index(np.argmax(distance), distance.shape)
    return (int(left + column - 1), int(top + row - 1)), float(distance[row, column])
