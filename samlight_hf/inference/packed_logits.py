"""Logits of masks without the parts that no pixel of a mask depends on: most masks are small.

The logits of a mask are cut into tiles, and the tiles around its box are kept. In the others logits count as lowest
possible: pixels inside the box are computed without them, and pixels outside, which are below the threshold, stay below
it. So masks of the image's size are the same to the bit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kernels.upscaled_masks import Frame


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


def pack_logits(logits: torch.Tensor, boxes: torch.Tensor, frame: Frame, kept: torch.Tensor) -> PackedLogits:
    """Keep the tiles of logits that the masks of the image's size depend on; waits for the device once.

    Args:
        logits: (n, h, w).
        boxes: (n, 4), the first and the last pixel of each mask, XYXY, in pixels of the image.
        frame: The place of the logits in the image.
        kept: bool (n,), the masks to pack.

    Returns:
        The logits of the masks that are kept.
    """
    height, width = logits.shape[1:]
    tile_height, tile_width = (_TILE if length % _TILE == 0 else length for length in (height, width))
    needed = []
    for axis, (length, tile) in enumerate(((width, tile_width), (height, tile_height))):
        first, last = _reach(boxes[:, axis], boxes[:, axis + 2], axis, length, frame)
        starts = torch.arange(0, length, tile, device=logits.device)
        needed.append((last[:, None] >= starts) & (first[:, None] < starts + tile))
    columns, rows = needed
    chosen = (rows[:, :, None] & columns[:, None, :] & kept[:, None, None]).nonzero()
    masks, rows, columns = chosen.unbind(1)
    tiled = logits.view(len(logits), height // tile_height, tile_height, width // tile_width, tile_width)
    return PackedLogits(tiled[masks, rows, :, columns], masks, rows, columns, (len(logits), height, width))


def columns_of(boxes: torch.Tensor, frame: Frame, width: int) -> torch.Tensor:
    """Return the first and the last column of logits, of `width`, that each mask can depend on: int32 (n, 2).

    Args:
        boxes: As in `pack_logits`.
        frame: Likewise.
        width: The number of columns.
    """
    first, last = _reach(boxes[:, 0], boxes[:, 2], 0, width, frame)
    return torch.stack([first.floor(), last.ceil()], dim=1).int()


def _reach(first: torch.Tensor, last: torch.Tensor, axis: int, length: int, frame: Frame):
    """Return the first and the last logit on an axis (0 is x) that pixels from `first` to `last` are computed from."""
    sizes = frame.padded, frame.resized, frame.crop, frame.corner
    padded, resized, crop, corner = (size[1 - axis] for size in sizes)
    scale = length / padded  # of the first resize; the second one reads less than a pixel beyond its place
    # One more than that, since places are rounded.
    reach = scale + 2.0
    first, last = ((place.float() - corner + 0.5) * (scale * resized / crop) - 0.5 for place in (first, last))
    return (first - reach).clamp(0, length - 1), (last + reach).clamp(0, length - 1)
