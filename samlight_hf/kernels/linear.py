"""Linear layers of the image encoder, each with what surrounds it, as one kernel, in Triton or, for Hopper GPUs, in CUDA.

    y = act(LayerNorm(x) W^T + b) + residual

in one pass: nothing of the encoder between two matrix products is read or written by a kernel of its own.

**The LayerNorm costs nothing.** With the norm's gain in the weight and its bias in the layer's, LayerNorm(x) W^T is
(x W^T - mean(x) * s) / std(x), with s the sums of the weight's rows: a factor and a term for each row of the plain product. Mean
and variance come from the kernel that wrote x: each of its tiles leaves the mean and the sum of squared deviations of
its columns, rounded as they are stored, and the next kernel joins them (Chan et al. 1979), which does not cancel as
E[x^2] - E[x]^2 would.

Products are summed in float32, and norm, GELU and residual are computed in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .hopper import linear as hopper_linear
from .hopper import runtime as hopper
from .hopper.linear import Input, neighbours_of, rows_of
from .support import normal_numbers, overlap_options, tl, triton, why_not_tried


@dataclass(frozen=True)
class RowsWithStatistics:
    """A matrix, half precision (M, N), and for each row mean and sum of squared deviations of parts of its columns.

    `statistics` is float32 (parts, 2, M), of parts of equal width; None where nobody asked for it.
    """

    values: torch.Tensor
    statistics: torch.Tensor | None = None


class FusedLinear:
    """A linear layer, after a LayerNorm and before a GELU if it has these, with its weights ready for the kernel.

    `order` puts the layer's output features in another order, int64 (N,). For inference: there is no gradient. On Hopper a kernel
    reads its weights before the kernel ahead of it has ended: whoever changes them waits until the device has.
    """

    @torch.no_grad()
    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm: nn.LayerNorm | None = None,
        gelu: bool = False,
        order: torch.Tensor | None = None,
    ):
        bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias.float()
        if norm is not None:
            bias = bias + weight.float() @ norm.bias.float()
            weight = (weight.float() * norm.weight.float()).to(weight.dtype)
        if order is not None:
            weight, bias = weight[order], bias[order]
        self.weight, self.bias = weight.detach().contiguous(), bias.detach().contiguous()
        # Of the rounded weight, or the mean would not vanish.
        self.row_sums = None if norm is None else self.weight.float().sum(dim=1)
        self.eps, self.gelu = 0.0 if norm is None else norm.eps, gelu
        if self.weight.is_cuda:  # it has just changed them
            torch.cuda.current_stream(self.weight.device).synchronize()

    def __call__(
        self,
        rows: RowsWithStatistics,
        residual: torch.Tensor | None = None,
        statistics: bool = False,
        memory: torch.Tensor | None = None,
    ) -> RowsWithStatistics:
        """(M, K) -> (M, N). `residual` is (M, N), or (M / n, N) which is then added n times over.

        The kernel writes its result at the beginning of `memory` (at least M * N,), where that is given.
        """
        if self.row_sums is not None and rows.statistics is None:
            rows = with_statistics(rows.values)
        x = rows_of(rows.values)
        parts = 1 if rows.statistics is None else len(rows.statistics)
        if why_not_hopper(self, x, residual, statistics, parts) is None:
            return launch_hopper(self, x, rows.statistics, residual, statistics, memory=memory)
        if why_not_triton(self, rows, residual, statistics):
            return fused_linear_reference(self, rows, residual, statistics)
        return launch_triton(self, rows, residual, statistics, memory=memory)


def embed_patches(layer: FusedLinear, pixel_values: torch.Tensor, positions: torch.Tensor | None) -> RowsWithStatistics:
    """Pixel values (B, C, S, S) to tokens (B * N, channels) with statistics, by a `layer` of C * p * p features.

    `positions` (N, channels) are added to each image's. The kernel reads the pixels where they are.
    """
    size = math.isqrt(layer.weight.shape[1] // pixel_values.shape[1])
    if why_not_patches(layer, pixel_values, positions):
        return layer(
            RowsWithStatistics(_patches(pixel_values.to(layer.weight.dtype), size)), positions, statistics=True
        )
    return launch_patches(layer, pixel_values, positions)


def _patches(pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, S, S) to (B * N, C * p * p)."""
    batch_size, channels, height, width = pixel_values.shape
    patches = pixel_values.reshape(batch_size, channels, height // size, size, width // size, size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)


def convolve(layer: FusedLinear, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """3 x 3 convolution, zero beyond the images: tokens (B, h * w, C) to (B, h * w, channels), by a `layer` of 9 * C features.

    Its features are in the order (y, x, channel).
    """
    batch_size = len(tokens)
    images = tokens.unflatten(1, grid)
    neighbours = neighbours_of(images)
    # Many images keep cuDNN's kernel busy, which is then the faster one.
    if neighbours.num_rows <= hopper_linear.FEW_ROWS and why_not_hopper(layer, neighbours) is None:
        return launch_hopper(layer, neighbours).values.unflatten(0, (batch_size, -1))
    return F.conv2d(images.permute(0, 3, 1, 2), _kernel_of(layer), padding=1).permute(0, 2, 3, 1).flatten(1, 2)


def _kernel_of(layer: FusedLinear) -> torch.Tensor:
    """(channels, C, 3, 3), channels last, of a `layer` of `convolve`."""
    return layer.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)


def fused_linear_reference(
    layer: FusedLinear, rows: RowsWithStatistics, residual: torch.Tensor | None = None, statistics: bool = False
) -> RowsWithStatistics:
    """The same, step by step, on any device and in any dtype."""
    compute = torch.float64 if rows.values.dtype == torch.float64 else torch.float32
    values = rows.values.to(compute)
    if layer.row_sums is not None:
        values = F.layer_norm(values, values.shape[-1:], eps=layer.eps)
    values = F.linear(values, layer.weight.to(compute), layer.bias.to(compute))
    if layer.gelu:
        values = F.gelu(values)
    if residual is not None:
        values = (values.unflatten(0, (-1, len(residual))) + residual.to(compute)).flatten(0, 1)
    return (
        with_statistics(values.to(rows.values.dtype))
        if statistics
        else RowsWithStatistics(values.to(rows.values.dtype))
    )


def with_statistics(values: torch.Tensor) -> RowsWithStatistics:
    """Rows with the statistics of all columns as one part."""
    variance, mean = torch.var_mean(values.float(), dim=1, correction=0)
    return RowsWithStatistics(values, torch.stack([mean, variance * values.shape[1]])[None])


@dataclass(frozen=True)
class _Variant:
    """What a kernel of linear layers is compiled for, but for its tile."""

    dtype: torch.dtype
    out_features: int
    in_features: int
    normalizes: bool = False
    gelu: bool = False
    parts: int = 1  # of the statistics that are given
    adds: bool = False
    statistics: bool = False


def why_not_triton(
    layer: FusedLinear, rows: RowsWithStatistics, residual: torch.Tensor | None = None, statistics: bool = False
) -> str | None:
    """Why Triton's kernel cannot run on these inputs: a sentence, or None where it can."""
    values, weight = rows.values, layer.weight
    if reason := _why_not_layer(layer, len(values)):
        return reason
    for tensor in (values, *(() if residual is None else (residual,))):
        if (tensor.dtype, tensor.device) != (weight.dtype, weight.device):
            return f"the weights are {weight.dtype} on {weight.device}, and what they are given is {tensor.dtype} on {tensor.device}."
    if residual is not None and (not len(residual) or len(residual) % 128 or len(values) % len(residual)):
        return (
            f"{len(values)} rows, of which {len(residual)} are added at a time, are no multiples of those and of 128."
        )
    if not hopper.are_aligned(weight, values, residual):
        return "the tensors are not contiguous, or begin at odd addresses."
    normalizes = layer.row_sums is not None
    variant = _Variant(
        weight.dtype, *weight.shape, normalizes, layer.gelu,
        len(rows.statistics) if normalizes and rows.statistics is not None else 1, residual is not None, statistics,
    )  # fmt: skip
    return _why_not_variant(weight.device, variant, triton_tile(len(values), *weight.shape))


def why_not_patches(layer: FusedLinear, pixel_values: torch.Tensor, positions: torch.Tensor | None) -> str | None:
    """Why Triton's kernel cannot embed these patches: a sentence, or None where it can."""
    batch_size, channels, height, width = pixel_values.shape
    size = math.isqrt(layer.weight.shape[1] // channels)
    grid = height // size, width // size
    if reason := _why_not_layer(layer, batch_size * grid[0] * grid[1]):
        return reason
    if (height, width) != (grid[0] * size, grid[1] * size):
        return f"{height} x {width} pixels are no whole patches of {size} x {size}."
    dtype, device = layer.weight.dtype, layer.weight.device
    positions_differ = positions is not None and (positions.dtype, positions.device) != (dtype, device)
    if pixel_values.device != device or positions_differ:
        return f"the weights are {dtype} on {device}, and the pixels or the positions are not."
    if positions is not None and (len(positions) != grid[0] * grid[1] or len(positions) % 64):
        return (
            f"{len(positions)} positions for images of {grid[0]} x {grid[1]} patches are no multiple of 64, or others."
        )
    if not hopper.are_aligned(layer.weight, pixel_values, positions):
        return "the tensors are not contiguous, or begin at odd addresses."

    variant = _Variant(dtype, *layer.weight.shape, adds=positions is not None, statistics=True)
    return _why_not_patches_variant(device, variant, pixel_values.dtype, channels, height, width)


def _why_not_patches_variant(
    device: torch.device, variant: _Variant, dtype: torch.dtype, channels: int, height: int, width: int
) -> str | None:
    """Of pixel values of this `dtype` and shape."""

    def attempt() -> bool:
        numbers, size = normal_numbers(device), math.isqrt(variant.in_features // channels)
        layer, num_patches = _layer_of(numbers, variant), height * width // size**2
        # Rows of one image may be no multiple of a block.
        pixel_values = numbers(128 // math.gcd(128, num_patches), channels, height, width).to(dtype)
        positions = numbers(num_patches, variant.out_features).to(variant.dtype) if variant.adds else None
        found, patches = launch_patches(layer, pixel_values, positions), _patches(pixel_values.to(variant.dtype), size)
        return _agree(found, fused_linear_reference(layer, RowsWithStatistics(patches), positions).values)

    return why_not_tried("patches", device, (variant, dtype, channels, height, width), attempt)


def _why_not_layer(layer: FusedLinear, num_rows: int) -> str | None:
    weight = layer.weight
    if triton is None:
        return "Triton is not installed."
    if not weight.is_cuda:
        return f"the weights are on {weight.device}."
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, and the weights are {str(weight.dtype).removeprefix('torch.')}."
    (out_features, in_features) = weight.shape
    if in_features % 64 or out_features % 64 or num_rows % 128 or not num_rows:
        return f"{num_rows} rows, {in_features} and {out_features} features are no multiples of 128, 64 and 64."
    return None


def why_not_at_all(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not even a small layer runs in Triton on this device, or None."""
    if triton is None:
        return "Triton is not installed."
    return _why_not_variant(device, _Variant(dtype, 64, 64, True, True), triton_tile(128, 64, 64))


def why_not_hopper(
    layer: FusedLinear, x: Input, residual: torch.Tensor | None = None, statistics: bool = False, parts: int = 1
) -> str | None:
    """Why the kernel for Hopper GPUs cannot run on these inputs: a sentence, or None where it can.

    x has statistics of so many `parts`, where the layer normalizes it.
    """
    if reason := hopper_linear.why_not(layer, x, residual):
        return reason
    (out_features, in_features), normalizes = layer.weight.shape, layer.row_sums is not None
    tile = hopper_linear.hopper_tile(x.num_rows, out_features, normalizes, layer.gelu)
    constants = hopper_linear.constants_of(layer, x, parts, residual is not None, statistics)

    def attempt() -> bool:
        sizes = layer.weight.dtype, out_features, in_features
        variant = _Variant(*sizes, normalizes, layer.gelu, parts, residual is not None, statistics)
        small, rows, added = _example(layer.weight.device, variant, 512)
        # As if there were one multiprocessor for each tile's columns, so that a program takes one tile after the other.
        processors = out_features // tile.columns
        if x.kind == "ROWS":
            found = launch_hopper(
                small, rows_of(rows.values), rows.statistics, added, statistics, tile, None, processors
            )
            return _agree(found, fused_linear_reference(small, rows, added).values)
        images = normal_numbers(layer.weight.device)(1, *x.grid, in_features // 9).to(variant.dtype)
        found = launch_hopper(small, neighbours_of(images), tile=tile, num_processors=processors)
        expected = F.conv2d(images.float().movedim(3, 1), _kernel_of(small).float(), small.bias, padding=1)
        return _agree(found, expected.movedim(1, 3).flatten(0, 2))

    return why_not_tried(
        "linear layers", layer.weight.device, (tile, *constants.values()), attempt, "CUDA", "Triton's kernels"
    )


def _why_not_variant(device: torch.device, variant: _Variant, tile: dict[str, int]) -> str | None:
    def attempt() -> bool:
        layer, rows, residual = _example(device, variant, 256)
        found = launch_triton(layer, rows, residual, variant.statistics, tile)
        return _agree(found, fused_linear_reference(layer, rows, residual).values)

    return why_not_tried("linear layers", device, (variant, *tile.values()), attempt)


def _example(
    device: torch.device, variant: _Variant, num_rows: int
) -> tuple[FusedLinear, RowsWithStatistics, torch.Tensor | None]:
    """A layer, its input and its residual, which is shorter."""
    numbers = normal_numbers(device)
    values = (numbers(num_rows, variant.in_features) + 1).to(variant.dtype)
    rows = RowsWithStatistics(values, _statistics_of(values, variant.parts) if variant.normalizes else None)
    residual = numbers(128, variant.out_features).to(variant.dtype) if variant.adds else None
    return _layer_of(numbers, variant), rows, residual


def _layer_of(numbers: Callable[..., torch.Tensor], variant: _Variant) -> FusedLinear:
    weight = numbers(variant.out_features, variant.in_features) * variant.in_features**-0.5
    norm = None
    if variant.normalizes:
        norm = nn.LayerNorm(variant.in_features, device=weight.device, dtype=torch.float32)
        norm.weight.copy_(1 + 0.3 * numbers(variant.in_features))
        norm.bias.copy_(numbers(variant.in_features))
    return FusedLinear(weight.to(variant.dtype), numbers(variant.out_features), norm, variant.gelu)


def _agree(found: RowsWithStatistics, expected: torch.Tensor) -> bool:
    """Whether values are those expected, up to rounding, and statistics those of the values."""
    pairs = [(found.values.float(), expected.float())]
    if found.statistics is not None:
        pairs += zip(found.statistics.unbind(1), _statistics_of(found.values, len(found.statistics)).unbind(1))
    return all(bool((a - b).norm() < 0.01 * b.norm()) for a, b in pairs)


def _statistics_of(values: torch.Tensor, parts: int) -> torch.Tensor:
    return torch.cat([with_statistics(part).statistics for part in values.chunk(parts, dim=1)])


def launch_hopper(
    layer: FusedLinear,
    x: Input,
    given: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    statistics: bool = False,
    tile: hopper_linear.Tile | None = None,
    memory: torch.Tensor | None = None,
    num_processors: int | None = None,
) -> RowsWithStatistics:
    """The layer of x by the kernel for Hopper GPUs; `given` are the statistics of x's rows, where these are normalized."""
    out_features = len(layer.weight)
    tile = tile or hopper_linear.hopper_tile(x.num_rows, out_features, layer.row_sums is not None, layer.gelu)
    output, found = _results(layer.weight, x.num_rows, out_features, tile.columns, statistics, memory)
    hopper_linear.launch_linear(layer, x, tile, output, given, found, residual, num_processors)
    return RowsWithStatistics(output, found)


def triton_tile(num_rows: int, out_features: int, in_features: int) -> dict[str, int]:
    """The kernel's tile and its launch: what was fastest on an H100, among twenty for each layer and three batch sizes.

    Four warps a tile and three stages leave room for several tiles on a multiprocessor: with few input features each is
    short, and one's start and end hide behind the others' products. Few rows want smaller tiles, for there to be enough.
    """
    few = num_rows <= 8192 and in_features < 1024
    return _tile(128, 64 if few or out_features % 128 else 128, num_warps=4, num_stages=3)


def _tile(rows: int, columns: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 64, "num_warps": num_warps, "num_stages": num_stages}


def launch_triton(
    layer: FusedLinear,
    rows: RowsWithStatistics,
    residual: torch.Tensor | None = None,
    statistics: bool = False,
    tile: dict[str, int] | None = None,
    memory: torch.Tensor | None = None,
) -> RowsWithStatistics:
    values, (out_features, in_features) = rows.values, layer.weight.shape
    num_rows, normalizes = len(values), layer.row_sums is not None
    tile = tile or triton_tile(num_rows, out_features, in_features)
    block = tile["BLOCK_M"], tile["BLOCK_N"]
    output, found = _results(values, num_rows, out_features, block[1], statistics, memory)
    programs = num_rows // block[0] * (out_features // block[1])
    with torch.cuda.device_of(values):  # where Triton launches
        _linear_kernel[(programs,)](
            _descriptor(values, [block[0], tile["BLOCK_K"]]),
            _descriptor(layer.weight, [block[1], tile["BLOCK_K"]]),
            layer.bias, layer.row_sums, rows.statistics if normalizes else None,
            None if residual is None else _descriptor(residual, list(block)),
            _descriptor(output, list(block)), found,
            num_rows, num_rows if residual is None else len(residual), layer.eps,
            N=out_features, K=in_features, GIVEN_PARTS=len(rows.statistics) if normalizes else 0,
            NORM=normalizes, GELU=layer.gelu, RESIDUAL=residual is not None, STATISTICS=statistics,
            PTX=values.is_cuda and torch.version.cuda is not None, **overlap_options(values), **tile,
        )  # fmt: skip
    return RowsWithStatistics(output, found)


def launch_patches(
    layer: FusedLinear,
    pixel_values: torch.Tensor,
    positions: torch.Tensor | None = None,
    tile: dict[str, int] | None = None,
) -> RowsWithStatistics:
    batch_size, channels, height, width = pixel_values.shape
    out_features, in_features = layer.weight.shape
    size = math.isqrt(in_features // channels)
    grid = height // size, width // size
    num_rows = batch_size * grid[0] * grid[1]
    tile = tile or _tile(64, 64 if out_features % 128 else 128, num_warps=4, num_stages=3)
    block = tile["BLOCK_M"], tile["BLOCK_N"]
    output, found = _results(layer.weight, num_rows, out_features, block[1], True)
    programs = num_rows // block[0] * (out_features // block[1])
    with torch.cuda.device_of(pixel_values):
        _patch_kernel[(programs,)](
            pixel_values, _descriptor(layer.weight, [block[1], tile["BLOCK_K"]]), layer.bias,
            None if positions is None else _descriptor(positions, list(block)),
            _descriptor(output, list(block)), found, num_rows,
            N=out_features, CHANNELS=channels, SIZE=size, HEIGHT=grid[0], WIDTH=grid[1],
            POSITIONS=positions is not None, **overlap_options(pixel_values), **tile,
        )  # fmt: skip
    return RowsWithStatistics(output, found)


def _descriptor(tensor: torch.Tensor, block: list[int]):
    """What the GPU's tensor memory accelerator needs to know to copy blocks of a matrix."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # here, for `import samlight_hf` to stay light

    return TensorDescriptor.from_tensor(tensor, block)


def _results(
    like: torch.Tensor,
    num_rows: int,
    out_features: int,
    columns: int,
    statistics: bool,
    memory: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for the output, and for its statistics by parts of so many columns."""
    size = num_rows * out_features
    found = torch.empty(out_features // columns, 2, num_rows, device=like.device) if statistics else None
    output = like.new_empty(size) if memory is None else memory[:size]
    return output.view(num_rows, out_features), found


if triton is not None:
    from .support import grid_dependency_wait

    @triton.jit
    def _linear_kernel(
        x, weight, bias, row_sums, given, residual, output, found, num_rows, num_residual_rows, eps,
        N: tl.constexpr, K: tl.constexpr, GIVEN_PARTS: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr,
        RESIDUAL: tl.constexpr, STATISTICS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        # Tiles of the same rows are neighbours: they read these rows at about the same time, from the cache.
        first_row, first_column = tile // (N // BLOCK_N) * BLOCK_M, tile % (N // BLOCK_N) * BLOCK_N
        rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        grid_dependency_wait(OVERLAP)
        # What comes after the product is asked for before it, and is there by then.
        shift = tl.load(bias + columns)
        if NORM:
            sums = tl.load(row_sums + columns)
            mean, factor = _mean_and_factor(given, rows, num_rows, eps, K, GIVEN_PARTS, BLOCK_M)
        if RESIDUAL:
            added = residual.load([first_row % num_residual_rows, first_column])
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            total = tl.dot(x.load([first_row, k]), weight.load([first_column, k]).T, total)
        if NORM:
            total = (total - mean[:, None] * sums[None, :]) * factor[:, None]
        total += shift[None, :]
        if GELU:
            total = _fitted_gelu(total, PTX)
        if RESIDUAL:
            total += added.to(tl.float32)
        result = total.to(output.dtype)
        output.store([first_row, first_column], result)
        if STATISTICS:
            _store_statistics(result, found, first_column // BLOCK_N, rows, num_rows, BLOCK_N)

    @triton.jit
    def _mean_and_factor(given, rows, num_rows, eps, K: tl.constexpr, GIVEN_PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
        """Mean and 1 / standard deviation of rows, from the statistics of their parts."""
        mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for part in tl.static_range(GIVEN_PARTS):
            mean += tl.load(given + 2 * part * num_rows + rows) / GIVEN_PARTS
        squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for part in tl.static_range(GIVEN_PARTS):
            apart = tl.load(given + 2 * part * num_rows + rows) - mean
            squares += tl.load(given + (2 * part + 1) * num_rows + rows) + apart * apart * (K // GIVEN_PARTS)
        return mean, tl.rsqrt(squares / K + eps)

    @triton.jit
    def _patch_kernel(
        pixels, weight, bias, positions, output, found, num_rows,
        N: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
        POSITIONS: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        first_row, first_column = tile // (N // BLOCK_N) * BLOCK_M, tile % (N // BLOCK_N) * BLOCK_N
        rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        grid_dependency_wait(OVERLAP)  # and so for whoever wrote the weights, of this layer and of all that follow
        shift = tl.load(bias + columns)
        if POSITIONS:
            added = positions.load([first_row % (HEIGHT * WIDTH), first_column])
        line, image = rows // WIDTH % HEIGHT, (rows // (HEIGHT * WIDTH)).to(tl.int64)
        corners = image * (CHANNELS * HEIGHT * WIDTH * SIZE * SIZE) + line * (SIZE * SIZE * WIDTH) + rows % WIDTH * SIZE
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, CHANNELS * SIZE * SIZE, BLOCK_K):
            features = k + tl.arange(0, BLOCK_K)
            channel, y, x = features // (SIZE * SIZE), features // SIZE % SIZE, features % SIZE
            offsets = channel * (HEIGHT * WIDTH * SIZE * SIZE) + y * (SIZE * WIDTH) + x
            patches = tl.load(pixels + corners[:, None] + offsets[None, :]).to(output.dtype)
            total = tl.dot(patches, weight.load([first_column, k]).T, total)
        total += shift[None, :]
        if POSITIONS:
            total += added.to(tl.float32)
        result = total.to(output.dtype)
        output.store([first_row, first_column], result)
        _store_statistics(result, found, first_column // BLOCK_N, rows, num_rows, BLOCK_N)

    @triton.jit
    def _fitted_gelu(x, PTX: tl.constexpr):
        """GELU to about 2^-11: x * (1 + tanh(x * Q(x^2))) / 2, with Q fitted to the normal distribution (to 3e-5).

        The error function, some thirty operations and a branch for each element, would cost as much as the product; the
        GPU has an instruction for tanh.
        """
        square = tl.minimum(x * x, 25.0)
        inner = x * ((-3.522957060e-04 * square + 3.701044177e-02) * square + 7.975026134e-01)
        if PTX:
            tanh = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
        half = 0.5 * x
        return half * tanh + half

    @triton.jit
    def _store_statistics(result, found, part, rows, num_rows, BLOCK_N: tl.constexpr):
        stored = result.to(tl.float32)
        mean = tl.sum(stored, axis=1) / BLOCK_N
        apart = stored - mean[:, None]
        place = found + 2 * part * num_rows + rows
        tl.store(place, mean)
        tl.store(place + num_rows, tl.sum(apart * apart, axis=1))
