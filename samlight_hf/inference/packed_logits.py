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


class NeededTiles:
    """The tiles of logits that masks of the image's size depend on; nothing here waits for the device but `pack`.

    Args:
        logits: (n, h, w).
        boxes: float32 (n, 4), the first and the last pixel of each mask, XYXY, in pixels of the image.
        kept: bool (n,), the masks to pack.
        reach: float32 (2, 4), `reach_of` the frame and the logits' size, on the device.
    """

    def __init__(self, logits: torch.Tensor, boxes: torch.Tensor, kept: torch.Tensor, reach: torch.Tensor):
        self._logits, (height, width) = logits, logits.shape[1:]
        self._tile_size = tile_height, tile_width = _tile_size(height, width)
        num_rows, num_columns = height // tile_height, width // tile_width
        first, last = torch.addcmul(reach[1], boxes, reach[0])[:, :, None].split(2, dim=1)  # in tiles, (n, 2, 1) each
        tiles = torch.arange(max(num_rows, num_columns), device=logits.device)
        needed = (last >= tiles) & (first < tiles + 1) & kept[:, None, None]
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


def reach_of(frame: Frame, height: int, width: int) -> torch.Tensor:
    """Return factors and summands that lead from a mask's box to the tiles of its logits.

    Args:
        frame: The place of the logits in the image.
        height: Of the logits.
        width: Likewise.

    Returns:
        float32 (2, 4): a box as in `NeededTiles`, times the first, plus the second, is the first place and the last one
        that its pixels are computed from, XYXY, in tiles.
    """
    factors, summands = [], []
    for axis, (length, tile) in enumerate(zip((width, height), reversed(_tile_size(height, width)))):
        factor, summand, reach = _places(axis, length, frame)
        factors.append(factor / tile)
        summands.append([(summand - reach) / tile, (summand + reach) / tile])
    (left, right), (top, bottom) = summands
    return torch.tensor([factors * 2, [left, top, right, bottom]], dtype=torch.float32)


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
