"""Objects from the masks of overlapping tiles: one mask for each object, also where a seam goes through it.

Masks of neighbouring tiles are compared where the tiles overlap: two of them with a high IoU there are one object. Of
its masks, one that is complete (that does not end at a border where the image goes on) stands for the object; where
each of them is cut, as with an object larger than the overlap, their union does. A mask that is cut, has no partner,
and lies mostly where a neighbouring tile sees more, is a fragment and is left out. Last, of objects whose boxes overlap
the best are kept, as in crops, and of those whose masks do: a few stray pixels make another box.

At any time only the masks of about two rows of tiles, or of a few dozen tiles, are decoded.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..images.rasters import Window
from ..masks.results import GeneratedMasks
from ..masks.spans import SpanMask, run_length_masks
from .tiles import Tile, TileGrid, TileStore


_CUT_TOLERANCE = 1 / 256  # of the tile's side: a mask's edge is as exact as the logits, a quarter of the tile's tokens
_LEAST_KEPT = 48  # decoded tiles, as many as two rows of an image of 18,000 pixels


@dataclass(frozen=True, eq=False)
class TiledObject:
    """One object of a large image.

    Attributes:
        mask: its pixels.
        score: predicted IoU of its best mask.
        stability_score: of the same mask.
        point_xy: prompt of the same mask, in pixels of the image.
        tile_box_xyxy: the tile of the same mask.
        num_tiles: tiles whose masks it was merged from.
        is_cut: it may go on beyond a straight edge, since a tile ended there and its neighbour found no partner.
    """

    mask: SpanMask
    score: float
    stability_score: float
    point_xy: tuple[float, float]
    tile_box_xyxy: Window
    num_tiles: int
    is_cut: bool


def merge_tiles(grid: TileGrid, store: TileStore, nms_iou: float = 0.7) -> Iterator[TiledObject]:
    """Merge the masks of all tiles to objects, see the top of this file.

    Args:
        grid: the tiles, all of which are in the store.
        store: holds their masks.
        nms_iou: of objects whose boxes have an IoU above it only the best one is kept; where there are several tiles,
            also of those whose masks do.

    Yields:
        The objects, in the order of their first tiles.
    """
    groups = _Groups(grid)
    tiles = _Decoded(grid, store)
    for tile in grid:
        groups.add(tiles.of(tile))
        for down, across in ((0, -1), (-1, -1), (-1, 0), (-1, 1)):
            neighbour = grid.at(tile.row + down, tile.column + across)
            if neighbour is not None:
                groups.match(tiles.of(neighbour), tiles.of(tile))
    objects = _Objects(groups.objects(), tiles, grid)
    for index in objects.without_duplicates(nms_iou):
        yield objects[index]


def generated_masks(objects: list[TiledObject], height: int, width: int) -> GeneratedMasks:
    """Return objects as the masks of one image of height x width pixels, the best first."""
    objects = sorted(objects, key=lambda one: -one.score)
    column = lambda values, width: np.array(values, dtype=np.float32).reshape(len(objects), *width)  # noqa: E731
    return GeneratedMasks(
        run_length_masks([one.mask for one in objects], height, width),
        column([one.score for one in objects], ()),
        column([one.mask.box_xyxy for one in objects], (4,)),
        column([one.stability_score for one in objects], ()),
        column([one.point_xy for one in objects], (2,)),
        column([one.tile_box_xyxy for one in objects], (4,)),
    )


@dataclass(frozen=True, eq=False)
class _TileMask:
    """A mask of a tile in the image's pixels, and which of the tile's sides (left, top, right, bottom) cut it."""

    tile: Tile
    index: int
    mask: SpanMask
    area: int
    score: float
    stability_score: float
    point_xy: tuple[float, float]
    cut: tuple[bool, bool, bool, bool]


@dataclass(frozen=True, eq=False)
class _Extents:
    """Areas int64 (n,) of masks, and their boxes int64 (n, 4) as pixel edges."""

    areas: np.ndarray
    boxes_xyxy: np.ndarray

    @classmethod
    def of(cls, areas: list[int], boxes_xyxy: list[Window]) -> "_Extents":
        return cls(np.array(areas, dtype=np.int64), np.array(boxes_xyxy, dtype=np.int64).reshape(-1, 4))

    def iou_bounds(self, area: int, box_xyxy: np.ndarray) -> np.ndarray:
        """Return how large the IoU of each mask with another one can be, by their areas and boxes: float64 (n,)."""
        first = np.maximum(self.boxes_xyxy[:, :2], box_xyxy[:2])
        last = np.minimum(self.boxes_xyxy[:, 2:], box_xyxy[2:])
        both = np.minimum(np.minimum(self.areas, area), (last - first).clip(min=0).prod(axis=1))
        return both / np.maximum(self.areas + area - both, 1)


@dataclass(frozen=True, eq=False)
class _TileMasks:
    tile: Tile
    masks: list[_TileMask]
    clipped: dict[Window, tuple[list[SpanMask], _Extents]] = field(default_factory=dict)

    def within(self, box: Window) -> tuple[list[SpanMask], _Extents]:
        """Return the part of each mask within a box."""
        if box not in self.clipped:
            parts = [mask.mask.clip(box) for mask in self.masks]
            self.clipped[box] = parts, _Extents.of([part.area for part in parts], [part.box_xyxy for part in parts])
        return self.clipped[box]


class _Decoded:
    """The masks of tiles as spans; only those of about two rows of tiles, or of a few dozen tiles, are kept."""

    def __init__(self, grid: TileGrid, store: TileStore):
        self.grid, self.store = grid, store
        self._kept: OrderedDict[tuple[int, int], _TileMasks] = OrderedDict()
        self._most = max(2 * grid.shape[1] + 2, _LEAST_KEPT)

    def of(self, tile: Tile) -> _TileMasks:
        if tile[:2] not in self._kept:
            self._kept[tile[:2]] = self._decode(tile)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(tile[:2])
        return self._kept[tile[:2]]

    def of_group(self, group: "list[_Key]") -> list[_TileMask]:
        """Return the masks of a group."""
        tiles = [(self.grid.at(*place), index) for place, index in group]
        return [self.of(tile).masks[index] for tile, index in tiles if tile is not None]

    def _decode(self, tile: Tile) -> _TileMasks:
        masks, (x1, y1, x2, y2) = self.store.get(tile), tile.box_xyxy
        tolerance = math.ceil(self.grid.settings.size * _CUT_TOLERANCE)
        inner = x1 > 0, y1 > 0, x2 < self.grid.width, y2 < self.grid.height  # sides beyond which the image goes on
        decoded = []
        for index in range(len(masks)):
            mask = SpanMask.from_runs(masks.masks.runs_of(index), y2 - y1, (x1, y1), self.grid.height)
            left, top, right, bottom = mask.box_xyxy
            near = left - x1, top - y1, x2 - right, y2 - bottom
            cut = tuple(is_inner and distance < tolerance for is_inner, distance in zip(inner, near))
            x, y = masks.points_xy[index].tolist()
            decoded.append(
                _TileMask(
                    tile, index, mask, mask.area, float(masks.scores[index]), float(masks.stability_scores[index]),
                    (x + x1, y + y1), cut,  # type: ignore[arg-type]  # four of them
                )
            )  # fmt: skip
        return _TileMasks(tile, decoded)


_Key = tuple[tuple[int, int], int]  # a tile's place and the mask's index


class _Groups:
    """Masks of different tiles that are one object, as a union-find forest; a group has one mask of a tile at most."""

    def __init__(self, grid: TileGrid):
        self.match_iou = grid.settings.match_iou
        self._parent: dict[_Key, _Key] = {}
        self._members: dict[_Key, list[_Key]] = {}

    def add(self, masks: _TileMasks):
        for mask in masks.masks:
            key = masks.tile[:2], mask.index
            self._parent[key], self._members[key] = key, [key]

    def match(self, first: _TileMasks, second: _TileMasks):
        """Join the masks of two tiles that agree where the tiles overlap, the best pairs first, each mask once."""
        box = _overlap(first.tile.box_xyxy, second.tile.box_xyxy)
        if box is None:
            return
        (parts, own), (others, theirs) = first.within(box), second.within(box)
        pairs = []
        for i in np.flatnonzero(own.areas).tolist():
            possible = theirs.iou_bounds(own.areas[i], own.boxes_xyxy[i]) >= self.match_iou  # most pairs are apart
            for j in np.flatnonzero(possible).tolist():
                iou = parts[i].iou(others[j])
                if iou >= self.match_iou:
                    pairs.append((iou, first.masks[i].score + second.masks[j].score, i, j))
        taken: tuple[set[int], set[int]] = set(), set()
        for _, _, i, j in sorted(pairs, reverse=True):
            if i not in taken[0] and j not in taken[1] and self._join((first.tile[:2], i), (second.tile[:2], j)):
                taken[0].add(i)
                taken[1].add(j)

    def _join(self, key: _Key, other: _Key) -> bool:
        root, other_root = self._root(key), self._root(other)
        if root == other_root:
            return True
        members, others = self._members[root], self._members[other_root]
        if {place for place, _ in members} & {place for place, _ in others}:
            return False
        self._parent[other_root] = root
        self._members[root] = members + self._members.pop(other_root)
        return True

    def _root(self, key: _Key) -> _Key:
        while self._parent[key] != key:
            self._parent[key] = key = self._parent[self._parent[key]]
        return key

    def objects(self) -> list[list[_Key]]:
        """Return the groups, in the order of their first tiles."""
        return sorted(sorted(members) for members in self._members.values())


class _Objects:
    """The objects that groups of masks show. Their masks are merged when they are needed: all may be too many."""

    def __init__(self, groups: list[list[_Key]], tiles: _Decoded, grid: TileGrid):
        self._tiles, self._grid = tiles, grid
        self._groups: list[list[_Key]] = []
        scores, areas, boxes = [], [], []
        for group in groups:
            one = _merged(tiles.of_group(group), grid)
            if one is not None:
                self._groups.append(group)
                scores.append(one.score)
                areas.append(one.mask.area)
                boxes.append(one.mask.box_xyxy)
        self._scores, self._extents = scores, _Extents.of(areas, boxes)

    def __getitem__(self, index: int) -> TiledObject:
        one = _merged(self._tiles.of_group(self._groups[index]), self._grid)
        assert one is not None
        return one

    def without_duplicates(self, nms_iou: float) -> list[int]:
        """Return the indices of the objects that stay, in order."""
        from torchvision.ops import nms

        boxes = torch.from_numpy(self._extents.boxes_xyxy).float()
        kept = nms(boxes, torch.tensor(self._scores, dtype=torch.float32, device="cpu"), nms_iou).tolist()
        if len(self._grid) == 1:  # the image in one pass, whose masks stay as they are
            return sorted(kept)
        worse = self._same_masks(sorted(kept), nms_iou)
        left_out: set[int] = set()
        for index in kept:  # the best first
            if index not in left_out:
                left_out |= worse[index]
        return sorted(set(kept) - left_out)

    def _same_masks(self, indices: list[int], iou: float) -> dict[int, set[int]]:
        """Return for each of the objects the worse ones whose masks have an IoU with its mask above `iou`."""
        extents = _Extents(self._extents.areas[indices], self._extents.boxes_xyxy[indices])
        worse: dict[int, set[int]] = {index: set() for index in indices}
        for place, index in enumerate(indices):
            bounds = extents.iou_bounds(extents.areas[place], extents.boxes_xyxy[place])
            others = [indices[other] for other in np.flatnonzero(bounds > iou).tolist() if other > place]
            mask = self[index].mask if others else None
            for other in others:
                if mask is not None and mask.iou(self[other].mask) > iou:
                    better, rest = sorted((index, other), key=lambda each: (-self._scores[each], each))
                    worse[better].add(rest)
        return worse


def _merged(masks: list[_TileMask], grid: TileGrid) -> TiledObject | None:
    """Return the object that masks of several tiles show, or None for a fragment."""
    complete = [mask for mask in masks if not any(mask.cut)]
    best = max(masks, key=lambda mask: mask.score)
    union = SpanMask.union([mask.mask for mask in masks])
    is_cut = False
    if complete:
        chosen = max(complete, key=lambda mask: mask.score)
        # Where another tile sees the object go on, a mask that ends earlier is not complete.
        if chosen.area >= 0.7 * union.area:
            union, best = chosen.mask, chosen
    elif len(masks) == 1:
        if _is_fragment(masks[0], grid):
            return None
        is_cut = True
    else:
        is_cut = _ends_at_a_seam(masks)
    return TiledObject(
        union, best.score, best.stability_score, best.point_xy, best.tile.box_xyxy, len(masks), is_cut
    )  # fmt: skip


def _ends_at_a_seam(masks: list[_TileMask]) -> bool:
    """Return whether one of the masks is cut at a side beyond which none of the other tiles goes on."""
    for mask in masks:
        edges = mask.tile.box_xyxy
        others = [other.tile.box_xyxy for other in masks if _overlap(other.tile.box_xyxy, edges) and other is not mask]
        for side, is_cut in enumerate(mask.cut):
            beyond = [box[side] > edges[side] if side > 1 else box[side] < edges[side] for box in others]
            if is_cut and not any(beyond):
                return True
    return False


def _is_fragment(mask: _TileMask, grid: TileGrid) -> bool:
    """Return whether a cut mask lies mostly in the overlaps at the sides that cut it, where a neighbour sees more."""
    shared = 0
    for side, (down, across) in enumerate(((0, -1), (-1, 0), (0, 1), (1, 0))):
        neighbour = grid.at(mask.tile.row + down, mask.tile.column + across)
        if mask.cut[side] and neighbour is not None:
            box = _overlap(mask.tile.box_xyxy, neighbour.box_xyxy)
            shared = max(shared, 0 if box is None else mask.mask.clip(box).area)
    return shared > 0.5 * mask.area


def _overlap(box: Window, other: Window) -> Window | None:
    """Return the intersection of two boxes, or None where there is none."""
    x1, y1 = max(box[0], other[0]), max(box[1], other[1])
    x2, y2 = min(box[2], other[2]), min(box[3], other[3])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
