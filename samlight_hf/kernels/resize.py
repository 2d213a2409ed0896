"""Resizing and normalizing of images in one kernel, bit for bit as torch does it on a CPU.

torch resizes uint8 with integer arithmetic on a CPU, and in floating point with another rounding on a GPU. A few pixels
then differ by one level, which can change whether a mask passes a threshold. So the integer arithmetic is repeated
here: columns first, then rows, each as a sum of a few neighbours with integer weights, rounded to uint8.

After that each channel has one of 256 levels. A table holds the pixel value of each level, so the Triton kernel writes
exact pixel values in the model's dtype, whatever the normalization. It resizes the columns of a source row again for
each output row that needs it, which saves a second launch and a buffer.
"""

import math
from functools import lru_cache

import torch

from ..utils.turns import read_here
from .support import launch_again, on_device_of, tl, triton, why_not_tried


_LINES, _COLUMNS = 8, 128  # of a thread block


def resize_into(pixel_values: torch.Tensor, image: torch.Tensor, size: tuple[int, int], levels: torch.Tensor):
    """Resize an image and write it to the top left of `pixel_values`, and zeros elsewhere.

    All tensors are on the same device.

    Args:
        pixel_values: (C, H, W), the model's input, to be written.
        image: uint8 (C, h, w), with any strides.
        size: (height, width) of the resized image.
        levels: (C, 256), in the dtype of `pixel_values`: the pixel value of each level of uint8.

    Raises:
        ValueError: if `size` is larger than `pixel_values`.
    """
    if size[0] > pixel_values.shape[1] or size[1] > pixel_values.shape[2]:
        raise ValueError(
            f"an image resized to {size[1]}x{size[0]} pixels does not fit into "
            f"{pixel_values.shape[2]}x{pixel_values.shape[1]}: the image processor's size['longest_edge'] must be "
            "at most its pad_size."
        )
    if why_not_triton(pixel_values):
        resize_into_reference(pixel_values, image, size, levels)
    else:
        launch_resize(pixel_values, image, size, levels)


def resize_into_reference(pixel_values: torch.Tensor, image: torch.Tensor, size: tuple[int, int], levels: torch.Tensor):
    """Compute `resize_into` step by step."""
    resized = resize_uint8(image, size)
    pixel_values.zero_()
    pixel_values[:, : size[0], : size[1]] = levels.gather(1, resized.flatten(1).long()).view(resized.shape)


