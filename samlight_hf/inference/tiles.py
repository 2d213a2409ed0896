"""Everything mode in overlapping tiles, for images that are too large, or whose objects are too small, for one pass.

Each tile is segmented as an image of its own, and `merge_tiles` in `samlight_hf/inference/tile_merging.py` makes
objects of the masks of all tiles. They wait in a `TileStore`, in memory or in files, so that memory does not grow with
the image and a run can go on after an interruption.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..images.rasters import Raster, Window
from ..images.reading import read_ahead
from ..masks.results import GeneratedMasks
from ..masks.rle import RunLengthMasks


_LEAST_DATA = 0.5  # share of a mask's pixels that must hold data


@dataclass(frozen=True)
class TileSettings:
    """The tiles that a large image is segmented in.

    Attributes:
        size: side of a tile in pixels of the image. Tiles of the model's `image_size` are seen at full resolution,
            smaller ones enlarged.
        overlap: of neighbouring tiles, in pixels, at least. An object that is smaller is complete in one of them.
        match_iou: IoU, where two tiles overlap, from which on two masks are one object.

    Raises:
        ValueError: for a size below 1, an overlap that is not smaller than the size, and an IoU outside of 0 to 1.
    """

    size: int = 1024
    overlap: int = 256
    match_iou: float = 0.5

    def __post_init__(self):
        for name, least in (("size", 1), ("overlap", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} of tiles must be an integer of at least {least}.")
        if self.overlap >= self.size:
            raise ValueError(
                f"overlap={self.overlap} of tiles must be smaller than their size={self.size}: a quarter of it, "
                f"{self.size // 4}."
            )
        if not 0 < self.match_iou <= 1:
            raise ValueError(f"match_iou={self.match_iou!r} must be above 0 and at most 1.")

    @classmethod
    def of(cls, size: int, overlap: int | None) -> "TileSettings":
        """Return tiles of a size, which overlap by a quarter of it where no overlap is given."""
        return cls(size, size // 4 if overlap is None else overlap)


class Tile(NamedTuple):
    """A tile of the grid: its place (row, column), and its box in pixels of the image."""

    row: int
    column: int
    box_xyxy: Window


@dataclass(frozen=True)
class TileGrid:
    """Overlapping tiles that cover an image; an image smaller than a tile has one, of its own size.

    Tiles are spread evenly, so that their overlap is at least the one that was asked for.
    """

    height: int
    width: int
    settings: TileSettings

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        return len(self._starts[0]), len(self._starts[1])

    def __len__(self) -> int:
        return math.prod(self.shape)

    def __iter__(self) -> Iterator[Tile]:
        """Iterate over the tiles, row by row."""
        for place in product(*map(range, self.shape)):
            yield self._tile(*place)

    def at(self, row: int, column: int) -> Tile | None:
        """Return the tile at a place, or None outside of the grid."""
        rows, columns = self.shape
        return self._tile(row, column) if 0 <= row < rows and 0 <= column < columns else None

    def _tile(self, row: int, column: int) -> Tile:
        size, y, x = self.settings.size, self._starts[0][row], self._starts[1][column]
        return Tile(row, column, (x, y, min(x + size, self.width), min(y + size, self.height)))

    @cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        """The first rows and the first columns of the tiles."""
        return self._along(self.height), self._along(self.width)

    def _along(self, length: int) -> list[int]:
        size, overlap = self.settings.size, self.settings.overlap
        if length <= size:
            return [0]
        count = math.ceil((length - overlap) / (size - overlap))
        return [round(index * (length - size) / (count - 1)) for index in range(count)]


class TileStore(Protocol):
    """Where the masks of finished tiles wait."""

    def has(self, tile: Tile) -> bool:
        """Return whether the tile is finished."""

    def put(self, tile: Tile, masks: GeneratedMasks) -> None:
        """Keep the masks of a tile, in its own pixels."""

    def get(self, tile: Tile) -> GeneratedMasks:
        """Return what `put` was given."""


class MemoryStore:
    """A `TileStore` in memory."""

    def __init__(self):
        self._masks: dict[tuple[int, int], GeneratedMasks] = {}

    def has(self, tile: Tile) -> bool:
        return tile[:2] in self._masks

    def put(self, tile: Tile, masks: GeneratedMasks) -> None:
        self._masks[tile[:2]] = masks

    def get(self, tile: Tile) -> GeneratedMasks:
        return self._masks[tile[:2]]


def segment_tiles(
    segment: Callable[[torch.Tensor], GeneratedMasks], raster: Raster, grid: TileGrid, store: TileStore, progress=None
) -> int:
    """Segment the tiles that are not in the store yet. The next tiles are read meanwhile.

    Args:
        segment: from a tile's pixels, uint8 (3, h, w), to its masks.
        raster: the image.
        grid: its tiles.
        store: gets the masks of each tile.
        progress: an object such as a tqdm bar, whose `update` is called after each tile.

    Returns:
        The number of tiles that hold no data, and have no masks.
    """
    num_empty = 0
    to_do = [tile for tile in grid if not store.has(tile)]

    def read(tile: Tile) -> tuple[Tile, torch.Tensor, np.ndarray]:
        return tile, *raster.read(tile.box_xyxy)

    for tile, pixels, valid in read_ahead(read, to_do):
        if valid.any():
            masks = _with_data(segment(pixels), valid)
        else:
            masks, num_empty = _no_masks(*valid.shape), num_empty + 1
        store.put(tile, masks)
        if progress is not None:
            progress.update(1)
    return num_empty


def _with_data(masks: GeneratedMasks, valid: np.ndarray) -> GeneratedMasks:
    """Cut masks to the pixels that hold data, and leave out those that lie mostly where there is none."""
    if valid.all() or not len(masks):
        return masks
    pixels = masks.masks.to_masks()
    areas = pixels.sum(axis=(1, 2))
    pixels &= valid
    kept = np.flatnonzero(pixels.sum(axis=(1, 2)) > _LEAST_DATA * areas)
    masks = masks[kept]
    return GeneratedMasks(
        RunLengthMasks.from_masks(pixels[kept]), masks.scores, masks.boxes_xyxy, masks.stability_scores,
        masks.points_xy, masks.crop_boxes_xyxy,
    )  # fmt: skip


def _no_masks(height: int, width: int) -> GeneratedMasks:
    empty = np.zeros(0, dtype=np.float32)
    boxes = empty.reshape(0, 4)
    masks = RunLengthMasks.from_masks(np.zeros((0, height, width), dtype=bool))
    return GeneratedMasks(masks, empty, boxes, empty, empty.reshape(0, 2), boxes)
