"""Exact polygons of masks: outlines that follow the edges of pixels, with holes, from the spans of a mask.

The edge of a mask is a set of directed segments with the inside on their right (x to the right, y down): above and
below each span, and between neighbouring columns where only one of them is inside. Every segment ends where another
begins. Where two pixels touch at a corner alone there are two to go on with, and the one to the right is taken, so that
the pixels stay apart. A ring that comes back to one of its vertices is split there: rings then touch themselves
nowhere, as geographic software demands.
"""

from collections.abc import Sequence

import numpy as np

from .spans import SpanMask


Ring = np.ndarray  # int (n, 2), x and y of pixel edges; closed by going on to the first vertex


def trace(mask: SpanMask) -> list[list[Ring]]:
    """Return the polygons of a mask; those whose pixels touch at corners alone are apart.

    Args:
        mask: of any size.

    Returns:
        For each polygon its outer ring, followed by its holes. Outer rings run clockwise as one sees the image, which
        is counterclockwise where y points up; holes run the other way.
    """
    rings = [part for ring in _link(*_edges(mask), mask.height) for part in _split(ring)]
    areas = [_doubled_area(ring) for ring in rings]
    polygons = [[ring] for ring, area in zip(rings, areas) if area > 0]
    holes = [ring for ring, area in zip(rings, areas) if area < 0]
    if len(polygons) == 1:
        polygons[0] += holes
    else:
        _assign(holes, polygons)
    return polygons


def _edges(mask: SpanMask) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end of each directed segment, int64 (n, 2) x and y each."""
    stride = mask.height + 1
    starts, ends = mask.spans[:, 0], mask.spans[:, 1]
    columns, tops = np.divmod(starts, stride)
    bottoms = tops + ends - starts
    upper = np.stack([columns, tops, columns + 1, tops], axis=1)
    lower = np.stack([columns + 1, bottoms, columns, bottoms], axis=1)
    # At the left edge of column x: what is inside in x alone runs up, what is inside in x - 1 alone runs down.
    shifted = mask.spans + stride
    begin, end = _difference(mask.spans, shifted)
    x, top = np.divmod(begin, stride)
    up = np.stack([x, top + end - begin, x, top], axis=1)
    begin, end = _difference(shifted, mask.spans)
    x, top = np.divmod(begin, stride)
    down = np.stack([x, top, x, top + end - begin], axis=1)
    segments = np.concatenate([upper, lower, up, down])
    return segments[:, :2], segments[:, 2:]


def _difference(spans: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and ends of what lies in `spans` and not in `other`; both are sorted and disjoint."""
    bounds = np.concatenate([spans.ravel(), other.ravel()])
    inside = np.concatenate([np.tile([1, -1], len(spans)), np.tile([2, -2], len(other))])
    order = np.argsort(bounds, kind="stable")
    bounds, state = bounds[order], np.cumsum(inside[order])
    only = (state[:-1] == 1) & (bounds[1:] > bounds[:-1])
    return bounds[:-1][only], bounds[1:][only]


def _link(starts: np.ndarray, ends: np.ndarray, height: int) -> list[Ring]:
    """Join segments to rings, without the vertices at which a ring goes straight on."""
    if not len(starts):
        return []
    start_keys, end_keys = (points[:, 0] * (height + 1) + points[:, 1] for points in (starts, ends))
    order = np.argsort(start_keys, kind="stable")
    sorted_keys = start_keys[order]
    place = np.searchsorted(sorted_keys, end_keys)
    following = order[place]
    # At a corner where two segments begin, the one that turns right: with y down, (dx, dy) turns to (-dy, dx).
    direction = np.sign(ends - starts)
    second = np.minimum(place + 1, len(order) - 1)
    is_fork = sorted_keys[second] == end_keys
    is_fork &= second > place
    to_the_right = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
    turns_right = (direction[following] == to_the_right).all(axis=1)
    following = np.where(is_fork & ~turns_right, order[second], following)
    keeps_on = np.zeros(len(starts), dtype=bool)  # a segment that goes on in the direction of the one before
    keeps_on[following] = (direction[following] == direction).all(axis=1)

    rings = []
    successor, is_done = following.tolist(), bytearray(len(starts))
    for first in range(len(successor)):
        if is_done[first]:
            continue
        ring, segment = [], first
        while not is_done[segment]:
            is_done[segment] = 1
            ring.append(segment)
            segment = successor[segment]
        members = np.array(ring)
        rings.append(starts[members[~keeps_on[members]]])
    return rings


def _split(ring: Ring) -> list[Ring]:
    """Split a ring at each vertex that it visits more than once."""
    if len(np.unique(ring, axis=0)) == len(ring):
        return [ring]
    parts: list[Ring] = []
    path: list[tuple[int, ...]] = []
    place: dict[tuple[int, ...], int] = {}  # of each vertex in the path
    for vertex in map(tuple, ring.tolist()):
        if vertex in place:
            first = place[vertex]
            parts.append(np.array(path[first:]))
            for left in path[first + 1 :]:
                del place[left]
            del path[first + 1 :]
        else:
            place[vertex] = len(path)
            path.append(vertex)
    return [*parts, np.array(path)]


def _doubled_area(ring: Ring) -> int:
    """Return twice the area, positive for a ring that runs clockwise as one sees the image."""
    x, y = (ring - ring[0]).T
    return int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())


def _assign(holes: Sequence[Ring], polygons: list[list[Ring]]):
    """Add each hole to the smallest polygon around it."""
    boxes = np.array([[*polygon[0].min(axis=0), *polygon[0].max(axis=0)] for polygon in polygons]).reshape(-1, 4)
    for hole in holes:
        low, high = hole.min(axis=0), hole.max(axis=0)
        around = np.flatnonzero((boxes[:, :2] <= low).all(axis=1) & (boxes[:, 2:] >= high).all(axis=1))
        # The middle of the pixel inside the corner that is the leftmost of the uppermost: it lies in the hole.
        x, y = hole[np.lexsort((hole[:, 0], hole[:, 1]))[0]] + 0.5
        within = [index for index in around if _is_inside(x, y, polygons[index][0])]
        polygons[min(within, key=lambda index: _doubled_area(polygons[index][0]))].append(hole)


def _is_inside(x: float, y: float, ring: Ring) -> bool:
    """Return whether a point that lies on no edge is inside a ring of horizontal and vertical edges."""
    x1, y1 = ring.T
    y2 = np.roll(y1, -1)
    crosses = ((y1 > y) != (y2 > y)) & (x1 > x)  # vertical edges to the right
    return bool(crosses.sum() % 2)