def resize_uint8(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize uint8 (C, H, W) to (C, *size), bilinear with antialiasing, as torch does it on a CPU with AVX2."""
    for dim, length in ((2, size[1]), (1, size[0])):
        if image.shape[dim] != length:
            image = _resize_axis(image, dim, length)
    return image


def _resize_axis(image: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    table, shift = _device_weights(image.shape[dim], length, image.device)
    shape = [1, 1, 1]
    shape[dim] = length
    total: int | torch.Tensor = 1 << (shift - 1)
    for neighbour, weight in enumerate(table[1:]):
        source = (table[0] + neighbour).clamp_(max=image.shape[dim] - 1)
        total = image.index_select(dim, source).int().mul_(weight.view(shape)).add_(total)
    assert isinstance(total, torch.Tensor)  # each pixel has a neighbour
    return (total >> shift).clamp_(max=255).to(torch.uint8)


@lru_cache(maxsize=256)
def _device_weights(source_length: int, length: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Return `_integer_weights` with the table on the device, where it is kept for later calls."""
    table, shift = _integer_weights(source_length, length)
    return table.to(device), shift


@lru_cache(maxsize=64)
def _integer_weights(source_length: int, length: int) -> tuple[torch.Tensor, int]:
    """Compute the integer weights of resizing an axis.

    The weights are those of a triangle filter over the pixels it covers, normalized, times the largest power of two at
    which the largest of them stays below 2^15. Neighbours beyond the last pixel have weight 0. On an axis that keeps
    its length each pixel has one neighbour, itself.

    Returns:
        An int32 table (1 + neighbours, length): for each result its first source pixel and its neighbours' weights; and
        the exponent of that power of two.
    """
    scale = source_length / length
    support = max(scale, 1.0)
    centre = scale * (torch.arange(length, dtype=torch.float64, device="cpu") + 0.5)
    first = (centre - support + 0.5).long().clamp(min=0)
    count = (centre + support + 0.5).long().clamp(max=source_length) - first
    neighbour = torch.arange(math.ceil(support) * 2 + 1, device="cpu")[:, None]
    weights = (1 - ((neighbour + first - centre + 0.5) / support).abs()).clamp(min=0)
    weights = torch.where(neighbour < count, weights, 0.0)
    weights = weights / weights.sum(dim=0)
    largest = weights.max().item()
    shift = 0
    while shift < 22 and int(0.5 + largest * (1 << (shift + 1))) < 1 << 15:
        shift += 1
    used = weights.gt(0).any(dim=1).nonzero().max().item() + 1
    return torch.cat([first[None], (weights[:used] * (1 << shift) + 0.5).long()]).int(), shift


def why_not_triton(pixel_values: torch.Tensor) -> str | None:
    """Return why the kernel cannot write these pixel values, as a sentence, or None if it can."""
    if triton is None:
        return "Triton is not installed."
    if not pixel_values.is_cuda:
        return f"the tensors are on {pixel_values.device}."
    if not pixel_values.is_contiguous():
        return "the pixel values are not contiguous."
    return _why_not_tried(pixel_values.device, len(pixel_values), pixel_values.dtype)


def _why_not_tried(device: torch.device, channels: int, dtype: torch.dtype) -> str | None:
    def attempt() -> bool:
        image = torch.arange(channels * 9 * 14, device=device).mul_(7).to(torch.uint8).view(channels, 9, 14)
        levels = torch.linspace(-2, 2, channels * 256, device=device).view(channels, 256).to(dtype)
        pixel_values, expected = torch.empty(2, channels, 16, 16, device=device, dtype=dtype)
        for layout in (image, image.movedim(0, 2).contiguous().movedim(2, 0)):
            launch_resize(pixel_values, layout, (8, 13), levels)
            resize_into_reference(expected, layout, (8, 13), levels)
            if not torch.equal(pixel_values, expected):
                return False
        return True

    return why_not_tried("resizing images", device, (channels, dtype), attempt)


def launch_resize(pixel_values: torch.Tensor, image: torch.Tensor, size: tuple[int, int], levels: torch.Tensor):
    """Run `resize_into` in the kernel."""
    (channels, height, width), (_, padded_height, padded_width) = image.shape, pixel_values.shape
    table_y, shift_y = _device_weights(height, size[0], image.device)
    table_x, shift_x = _device_weights(width, size[1], image.device)
    for table in (table_y, table_x, levels):  # shared by all streams, and may be dropped by a cache
        read_here(table)
    grid = -(-channels * padded_height // _LINES), -(-padded_width // _COLUMNS), 1
    numbers = (
        *image.stride(), height, width, len(table_y) - 1, shift_y, len(table_x) - 1, shift_x, *size,
        padded_height, padded_width,
    )  # fmt: skip
    tensors, constants = (image, table_y, table_x, levels, pixel_values), (channels, _LINES, _COLUMNS)
    with on_device_of(image):
        if max(image.stride()) < 2**31:
            launch_again(_resize_kernel, grid, tensors, numbers, constants, num_warps=4)
        else:
            _resize_kernel[grid](*tensors, *numbers, *constants)


if triton is not None:
    # Properties that differ between images are not compiled into the kernel. Nor is the width of the pixel values: with
    # rows known to be aligned, a thread would write 8 columns and then also read 8, whose bytes lie far apart.
    _STRIDES, _WEIGHTS = ["channel_stride", "row_stride", "column_stride"], ["num_neighbours_y", "num_neighbours_x"]
    _SIZES = ["height", "width", "new_height", "new_width", "padded_height", "padded_width"]

    @triton.jit(
        do_not_specialize=[*_STRIDES, *_WEIGHTS, "shift_y", "shift_x", *_SIZES],
        do_not_specialize_on_alignment=["image"],
    )
    def _resize_kernel(
        image, table_y, table_x, levels, pixel_values, channel_stride, row_stride, column_stride, height, width,
        num_neighbours_y, shift_y, num_neighbours_x, shift_x, new_height, new_width, padded_height, padded_width,
        CHANNELS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Compute a block of `pixel_values` (CHANNELS, padded height, padded width).

        Its lines are the rows of all channels, with the channels of a row next to each other. So a thread block finds
        the channels of an image that is stored as (height, width, channels) in the same cache lines.
        """
        first_line, first_column = tl.program_id(0) * LINES, tl.program_id(1) * COLUMNS
        line = first_line + tl.arange(0, LINES)[:, None]
        row, channel = line // CHANNELS, (line % CHANNELS).to(tl.int64)
        column = first_column + tl.arange(0, COLUMNS)[None, :]
        values = tl.zeros((LINES, COLUMNS), pixel_values.dtype.element_ty)
        if (first_line // CHANNELS < new_height) & (first_column < new_width):
            # Beyond the new size the last pixel is computed again and discarded, which avoids masks in the loops.
            y, x = tl.minimum(row, new_height - 1), tl.minimum(column, new_width - 1)
            step = column_stride.to(tl.int64)
            first_row, first_place, last_place = tl.load(table_y + y), tl.load(table_x + x) * step, (width - 1) * step
            total = tl.zeros((LINES, COLUMNS), tl.int32) + (1 << (shift_y - 1))
            for neighbour_y in range(num_neighbours_y):
                source_row = tl.minimum(first_row + neighbour_y, height - 1).to(tl.int64)
                source = image + channel * channel_stride + source_row * row_stride
                line_total = tl.zeros((LINES, COLUMNS), tl.int32) + (1 << (shift_x - 1))
                for neighbour_x in range(num_neighbours_x):
                    place = tl.minimum(first_place + neighbour_x * step, last_place)
                    weight_x = tl.load(table_x + (neighbour_x + 1) * new_width + x)
                    line_total += tl.load(source + place).to(tl.int32) * weight_x
                weight_y = tl.load(table_y + (neighbour_y + 1) * new_height + y)
                total += tl.minimum(line_total >> shift_x, 255) * weight_y
            resized = tl.load(levels + channel * 256 + tl.minimum(total >> shift_y, 255))
            values = tl.where((row < new_height) & (column < new_width), resized, values)
        output = pixel_values + (channel * padded_height + row) * padded_width + column
        tl.store(output, values, mask=(row < padded_height) & (column < padded_width))
