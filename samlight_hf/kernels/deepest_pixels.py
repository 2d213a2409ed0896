"""The deepest pixel of each mask: the one farthest from the outside of the mask, as simulated clicks need it.

Squared distances between pixels are integers, so no pixel is chosen by rounding. The first kernel finds the distance of
each pixel to the nearest one outside in its row. The second combines these distances in the rows above and below with
the number of rows between. It stops where no row is near enough to matter, or a deeper pixel of the mask is known.
"""

import torch

from .support import launch_again, on_device_of, tl, triton, why_not_tried


_COLUMNS = 256  # of a thread block
_MOST_COLUMNS = 2**15  # of a mask: half of it is stored as int16
_LOW_BITS = 2**32 - 1


def deepest_pixels_reference(masks: torch.Tensor) -> torch.Tensor:
    """Compute `launch_deepest_pixels` step by step, with memory for all pairs of pixels in a column."""
    _, height, width = masks.shape
    x, y = (torch.arange(length, device=masks.device) for length in (width, height + 2))
    last = torch.where(masks, -1, x).cummax(dim=2).values
    following = torch.where(masks, width, x).flip(2).cummin(dim=2).values.flip(2)
    distances = torch.nn.functional.pad(torch.minimum(x - last, following - x), (0, 0, 1, 1))  # 0 above and below
    apart = (y[1:-1, None] - y)[:, :, None]
    depths = (distances[:, None] ** 2 + apart**2).amin(dim=2).flatten(1)
    depth = depths.amax(dim=1)
    place = (depths == depth[:, None]).int().argmax(dim=1)  # the first
    return torch.stack([place % width, place // width, depth], dim=1)


def why_not_triton(masks: torch.Tensor) -> str | None:
    """Return why the kernels cannot run on masks bool (n, H, W), as a sentence, or None if they can."""
    if triton is None:
        return "Triton is not installed."
    if not masks.is_cuda:
        return f"the masks are on {masks.device}."
    if masks.shape[2] > _MOST_COLUMNS:
        return f"masks of {masks.shape[2]} columns are wider than {_MOST_COLUMNS}."
    return _why_not_tried(masks.device, _row_block(masks.shape[2]))


def _row_block(width: int) -> int:
    """Return the number of columns that the first kernel is compiled for."""
    return triton.next_power_of_2(max(width, 16))


def _why_not_tried(device: torch.device, columns: int) -> str | None:
    def attempt() -> bool:
        masks = torch.ones(4, 5, columns - 3, dtype=torch.bool, device=device)
        masks[0, 2, 3:] = masks[1] = masks[2, 1:, ::7] = masks[3, :, -9] = False
        return torch.equal(launch_deepest_pixels(masks), deepest_pixels_reference(masks))

    return why_not_tried("clicks", device, columns, attempt, fallback="Searches on the CPU")


def launch_deepest_pixels(masks: torch.Tensor) -> torch.Tensor:
    """Find the deepest pixel of each mask without waiting for the device. All pixels beyond the border are outside.

    Args:
        masks: bool (n, H, W), of at most `_MOST_COLUMNS` columns.

    Returns:
        int64 (n, 3): x and y, of several deepest pixels the first in raster order, and the squared depth; zeros for an
        empty mask.
    """
    num_masks, height, width = masks.shape
    if not masks.numel():
        return torch.zeros(num_masks, 3, dtype=torch.int64, device=masks.device)
    masks = masks.contiguous()
    distances = torch.empty_like(masks, dtype=torch.int16)
    # The squared depth, and behind it bits that are larger for pixels that come first.
    keys = torch.full((num_masks,), _LOW_BITS, dtype=torch.int64, device=masks.device)
    rows, sizes, columns = num_masks * height, (height, width), _row_block(width)
    with on_device_of(masks):
        tensors, num_warps = (masks, distances), min(8, max(1, columns // 256))
        launch_again(_row_distances_kernel, (rows, 1, 1), tensors, sizes, (columns,), num_warps=num_warps)
        grid = rows, triton.cdiv(width, _COLUMNS), 1
        launch_again(_depths_kernel, grid, (distances, keys), sizes, (_COLUMNS,), num_warps=1)
    place = _LOW_BITS - (keys & _LOW_BITS)
    return torch.stack([place % width, place // width, keys >> 32], dim=1)


if triton is not None:

    @triton.jit
    def _larger(a, b):
        return tl.maximum(a, b)

    @triton.jit
    def _smaller(a, b):
        return tl.minimum(a, b)

    @triton.jit(do_not_specialize=["height", "width"])
    def _row_distances_kernel(masks, distances, height, width, COLUMNS: tl.constexpr):
        """Write the distance of each pixel of a row to the nearest one outside in this row, 0 for those outside."""
        start = tl.program_id(0).to(tl.int64) * width
        x = tl.arange(0, COLUMNS)
        inside = tl.load(masks + start + x, mask=x < width, other=0).to(tl.int32)
        distance = tl.zeros((COLUMNS,), tl.int32)
        if tl.max(inside) > 0:
            last = tl.associative_scan(tl.where(inside > 0, -1, x), 0, _larger)
            following = tl.associative_scan(tl.where(inside > 0, width, x), 0, _smaller, reverse=True)
            distance = tl.minimum(x - last, following - x)
        tl.store(distances + start + x, distance.to(tl.int16), mask=x < width)

    @triton.jit(do_not_specialize=["height", "width"])
    def _depths_kernel(distances, keys, height, width, COLUMNS: tl.constexpr):
        """Raise a mask's key to the largest of some pixels in a row."""
        line = tl.program_id(0).to(tl.int64)
        mask, y = line // height, line % height
        x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        own = distances + line * width + x
        distance = tl.load(own, mask=x < width, other=0).to(tl.int32)
        squared = distance * distance
        most, step = tl.max(squared), 1
        known = tl.load(keys + mask) >> 32
        while (step * step < most) & (most >= known):
            above = tl.load(own - step * width, mask=(x < width) & (y >= step), other=0).to(tl.int32)
            below = tl.load(own + step * width, mask=(x < width) & (y + step < height), other=0).to(tl.int32)
            nearest = tl.minimum(above, below)
            squared = tl.minimum(squared, nearest * nearest + step * step)
            most = tl.max(squared)
            step += 1
        if (most > 0) & (most >= known):
            place = y * width + x
            key = (squared.to(tl.int64) << 32) + (0xFFFFFFFF - place)
            tl.atomic_max(keys + mask, tl.max(key))  # beyond the width `squared` is 0
