"""Fused linear layers on Hopper GPUs, by a CUDA kernel (linear.cu).

Triton's kernels leave the tensor cores idle while a tile is finished and written. Here they process the next tile.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..support import in_compile_thread, only_compiles
from . import runtime as hopper


if TYPE_CHECKING:
    from ..linear import FusedLinear


FEW_ROWS = 8192  # one or two images of 4096 rows
_BLOCK_M, _BLOCK_K, _THREADS = 128, 64, 384  # as in linear.cu
PATCH = 16  # side of a patch in pixels, likewise
_SHARED_BYTES = 227 * 1024  # limit of a thread block


@dataclass(frozen=True)
class Tile:
    """The kernel's division of work.

    Attributes:
        columns: of a tile, which has 128 rows.
        halves: of a tile, 64 rows each, that each of the two consumers takes: 2 if they take turns with whole tiles, 1
            if they divide every tile.
    """

    columns: int
    halves: int = 2

    def layout(self, in_features: int, adds: bool = False) -> tuple[bool, int, int]:
        """Plan the shared memory for layers of `in_features` input features, and of a residual if `adds`.

        Returns:
            Whether the weight for a tile's columns stays in shared memory, which it does if there is room for it beside
            four blocks of x; the number of blocks of x, and otherwise also of the weight, that are loaded ahead; and
            the size in bytes.
        """
        # The members of `Shared` in linear.cu: a block with its barriers, of 8 bytes each; and what there is once.
        x_bytes, weight_bytes = 2 * _BLOCK_K * _BLOCK_M + 2 * 8, 2 * _BLOCK_K * self.columns + 8
        rest, all_weights = 4 * self.columns + 2 * (4 * _BLOCK_M + 8), in_features // _BLOCK_K * weight_bytes
        if adds and self.halves == 2:
            rest += math.ceil(self.columns / 64) * 2 * 64 * _BLOCK_M + 3 * 8
        stays = rest + all_weights + 4 * x_bytes <= _SHARED_BYTES
        fixed, stage_bytes = (rest + all_weights, x_bytes) if stays else (rest, x_bytes + weight_bytes)
        stages = (_SHARED_BYTES - fixed) // stage_bytes
        return stays, stages, fixed + stages * stage_bytes


# The fastest tiles on an H100, the widest first.
TILES = (Tile(192), Tile(128), Tile(96), Tile(64))
NARROW_TILES = (Tile(96, 1), Tile(64, 1))  # for one tile per multiprocessor, whose end nothing hides


def hopper_tile(num_rows: int, out_features: int, normalizes: bool, gelu: bool) -> Tile:
    """Choose the tile: with few rows and no GELU a narrow one, so that all multiprocessors have as many columns.

    The end of a tile takes long after GELU, and is hidden only if another wide tile follows, even with few rows.
    """
    tiles: tuple[Tile, ...]
    if num_rows > FEW_ROWS or gelu:
        tiles = TILES
    else:
        tiles = TILES[2:] if normalizes else NARROW_TILES
    return next(tile for tile in tiles if out_features % tile.columns == 0)


@dataclass(frozen=True)
class Input:
    """The kernel's input x (rows, features), as a view of a tensor in five dimensions, the innermost first.

    Attributes:
        kind: "ROWS", "NEIGHBOURS" or "PATCHES", as in linear.cu.
        values: the tensor.
        num_rows: number of rows of x.
        features: number of features of x.
        sizes: of the five dimensions.
        strides: of all dimensions but the innermost, in elements.
        box: the part of the five dimensions that makes a block of 128 rows and 64 features.
        grid: (lines, columns) of an image's rows.
    """

    kind: str
    values: torch.Tensor
    num_rows: int
    features: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    grid: tuple[int, int] = (1, 1)


def rows_of(values: torch.Tensor) -> Input:
    """Describe a matrix (rows, features) as the kernel's input."""
    (num_rows, features), total = values.shape, values.numel()
    sizes, strides = (features, num_rows, 1, 1, 1), (features, total, total, total)
    return Input("ROWS", values, num_rows, features, sizes, strides, (_BLOCK_K, _BLOCK_M, 1, 1, 1))


