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
_ROWS, _BLOCK_K, _THREADS = 128, 64, 384  # most rows of a tile, features of a block, threads: as in linear.cu
PATCH = 16  # side of a patch in pixels, likewise
_SHARED_BYTES = 227 * 1024  # limit of a thread block


@dataclass(frozen=True)
class Tile:
    """The kernel's division of work.

    Attributes:
        columns: of a tile.
        rows: of a tile, 128 or 64.
        takes_turns: whether the two consumers take turns with tiles of 128 rows; otherwise they divide every tile, one
            of 128 rows by rows, one of 64 rows by columns.
    """

    columns: int
    rows: int = 128
    takes_turns: bool = True

    @property
    def consumer_columns(self) -> int:
        """The columns of one consumer, for which statistics are computed."""
        return self.columns if self.rows == 128 else self.columns // 2

    def layout(self, in_features: int, adds: bool = False, norm_of: int = 0) -> tuple[bool, int, int]:
        """Plan the shared memory for layers of `in_features` input features.

        Args:
            in_features: of the layer.
            adds: whether there is a residual.
            norm_of: the number of the layer's output features if a LayerNorm follows it in the kernel, else 0.

        Returns:
            Whether the weight for a tile's columns stays in shared memory, which it does if there is room for it beside
            four blocks of x; the number of blocks of x, and otherwise also of the weight, that are loaded ahead; and
            the size in bytes.
        """
        # The members of `Shared` in linear.cu: a block with its barriers, of 8 bytes each; and what there is once.
        x_bytes, weight_bytes = 2 * _BLOCK_K * self.rows + 2 * 8, 2 * _BLOCK_K * self.columns + 8
        rest, all_weights = 4 * self.columns + 2 * (4 * self.rows + 8), in_features // _BLOCK_K * weight_bytes
        if adds and self.takes_turns:
            rest += math.ceil(self.columns / 64) * 2 * 64 * self.rows + 3 * 8
        if norm_of:
            rest += 2 * (4 * self.columns + 8 * norm_of // self.consumer_columns * self.rows + 8)
        stays = rest + all_weights + 4 * x_bytes <= _SHARED_BYTES
        fixed, stage_bytes = (rest + all_weights, x_bytes) if stays else (rest, x_bytes + weight_bytes)
        stages = (_SHARED_BYTES - fixed) // stage_bytes
        return stays, stages, fixed + stages * stage_bytes


# The fastest tiles on an H100, the widest first.
TILES = (Tile(192), Tile(128), Tile(96), Tile(64))
# For one tile per multiprocessor, whose end nothing hides.
NARROW_TILES = (Tile(96, takes_turns=False), Tile(64, takes_turns=False))
PATCH_TILE = Tile(192, 64, takes_turns=False)  # each patch, whose copy takes long, is copied for fewer tiles
CLUSTER_TILE = Tile(128, 64, takes_turns=False)  # a cluster of two thread blocks has all 256 columns of its rows


def hopper_tile(
    num_rows: int, out_features: int, normalizes: bool, gelu: bool, kind: str = "ROWS", norm_after: bool = False
) -> Tile:
    """Choose the tile: with few rows and no GELU a small one, so that all multiprocessors have as much work.

    The end of a tile takes long after GELU, and is hidden only if another wide tile follows, even with few rows.
    """
    tiles: tuple[Tile, ...]
    if norm_after:
        tiles = (CLUSTER_TILE,)
    elif num_rows > FEW_ROWS or gelu:
        tiles = TILES
    elif kind == "PATCHES":
        tiles = (PATCH_TILE, *NARROW_TILES)
    else:
        tiles = TILES[2:] if normalizes else NARROW_TILES
    return next(tile for tile in tiles if out_features % tile.columns == 0)


def tile_of(layer: "FusedLinear", x: "Input") -> Tile:
    """Return the tile for a layer and its input, see `hopper_tile`."""
    norm_after = fuses_norm_after(layer, x.num_rows)
    return hopper_tile(x.num_rows, len(layer.weight), layer.row_sums is not None, layer.gelu, x.kind, norm_after)


def fuses_norm_after(layer: "FusedLinear", num_rows: int) -> bool:
    """Return whether the kernel applies the LayerNorm that follows the layer, if there is one.

    With many rows this would take longer, because nothing hides the ends of `CLUSTER_TILE`s.
    """
    return layer.norm_after is not None and num_rows <= FEW_ROWS and len(layer.weight) in (128, 256)


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
        grid: (lines, columns) of an image's rows.
    """

    kind: str
    values: torch.Tensor
    num_rows: int
    features: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    grid: tuple[int, int] = (1, 1)

    def box(self, rows: int) -> tuple[int, ...]:
        """Return the part of the five dimensions that makes a block of this many rows and of 64 features."""
        columns = min(rows, self.grid[1])
        if self.kind == "ROWS":
            return _BLOCK_K, rows, 1, 1, 1
        if self.kind == "NEIGHBOURS":
            return _BLOCK_K, columns, rows // columns, 1, 1
        return PATCH, columns, rows // columns, _BLOCK_K // PATCH, 1


def rows_of(values: torch.Tensor) -> Input:
    """Describe a matrix (rows, features) as the kernel's input."""
    (num_rows, features), total = values.shape, values.numel()
    sizes, strides = (features, num_rows, 1, 1, 1), (features, total, total, total)
    return Input("ROWS", values, num_rows, features, sizes, strides)


def neighbours_of(values: torch.Tensor) -> Input:
    """Describe the 3 x 3 neighbourhoods of images (B, H, W, C) as the kernel's input.

    Features are in the order (y, x, channel), and zero outside the images.
    """
    batch_size, lines, columns, channels = values.shape
    sizes = channels, columns, lines, batch_size, 1
    strides = channels, channels * columns, channels * columns * lines, values.numel()
    num_rows = batch_size * lines * columns
    return Input("NEIGHBOURS", values, num_rows, 9 * channels, sizes, strides, (lines, columns))


def patches_of(pixel_values: torch.Tensor) -> Input:
    """Describe the patches of 16 x 16 pixels of images (B, C, S, S) as the kernel's input.

    Features are in the order (channel, y, x).
    """
    batch_size, channels, height, width = pixel_values.shape
    lines, columns = height // PATCH, width // PATCH
    # A line of a patch; its lines are the last dimension but one, so that those of a block are apart.
    sizes = PATCH, columns, batch_size * channels * lines, PATCH, 1
    strides = PATCH, PATCH * width, width, pixel_values.numel()
    num_rows, features = batch_size * lines * columns, channels * PATCH**2
    return Input("PATCHES", pixel_values, num_rows, features, sizes, strides, (lines, columns))


def why_not(layer: "FusedLinear", x: Input, residual: torch.Tensor | None = None) -> str | None:
    """Return why the kernel cannot run with these inputs, as a sentence, or None if it can."""
    out_features, in_features = layer.weight.shape
    if reason := hopper.why_not_hopper(layer.weight.device, layer.weight.dtype):
        return reason
    dtype, device = layer.weight.dtype, layer.weight.device
    for tensor in (x.values, *(() if residual is None else (residual,))):
        if (tensor.dtype, tensor.device) != (dtype, device):
            return f"the weights are {dtype} on {device}, the input {tensor.dtype} on {tensor.device}."
    if in_features % _BLOCK_K or out_features % 64 or x.num_rows % _ROWS or not x.num_rows:
        return f"{x.num_rows} rows, {in_features} and {out_features} features are no multiples of 128, 64 and 64."
    if x.features != in_features or (residual is not None and residual.shape[1] != out_features):
        return f"the input does not have {in_features} features, or the residual not {out_features}."
    lines, columns = x.grid
    if residual is not None and (not len(residual) or len(residual) % _ROWS or x.num_rows % len(residual)):
        return f"{x.num_rows} rows are no multiple of the residual's {len(residual)} rows, or those none of {_ROWS}."
    if x.kind != "ROWS" and (lines * columns % _ROWS or (columns % _ROWS and _ROWS % columns)):
        return f"images of {lines} x {columns} places cannot be divided into blocks of {_ROWS}."
    if layer.gelu and layer.row_sums is None:
        return "it supports GELU only with a LayerNorm."
    if residual is not None and (layer.row_sums is not None or layer.norm_after is not None):
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
        statistics: float32 (N / tile.consumer_columns, 2, rows), to be written with those of the output; None for none.
        residual: (rows / n, N), added n times over; None for none.
        num_processors: number of multiprocessors to plan for; by default those of the device.
    """
    weight, normalizes = layer.weight, layer.row_sums is not None
    out_features, in_features = weight.shape
    parts = len(x_statistics) if x_statistics is not None and normalizes else 1
    constants = constants_of(layer, x, parts, residual is not None, statistics is not None)
    after = layer.gain_and_shift if constants["NORM_AFTER"] else None
    if only_compiles():
        in_compile_thread(hopper.compile_in_process, source_of(tile, **constants))
        return
    kernel, shared_bytes = _kernel(weight.device, tile, **constants)
    # Rows in the order that `load_weight` of linear.cu expects.
    sizes, strides = (in_features, 2, 4, 4, out_features // 32), tuple(in_features * n for n in (1, 8, 2, 32))
    # The same number of thread blocks for each tile's columns: as many as fit, or fewer if each has as many tiles then.
    row_tiles, column_tiles = x.num_rows // tile.rows, out_features // tile.columns
    num_processors = num_processors or hopper.num_processors(weight.device)
    turns = math.ceil(row_tiles / max(1, num_processors // column_tiles))
    thread_blocks = math.ceil(row_tiles / turns) * column_tiles
    added = rows_of(output if residual is None else residual)  # without a residual the kernel does not read its map
    hopper.launch_kernel(
        kernel, weight.device, thread_blocks, _THREADS, shared_bytes,
        hopper.tensor_map(x.values, x.sizes, x.strides, x.box(tile.rows)),
        hopper.tensor_map(weight, sizes, strides, (_BLOCK_K, 2, 4, 4, tile.columns // 32)),
        hopper.tensor_map(added.values, added.sizes, added.strides, added.box(tile.rows)),
        layer.bias, x_statistics if normalizes else None, residual, *(after or (None, None)), output, statistics,
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
        "NORM_AFTER": int(fuses_norm_after(layer, x.num_rows)),
    }  # fmt: skip


@cache
def _kernel(device: torch.device, tile: Tile, **constants: int | str):
    """Return the kernel and the size of its shared memory."""
    *_, shared_bytes = _layout(tile, constants)
    code = hopper.compiled(source_of(tile, **constants))
    return hopper.load_kernel(device, code, _name(constants), shared_bytes), shared_bytes


def source_of(tile: Tile, **constants: int | str) -> str:
    """Return the source of the kernel for these constants, which linear.cu uses in capitals."""
    stays, stages, shared_bytes = _layout(tile, constants)
    constants |= {
        "NAME": _name(constants), "TILE_N": tile.columns, "TILE_M": tile.rows, "TAKES_TURNS": int(tile.takes_turns),
        "STAGES": stages, "W_STAYS": int(stays), "SHARED_BYTES": shared_bytes,
    }  # fmt: skip
    dtype = "bf16" if constants["BFLOAT16"] else "f16"
    function = hopper.product("warpgroup_product", tile.consumer_columns, dtype, may_overwrite=True)
    return hopper.source_of(Path(__file__).with_suffix(".cu"), constants, function)


def _layout(tile: Tile, constants: dict[str, int | str]) -> tuple[bool, int, int]:
    """Return the tile's `layout` for a kernel with these constants."""
    k, n, adds, norm_after = (int(constants[name]) for name in ("K", "N", "RESIDUAL", "NORM_AFTER"))
    return tile.layout(k, bool(adds), n if norm_after else 0)


def _name(constants: dict[str, int | str]) -> str:
    """Return the kernel's name, which profilers show."""
    return f"linear_{constants['K']}_{constants['N']}"
