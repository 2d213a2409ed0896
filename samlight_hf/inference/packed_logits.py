"""Logits of masks without the parts that no pixel of a mask depends on: most masks are small.

The logits of a mask are cut into tiles, and the tiles around its box are kept. In the others logits count as lowest
possible: pixels inside the box are computed without them, and pixels outside, which are below the threshold, stay below
it. So masks of the image's size are the same to the bit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kernels.upscaled_masks import Frame
from ..utils.host_copies import HostCopy
from ..utils.turns import read_here


_TILE = 16


class PackedLogits(NamedTuple):
    """Logits of some of n masks, on their device.

    Attributes:
        tiles: (t, th, tw), the tiles that are kept.
        masks: int64 (t,), the mask of each tile, ascending.
        rows: int64 (t,), the row of each tile among those of its mask.
        columns: int64 (t,), likewise.
        shape: (n, h, w).
    """

    tiles: torch.Tensor
    masks: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """The memory of the tiles."""
        return self.tiles.nbytes


def unpack_logits(parts: Sequence[tuple[PackedLogits, torch.Tensor]], count: int) -> torch.Tensor:
    """Return logits of chosen masks, without waiting for the device.

    Args:
        parts: Packed logits of one size, and of each int64 (n,), the place of each mask in the result, or `count` for
            those that are not chosen. Chosen masks must be kept.
        count: The number of chosen masks.

    Returns:
        (count, h, w), with the lowest number of the dtype where no tile was kept.
    """
    first = parts[0][0]
    (_, height, width), (tile_height, tile_width) = first.shape, first.tiles.shape[1:]
    # The other masks are written to one more place, which is cut off.
    logits = first.tiles.new_full((count + 1, height, width), torch.finfo(first.tiles.dtype).min)
    tiled = logits.view(count + 1, height // tile_height, tile_height, width // tile_width, tile_width)
    for packed, places in parts:
        tiled[places[packed.masks], packed.rows, :, packed.columns] = packed.tiles
    return logits[:count]


class Place(NamedTuple):
    """Where the masks of a crop lie; a box there, times `factors`, plus `summands`, is in tiles.

    Attributes:
        frame: The place of their logits in the image.
        factors: float32 (4,).
        summands: float32 (4,).
        tiles: float32 (t,), numbers from 0, of the rows or columns of tiles, whichever are more.
    """

    frame: Frame
    factors: torch.Tensor
    summands: torch.Tensor
    tiles: torch.Tensor

    @classmethod
    def make(cls, frame: Frame, height: int, width: int) -> "Place":
        """Compute a place, on a CPU, for logits of `height` and `width`.

        A box times the factors, plus the summands, is then one less than the first place, and the last one, that its
        pixels are computed from, XYXY.
        """
        factors, summands, (tile_height, tile_width) = [], [], _tile_size(height, width)
        for axis, (length, tile) in enumerate(((width, tile_width), (height, tile_height))):
            factor, summand, reach = _places(axis, length, frame)
            factors.append(factor / tile)
            summands.append([(summand - reach) / tile - 1, (summand + reach) / tile])
        (left, right), (top, bottom) = summands
        tiles = torch.arange(max(height // tile_height, width // tile_width), dtype=torch.float32)
        of_boxes = torch.tensor([factors * 2, [left, top, right, bottom]], dtype=torch.float32)
        return cls(frame, of_boxes[0], of_boxes[1], tiles)


class NeededTiles:
    """The tiles of logits that masks of the image's size depend on; nothing here waits for the device but `pack`.

    Args:
        logits: (n, h, w).
        boxes: float32 (n, 4), the first and the last pixel of each mask, XYXY, in pixels of the image.
        kept: bool (n,), the masks to pack.
        place: Of the masks, on the device.
    """

    def __init__(self, logits: torch.Tensor, boxes: torch.Tensor, kept: torch.Tensor, place: Place):
        self._logits, (height, width) = logits, logits.shape[1:]
        self._tile_size = tile_height, tile_width = _tile_size(height, width)
        num_rows, num_columns = height // tile_height, width // tile_width
        reach = torch.addcmul(place.summands, boxes, place.factors).unsqueeze(2)  # (n, 4, 1)
        needed = (reach[:, 2:] >= place.tiles) & (reach[:, :2] < place.tiles) & kept[:, None, None]
        self._needed = needed[:, 1, :num_rows, None] & needed[:, 0, None, :num_columns]
        self._count = HostCopy(self._needed.sum())

    def pack(self) -> PackedLogits:
        """Return the logits of the masks that are kept, on any stream; waits until their number is known."""
        count, (tile_height, tile_width) = int(self._count.wait()[0]), self._tile_size
        logits, needed = read_here(self._logits), read_here(self._needed)
        if count:
            masks, rows, columns = needed.nonzero_static(size=count).unbind(1)
        else:
            masks, rows, columns = torch.zeros(3, 0, dtype=torch.int64, device=logits.device)
        num_masks, num_rows, num_columns = needed.shape
        tiled = logits.view(num_masks, num_rows, tile_height, num_columns, tile_width)
        shape = num_masks, num_rows * tile_height, num_columns * tile_width
        return PackedLogits(tiled[masks, rows, :, columns], masks, rows, columns, shape)


def columns_of(boxes: torch.Tensor, frame: Frame, width: int) -> torch.Tensor:
    """Return the first and the last column of logits, of `width`, that each mask can depend on: int32 (n, 2).

    Args:
        boxes: As in `NeededTiles`.
        frame: The place of the logits in the image.
        width: The number of columns.
    """
    factor, summand, reach = _places(0, width, frame)
    places = boxes[:, 0::2] * factor
    first, last = places[:, 0] + (summand - reach), places[:, 1] + (summand + reach)
    return torch.stack([first.floor_(), last.ceil_()], dim=1).clamp_(0, width - 1).int()


def _tile_size(height: int, width: int) -> tuple[int, int]:
    tile_height, tile_width = (_TILE if length % _TILE == 0 else length for length in (height, width))
    return tile_height, tile_width


def _places(axis: int, length: int, frame: Frame) -> tuple[float, float, float]:
    """Return a factor, a summand and a distance for the logits on an axis (0 is x).

    A pixel times the factor, plus the summand, is its place among the logits. It is computed from logits that are no
    farther than the distance from there.
    """
    sizes = frame.padded, frame.resized, frame.crop, frame.corner
    padded, resized, crop, corner = (size[1 - axis] for size in sizes)
    scale = length / padded  # of the first resize; the second one reads less than a pixel beyond its place
    factor = scale * resized / crop
    # One more than that, since places are rounded.
    return factor, (0.5 - corner) * factor - 0.5, scale + 2.0