def neighbours_of(values: torch.Tensor) -> Input:
    """Describe the 3 x 3 neighbourhoods of images (B, H, W, C) as the kernel's input.

    Features are in the order (y, x, channel), and zero outside the images.
    """
    batch_size, lines, columns, channels = values.shape
    sizes = channels, columns, lines, batch_size, 1
    strides = channels, channels * columns, channels * columns * lines, values.numel()
    # 128 consecutive places of an image.
    block = (columns, _BLOCK_M // columns) if columns < _BLOCK_M else (_BLOCK_M, 1)
    box = (_BLOCK_K, *block, 1, 1)
    num_rows = batch_size * lines * columns
    return Input("NEIGHBOURS", values, num_rows, 9 * channels, sizes, strides, box, (lines, columns))


def patches_of(pixel_values: torch.Tensor) -> Input:
    """Describe the patches of 16 x 16 pixels of images (B, C, S, S) as the kernel's input.

    Features are in the order (channel, y, x).
    """
    batch_size, channels, height, width = pixel_values.shape
    lines, columns = height // PATCH, width // PATCH
    # A line of a patch; its lines are the last dimension but one, so that those of a block are apart.
    sizes = PATCH, columns, batch_size * channels * lines, PATCH, 1
    strides = PATCH, PATCH * width, width, pixel_values.numel()
    block = (columns, _BLOCK_M // columns) if 0 < columns < _BLOCK_M else (_BLOCK_M, 1)
    box = (PATCH, *block, _BLOCK_K // PATCH, 1)
    num_rows, features = batch_size * lines * columns, channels * PATCH**2
    return Input("PATCHES", pixel_values, num_rows, features, sizes, strides, box, (lines, columns))


def why_not(layer: "FusedLinear", x: Input, residual: torch.Tensor | None = None) -> str | None:
    """Return why the kernel cannot run with these inputs, as a sentence, or None if it can."""
    out_features, in_features = layer.weight.shape
    if reason := hopper.why_not_hopper(layer.weight.device, layer.weight.dtype):
        return reason
    dtype, device = layer.weight.dtype, layer.weight.device
    for tensor in (x.values, *(() if residual is None else (residual,))):
        if (tensor.dtype, tensor.device) != (dtype, device):
            return f"the weights are {dtype} on {device}, the input {tensor.dtype} on {tensor.device}."
    if in_features % _BLOCK_K or out_features % 64 or x.num_rows % _BLOCK_M or not x.num_rows:
        return f"{x.num_rows} rows, {in_features} and {out_features} features are no multiples of 128, 64 and 64."
    if x.features != in_features or (residual is not None and residual.shape[1] != out_features):
        return f"the input does not have {in_features} features, or the residual not {out_features}."
    lines, columns = x.grid
    if residual is not None and (not len(residual) or len(residual) % _BLOCK_M or x.num_rows % len(residual)):
        return f"{x.num_rows} rows are no multiple of the residual's {len(residual)} rows, or those none of {_BLOCK_M}."
    if x.kind != "ROWS" and (lines * columns % _BLOCK_M or (columns % _BLOCK_M and _BLOCK_M % columns)):
        return f"images of {lines} x {columns} places cannot be divided into blocks of {_BLOCK_M}."
    if layer.gelu and layer.row_sums is None:
        return "it supports GELU only with a LayerNorm."
    if residual is not None and layer.row_sums is not None:
        return "it supports no residual with a LayerNorm."
    if not hopper.are_aligned(layer.weight, x.values, residual):
        return "the tensors are not contiguous, or begin at odd addresses."
    return None


def launch_linear(
    layer: "FusedLinear",
    x: Input,
    tile: Tile,
    output: torch.Tensor,
    x_statistics: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    num_processors: int | None = None,
):
    """Write the layer's result to `output`.

    Args:
        layer: the layer.
        x: its input.
        tile: the kernel's tile.
        output: (rows, N), to be written.
        x_statistics: float32 (parts, 2, rows), statistics of x's rows if the layer normalizes them.
        statistics: float32 (N / tile.columns, 2, rows), to be written with those of the output; None for none.
        residual: (rows / n, N), added n times over; None for none.
        num_processors: number of multiprocessors to plan for; by default those of the device.
    """
    weight, normalizes = layer.weight, layer.row_sums is not None
    out_features, in_features = weight.shape
    parts = len(x_statistics) if x_statistics is not None and normalizes else 1
    constants = constants_of(layer, x, parts, residual is not None, statistics is not None)
    if only_compiles():
        in_compile_thread(hopper.compile_in_process, source_of(tile, **constants))
        return
    kernel, shared_bytes = _kernel(weight.device, tile, **constants)
    # Rows in the order that `load_weight` of linear.cu expects.
    sizes, strides = (in_features, 2, 4, 4, out_features // 32), tuple(in_features * n for n in (1, 8, 2, 32))
    # The same number of thread blocks for each tile's columns: as many as fit, or fewer if each has as many tiles then.
    row_tiles, column_tiles = x.num_rows // _BLOCK_M, out_features // tile.columns
    num_processors = num_processors or hopper.num_processors(weight.device)
    turns = math.ceil(row_tiles / max(1, num_processors // column_tiles))
    thread_blocks = math.ceil(row_tiles / turns) * column_tiles
    added = rows_of(output if residual is None else residual)  # without a residual the kernel does not read its map
    hopper.launch_kernel(
        kernel, weight.device, thread_blocks, _THREADS, shared_bytes,
        hopper.tensor_map(x.values, x.sizes, x.strides, x.box),
        hopper.tensor_map(weight, sizes, strides, (_BLOCK_K, 2, 4, 4, tile.columns // 32)),
        hopper.tensor_map(added.values, added.sizes, added.strides, added.box),
        layer.bias, x_statistics if normalizes else None, residual, output, statistics,
        x.num_rows, added.num_rows, float(layer.eps),
    )  # fmt: skip


def constants_of(layer: "FusedLinear", x: Input, parts: int, adds: bool, statistics: bool) -> dict[str, int | str]:
    """Return everything that the kernel is compiled for except its tile.

    Args:
        layer: the layer.
        x: its input.
        parts: number of parts of x's statistics.
        adds: whether there is a residual.
        statistics: whether statistics of the output are computed.
    """
    (out_features, in_features), normalizes = layer.weight.shape, layer.row_sums is not None
    return {
        "KIND": x.kind, "HEIGHT": x.grid[0], "WIDTH": x.grid[1], "BFLOAT16": int(layer.weight.dtype == torch.bfloat16),
        "K": in_features, "N": out_features, "NORM": int(normalizes), "PARTS": parts if normalizes else 1,
        "GELU": int(layer.gelu), "RESIDUAL": int(adds), "STATISTICS": int(statistics),
    }  # fmt: skip


@cache
def _kernel(device: torch.device, tile: Tile, **constants: int | str):
    """Return the kernel and the size of its shared memory."""
    _, _, shared_bytes = tile.layout(int(constants["K"]), bool(constants["RESIDUAL"]))
    code = hopper.compiled(source_of(tile, **constants))
    return hopper.load_kernel(device, code, _name(constants), shared_bytes), shared_bytes


def source_of(tile: Tile, **constants: int | str) -> str:
    """Return the source of the kernel for these constants, which linear.cu uses in capitals."""
    stays, stages, shared_bytes = tile.layout(int(constants["K"]), bool(constants["RESIDUAL"]))
    constants |= {
        "NAME": _name(constants), "TILE_N": tile.columns, "HALVES": tile.halves,
        "STAGES": stages, "W_STAYS": int(stays), "SHARED_BYTES": shared_bytes,
    }  # fmt: skip
    dtype = "bf16" if constants["BFLOAT16"] else "f16"
    function = hopper.product("warpgroup_product", tile.columns, dtype, may_overwrite=True)
    return hopper.source_of(Path(__file__).with_suffix(".cu"), constants, function)


def _name(constants: dict[str, int | str]) -> str:
    """Return the kernel's name, which profilers show."""
    return f"linear_{constants['K']}_{constants['N']}"
