"""Choose the pixel of an object that a person would click on: the deepest one.

Depth is the Euclidean distance to the nearest pixel outside the mask; all pixels beyond the image border are outside.
The depth of every pixel (`deepest_point_reference`) is not needed: `deepest_point` finds the same pixel by bounds, with
operations on bits that are a thousand times cheaper than a distance.

Let D be a squared depth. A pixel has at least D if and only if all its neighbours at squared distances below D are
inside. Those neighbours hold a square, and with every square of the mask comes a depth; so the largest square bounds D
from both sides, and pixels that are not in the middle of a square nearly as large, and of rectangles, cannot be the
deepest. Only the few that remain are measured. All comparisons are between integers.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt, sqrt

import numpy as np


_FEW_NEIGHBOURS = 12  # up to this depth, neighbours are looked at one distance after another
# Costs of one unit of work, in ns on the machine on which they were measured: only their ratio matters.
_NS_A_PIXEL, _NS_A_PAIR = 50, 4
_PAIRS_AT_ONCE = 2**16
_SAMPLES = 16
_FEW_PIXELS = 2**11  # so small a box is quicker measured whole
_RECTANGLES = (0.92, 0.38), (0.38, 0.92)  # half sides, as shares of a depth

Point = tuple[int, int]


def deepest_point(mask: np.ndarray) -> tuple[Point, float]:
    """Find the deepest pixel of a mask: the one farthest from the outside of the mask.

    Of several deepest pixels, the first in raster order is chosen.

    Args:
        mask: bool (H, W).

    Returns:
        The pixel (x, y) and its depth in pixels; ((0, 0), 0.0) for an empty mask.
    """
    _, point, depth = deepest_of([mask])
    return point, depth


def deepest_point_reference(mask: np.ndarray) -> tuple[Point, float]:
    """Find the same as `deepest_point`, from the depth of every pixel."""
    from scipy.ndimage import distance_transform_edt

    from ..masks.boxes import mask_extent

    extent = mask_extent(mask)
    if extent is None:
        return (0, 0), 0.0
    left, top, right, bottom = extent
    # The tight box, padded by one pixel of zeros, gives the same distances as the whole mask.
    distance = distance_transform_edt(np.pad(mask[top:bottom, left:right], 1))
    row, column = np.unravel_index(np.argmax(distance), distance.shape)
    return (int(left + column - 1), int(top + row - 1)), float(distance[row, column])


def deepest_of(masks: Sequence[np.ndarray]) -> tuple[int, Point, float]:
    """Find the deepest pixel of several masks: as `deepest_point` of each, but only as far as needed.

    Args:
        masks: each bool (H, W).

    Returns:
        The place in `masks` of the one with the deepest pixel, the first of equally deep ones, and the pixel and its
        depth.
    """
    inside = [_Inside(mask) for mask in masks]
    index, best = 0, (0, 0, -1)
    for i in sorted(range(len(masks)), key=lambda i: -inside[i].most):
        if (inside[i].most, -i) > (best[2], -index):
            found = inside[i].deepest()
            if (found[2], -i) > (best[2], -index):
                index, best = i, found
    row, column, squared = best
    return index, (column, row), sqrt(squared)


class _Inside:
    """The inside of a mask (H, W): its tight box, the squares in it, and the bounds of its greatest squared depth."""

    def __init__(self, mask: np.ndarray):
        from ..masks.boxes import mask_extent

        self.left, self.top, right, bottom = mask_extent(mask) or (0, 0, 0, 0)
        self.least = self.most = 0
        if right:
            self.levels, self.largest = _squares(np.ascontiguousarray(mask[self.top : bottom, self.left : right]))
            self.least = ((self.largest + 1) // 2) ** 2
            self.most = 2 * self.least  # no square that is larger by one is inside

    def deepest(self) -> tuple[int, int, int]:
        """Return row, column and squared depth of the deepest pixel; zeros for an empty mask."""
        if not self.most:
            return 0, 0, 0
        mask = self.levels[0]
        if mask.size <= _FEW_PIXELS:
            depths = _all_squared_depths(_padded(mask, 1))[1:-1, 1:-1]
            row, column = divmod(int(depths.argmax()), mask.shape[1])
            squared = int(depths[row, column])
        else:
            find = self._by_neighbours if self.most <= _FEW_NEIGHBOURS**2 else self._by_boundary
            row, column, squared = find()
        return row + self.top, column + self.left, squared

    def _by_neighbours(self) -> tuple[int, int, int]:
        """Look at neighbours in the order of their distance, and leave behind pixels with one that is outside."""
        reach = isqrt(self.most)
        padded = _padded(self.levels[0], reach)
        rows, columns = self._in_square(self.least)
        width = padded.shape[1]
        flat, places = padded.ravel(), (rows + reach) * width + columns + reach
        for squared, offsets in _rings(reach, width):
            alive = flat[offsets[:, None] + places].all(axis=0)
            if not np.count_nonzero(alive):
                row, column = divmod(int(places[0]), width)
                return row - reach, column - reach, squared
            places = places[alive]
        raise AssertionError(f"a squared depth above {self.most}")

    def _by_boundary(self) -> tuple[int, int, int]:
        """Measure the pixels that are left by all bounds, from the boundary or from the depths of all around them."""
        boundary = _boundary(_padded(self.levels[0], 1)) - 1
        corners = _corners(self.levels, self.largest)
        middles = np.stack(corners)[:, :: 1 + len(corners[0]) // _SAMPLES] + (self.largest - 1) // 2
        least = max(self.least, int(_squared_depths(boundary, middles).max()))
        rows, columns = self._in_square(least)
        radius = isqrt(least - 1)
        for share_y, share_x in _RECTANGLES:
            rows, columns = _in_rectangle(self.levels, rows, columns, int(share_y * radius), int(share_x * radius))
        pixels = np.stack([rows, columns])
        while pixels.shape[1] > 4 * _SAMPLES:
            # From one pixel to another the depth changes by their distance at most.
            sample = pixels[:, :: pixels.shape[1] // _SAMPLES]
            depths = np.sqrt(_squared_depths(boundary, sample))
            apart = pixels[:, :, None] - sample[:, None]
            bounds = (depths + np.sqrt(apart[0] ** 2 + apart[1] ** 2)).min(axis=1)
            kept = bounds > depths.max() - 1e-6
            if 2 * np.count_nonzero(kept) > len(kept):
                break
            pixels = pixels[:, kept]
        if pixels.shape[1] * boundary.shape[1] * _NS_A_PAIR > self.levels[0].size * _NS_A_PIXEL:
            squared = _all_squared_depths(_padded(self.levels[0], 1))[tuple(pixels + 1)]
        else:
            squared = _squared_depths(boundary, pixels)
        best = int(squared.argmax())
        return int(pixels[0, best]), int(pixels[1, best]), int(squared[best])

    def _in_square(self, least: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and columns, in raster order, of the pixels that may have a squared depth of `least`.

        The square among their neighbours at smaller distances is inside.
        """
        half = isqrt((least - 1) // 2)
        rows, columns = _corners(self.levels, 2 * half + 1)
        return rows + half, columns + half


def _padded(mask: np.ndarray, width: int) -> np.ndarray:
    """Return a mask with pixels outside added on all sides, as np.pad does, which takes ten times as long."""
    padded = np.zeros((mask.shape[0] + 2 * width, mask.shape[1] + 2 * width), dtype=bool)
    padded[width:-width, width:-width] = mask
    return padded


def _squares(mask: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Find squares inside a mask that is not empty.

    Returns:
        For j = 0, 1, ... bool (H - 2**j + 1, W - 2**j + 1): whether the square of side 2**j whose first pixel this is
        lies inside; then the side of the largest square inside.
    """
    levels, side = [mask], 1
    while min(levels[-1].shape) > side:
        doubled = _grown(levels[-1], side)
        if not np.count_nonzero(doubled):
            break
        levels.append(doubled)
        side *= 2
    level, step = levels[-1], side // 2
    while step:
        if min(level.shape) > step:
            grown = _grown(level, step)
            if np.count_nonzero(grown):
                level, side = grown, side + step
        step //= 2
    return levels, side


def _grown(level: np.ndarray, step: int) -> np.ndarray:
    """Return which squares that are larger by `step` are inside; `step` is at most the side of those in `level`."""
    rows = level[:-step] & level[step:]
    return rows[:, :-step] & rows[:, step:]


def _corners(levels: list[np.ndarray], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns, in raster order, of the first pixels of the squares of a side that are inside."""
    level, step = levels[side.bit_length() - 1], side - (1 << side.bit_length() - 1)
    found = _grown(level, step) if step else level
    return np.divmod(np.flatnonzero(found), found.shape[1])


def _in_rectangle(
    levels: list[np.ndarray], rows: np.ndarray, columns: np.ndarray, half_height: int, half_width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of those pixels around which a rectangle is inside. Squares cover it."""
    height, width = levels[0].shape
    fits = (rows >= half_height) & (rows < height - half_height)
    fits &= (columns >= half_width) & (columns < width - half_width)
    rows, columns = rows[fits], columns[fits]
    index = min(len(levels), (2 * min(half_height, half_width) + 1).bit_length()) - 1
    level, side = levels[index], 1 << index
    corners = rows * level.shape[1] + columns
    offsets = [y * level.shape[1] + x for y in _cover(half_height, side) for x in _cover(half_width, side)]
    inside = level.ravel()[np.array(offsets)[:, None] + corners].all(axis=0)
    return rows[inside], columns[inside]


def _cover(half: int, side: int) -> list[int]:
    """Return where intervals of length `side` begin that cover -half to half."""
    last = half + 1 - side
    return [*range(-half, last, side), last]


@lru_cache(maxsize=64)
def _rings(reach: int, width: int) -> list[tuple[int, np.ndarray]]:
    """Return the squared distances of neighbours up to `reach` rows and columns away, each with their offsets in rows
    of `width`, without the distance 0.
    """
    line = np.arange(-reach, reach + 1)
    squared, offsets = (line[:, None] ** 2 + line**2).ravel(), (line[:, None] * width + line).ravel()
    return [(distance, offsets[squared == distance]) for distance in np.unique(squared).tolist()[1:]]


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels outside that have a neighbour inside, as the nearest one outside has: int64 (2, B)."""
    beside = np.zeros_like(mask)
    beside[1:] |= mask[:-1]
    beside[:-1] |= mask[1:]
    beside[:, 1:] |= mask[:, :-1]
    beside[:, :-1] |= mask[:, 1:]
    return np.stack(np.divmod(np.flatnonzero(beside & ~mask), mask.shape[1]))


def _squared_depths(boundary: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return the squared distances of pixels (2, K) to the nearest one of a boundary (2, B): int64 (K,)."""
    squared = np.empty(pixels.shape[1], dtype=np.int64)
    (y, x), (rows, columns) = boundary.astype(np.int32), pixels.astype(np.int32)[:, :, None]
    step = max(1, _PAIRS_AT_ONCE // len(y))
    for start in range(0, len(squared), step):
        own = slice(start, start + step)
        down, right = y - rows[own], x - columns[own]
        squared[own] = (down * down + right * right).min(axis=1)
    return squared


def _all_squared_depths(mask: np.ndarray) -> np.ndarray:
    """Return the squared depth of each pixel, int64 (H, W); what lies beyond the mask's border does not count."""
    from scipy.ndimage import distance_transform_edt

    return np.rint(distance_transform_edt(mask) ** 2).astype(np.int64)
