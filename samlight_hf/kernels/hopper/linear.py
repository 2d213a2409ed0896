"""The linear layers of `fused_linear` on Hopper GPUs, by a kernel in CUDA (linear.cu).

Triton's kernels leave the tensor cores idle while a tile is finished and written; here they work on the next one meanwhile.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from . import runtime as hopper


FEW_ROWS = 8192  # images of 4096 rows, one or two
_BLOCK_M, _BLOCK_K = 128, 64  # as in linear.cu
_SHARED_BYTES = 227 * 1024  # what a thread block may have


@dataclass(frozen=True)
class Tile:
    """How the kernel goes about its work: columns of a tile, and warpgroups that multiply, each a tile."""

    columns: int
    consumers: int

    def layout(self, in_features: int) -> tuple[bool, int, int]:
        """Of shared memory: whether the weight for a tile's columns stays there, blocks of x that are asked for ahead, and bytes.

        It stays where there is room for it beside four blocks of x; else as many blocks of it are asked for ahead as of x.
        """
        of_x, of_weight = 2 * _BLOCK_K * _BLOCK_M + 2 * 8, 2 * _BLOCK_K * self.columns + 8
        rest, weight = 8 * self.columns + self.consumers * 8 * (_BLOCK_M + 1), in_features // _BLOCK_K * of_weight
        stays = rest + weight + 4 * of_x <= _SHARED_BYTES
        fixed, of_stage = (rest + weight, of_x) if stays else (rest, of_x + of_weight)
        stages = (_SHARED_BYTES - fixed) // of_stage
        return stays, stages, fixed + stages * of_stage


# What was fastest on an H100, the widest first.
TILES = (Tile(192, 2), Tile(128, 2), Tile(96, 2), Tile(64, 2))
NARROW_TILES = (Tile(96, 1), Tile(64, 1))  # where a multiprocessor has about one of them


def hopper_tile(num_rows: int, out_features: int, normalizes: bool, gelu: bool) -> Tile:
    """Few rows want narrow tiles, for each multiprocessor to have as many columns; but with GELU there is much to finish."""
    if num_rows > FEW_ROWS or gelu:
        tiles = TILES
    else:
        tiles = TILES[2:] if normalizes else NARROW_TILES
    return next(tile for tile in tiles if out_features % tile.columns == 0)


@dataclass(frozen=True)
class Input:
    """x of the kernel, (rows, features), in the memory of a tensor: five dimensions of it, the innermost first.

    `box` is what a block of 128 rows and 64 features is of them.
    """

    kind: str
    values: torch.Tensor
    num_rows: int
    features: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # of all but the innermost, in elements
    box: tuple[int, ...]
    grid: tuple[int, int] = (1, 1)  # rows of an image: lines, and columns


def rows_of(values: torch.Tensor) -> Input:
    """A matrix (rows, features)."""
    (num_rows, features), every = values.shape, values.numel()
    sizes, strides = (features, num_rows, 1, 1, 1), (features, every, every, every)
    return Input("ROWS", values, num_rows, features, sizes, strides, (_BLOCK_K, _BLOCK_M, 1, 1, 1))


def neighbours_of(values: torch.Tensor) -> Input:
    """The 3 x 3 places around each of images (B, H, W, C), zero beyond them, features in the order (y, x, channel)."""
    batch_size, lines, columns, channels = values.shape
    sizes = channels, columns, lines, batch_size, 1
    strides = channels, channels * columns, channels * columns * lines, values.numel()
    # 128 places of an image, one after the other.
    block = (columns, _BLOCK_M // columns) if columns < _BLOCK_M else (_BLOCK_M, 1)
    box = (_BLOCK_K, *block, 1, 1)
    num_rows = batch_size * lines * columns
    return Input("NEIGHBOURS", values, num_rows, 9 * channels, sizes, strides, box, (lines, columns))


def why_not(layer, x: Input, residual: torch.Tensor | None = None) -> str | None:
    """Why the kernel cannot run with these: a sentence, or None where it can."""
    out_features, in_features = layer.weight.shape
    if reason := hopper.why_not_hopper(layer.weight.device, layer.weight.dtype):
        return reason
    for tensor in (x.values, *(() if residual is None else (residual,))):
        if (tensor.dtype, tensor.device) != (layer.weight.dtype, layer.weight.device):
            return f"the weights are {layer.weight.dtype} on {layer.weight.device}, and what they are given is {tensor.dtype} on {tensor.device}."
    if in_features % _BLOCK_K or out_features % 64 or x.num_rows % _BLOCK_M or not x.num_rows:
        return f"{x.num_rows} rows, {in_features} and {out_features} features are no multiples of 128, 64 and 64."
    if x.features != in_features or (residual is not None and residual.shape[1] != out_features):
        return f"it is given other features than {in_features}, or other ones to add than {out_features}."
    lines, columns = x.grid
    if residual is not None and (not len(residual) or x.num_rows % len(residual)):
        return f"{x.num_rows} rows are no multiple of the {len(residual)} that are to be added."
    if x.kind == "NEIGHBOURS" and (lines * columns % _BLOCK_M or (columns % _BLOCK_M and _BLOCK_M % columns)):
        return f"images of {lines} x {columns} are not made of its blocks of {_BLOCK_M} places."
    if layer.gelu and layer.row_sums is None:
        return "it has GELU only of what is normalized."
    if residual is not None and layer.row_sums is not None:
        return "it adds no residual to what is normalized."
    if not hopper.are_aligned(layer.weight, x.values, residual):
        return "the tensors are not contiguous, or begin at odd addresses."
    return None


def launch_linear(
    layer,
    x: Input,
    tile: Tile,
    output: torch.Tensor,
    given: torch.Tensor | None = None,
    found: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    num_processors: int | None = None,
):
    """Writes the layer's (rows, N) to `output`, and their statistics to `found`, of `Rows`; `given` are those of x.

    On all multiprocessors, or as if there were `num_processors`.
    """
    weight, normalizes = layer.weight, layer.row_sums is not None
    out_features, in_features = weight.shape
    parts = len(given) if normalizes else 1
    constants = constants_of(layer, x, parts, residual is not None, found is not None)
    kernel, shared_bytes = _kernel(weight.device, tile, **constants)
    # Rows in the order in which `load_weight` of linear.cu wants them.
    sizes, strides = (in_features, 2, 4, 4, out_features // 32), tuple(in_features * n for n in (1, 8, 2, 32))
    # Equally many thread blocks for each tile's columns, as there is room for, or fewer that have as much to do.
    row_tiles, column_tiles = x.num_rows // _BLOCK_M, out_features // tile.columns
    num_processors = num_processors or hopper.num_processors(weight.device)
    turns = math.ceil(row_tiles / max(1, num_processors // column_tiles))
    thread_blocks = math.ceil(row_tiles / turns) * column_tiles
    hopper.launch_kernel(
        kernel, weight.device, thread_blocks, 128 * (1 + tile.consumers), shared_bytes,
        hopper.tensor_map(x.values, x.sizes, x.strides, x.box),
        hopper.tensor_map(weight, sizes, strides, (_BLOCK_K, 2, 4, 4, tile.columns // 32)),
        layer.bias, layer.row_sums, given if normalizes else None, residual, output, found,
        x.num_rows, x.num_rows if residual is None else len(residual), float(layer.eps),
    )  # fmt: skip


def constants_of(layer, x: Input, parts: int, adds: bool, statistics: bool) -> dict[str, int | str]:
    """All that the kernel is compiled for beside its tile: x has statistics of so many parts, a residual is added or not."""
    (out_features, in_features), normalizes = layer.weight.shape, layer.row_sums is not None
    return {
        "KIND": x.kind, "HEIGHT": x.grid[0], "WIDTH": x.grid[1], "BFLOAT16": int(layer.weight.dtype == torch.bfloat16),
        "K": in_features, "N": out_features, "NORM": int(normalizes), "PARTS": parts if normalizes else 1,
        "GELU": int(layer.gelu), "RESIDUAL": int(adds), "STATISTICS": int(statistics),
    }  # fmt: skip


@cache
def _kernel(device: torch.device, tile: Tile, **constants: int | str):
    """The kernel, and the shared memory that it takes."""
    _, _, shared_bytes = tile.layout(constants["K"])
    code = hopper.compiled(source_of(tile, **constants))
    return hopper.load_kernel(device, code, _name(constants), shared_bytes), shared_bytes


def source_of(tile: Tile, **constants: int | str) -> str:
    """The kernel for these constants, which are those in capitals in linear.cu."""
    stays, stages, shared_bytes = tile.layout(constants["K"])
    constants |= {
        "NAME": _name(constants), "TILE_N": tile.columns, "CONSUMERS": tile.consumers,
        "STAGES": stages, "W_STAYS": int(stays), "SHARED_BYTES": shared_bytes,
    }  # fmt: skip
    function = hopper.product("warpgroup_product", tile.columns, "bf16" if constants["BFLOAT16"] else "f16")
    return hopper.source_of(Path(__file__).with_suffix(".cu"), constants, function)


def _name(constants: dict[str, int | str]) -> str:
    """What profilers show."""
    return f"linear_{constants['K']}_{constants['N']}"
