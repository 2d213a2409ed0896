"""Fused linear layers of the image encoder: LayerNorm, product, bias, GELU and residual in one kernel.

    y = act(LayerNorm(x) W^T + b) + residual
    y = LayerNorm(x W^T + b)

One kernel computes all of it, so no step between two matrix products reads or writes memory on its own. The kernel is
in Triton (`linear_triton.py`) or, for Hopper GPUs, in CUDA (`hopper/linear.cu`).

**The LayerNorm is nearly free.** The norm's gain is folded into the weight and its bias into the layer's bias. Then
LayerNorm(x) W^T = (x W^T - mean(x) * s) / std(x), where s holds the sums of the weight's rows. Subtracting its mean
from a row of the weight changes nothing else, and makes its sum zero. A factor for each row of the plain product is
left. The variance comes from the kernel that wrote x. Each of its tiles stores the mean and the sum of squared
deviations of its columns, rounded as they are stored, and the next kernel combines them (Chan et al. 1979). Unlike
E[x^2] - E[x]^2, this does not cancel.

Products are summed in float32; norm, GELU and residual are computed in float32.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .hopper import linear as hopper_linear
from .hopper import runtime as hopper
from .hopper.linear import PATCH, Input, neighbours_of, patches_of, rows_of
from .layer_norm import add_layer_norm
from .linear_triton import launch_linear_kernel, launch_patch_kernel, patch_tile, triton_tile
from .support import normal_numbers, tried, triton, why_not_tried


@dataclass(frozen=True)
class RowsWithStatistics:
    """A matrix with statistics of its rows, for the LayerNorm of the next layer.

    Attributes:
        values: half precision (M, N).
        statistics: float32 (parts, 2, M): mean and sum of squared deviations of each row, over `parts` column ranges of
            equal width. None if they were not computed.
    """

    values: torch.Tensor
    statistics: torch.Tensor | None = None


class FusedLinear:
    """A linear layer with an optional LayerNorm before it, and an optional GELU or LayerNorm after it.

    It is for inference only.

    On Hopper a kernel reads its weights before the previous kernel has ended. Code that changes the weights must
    synchronize with the device afterwards.

    Args:
        weight: (N, K).
        bias: (N,), or None for zeros.
        norm: the LayerNorm before the layer, which is folded into weight and bias; None for none.
        gelu: whether GELU follows.
        order: int64 (N,), a permutation of the output features; None keeps their order.
        factors: float32 (N,), by which the output features, in their old order, are multiplied; None for ones.
        norm_after: the LayerNorm that follows, in layers without `norm` and `gelu`; None for none.

    Raises:
        ValueError: for `norm_after` with `norm` or `gelu`.
    """

    @torch.no_grad()
    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm: nn.LayerNorm | None = None,
        gelu: bool = False,
        order: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
        norm_after: nn.LayerNorm | None = None,
    ):
        if norm_after is not None and (norm is not None or gelu):
            raise ValueError("norm_after is for layers without norm and gelu.")
        dtype, float32 = weight.dtype, torch.float32
        bias = torch.zeros(len(weight), dtype=float32, device=weight.device) if bias is None else bias.float()
        if factors is not None:
            weight, bias = weight.float() * factors[:, None], bias * factors
        if norm is not None:
            exact = weight.float()
            bias = bias + (exact * norm.bias.float()).sum(dim=1)  # a product of matrices would load cuBLAS
            weight = _with_zero_sums(exact * norm.weight.float(), dtype)
        weight = weight.to(dtype)
        if order is not None:
            weight, bias = weight[order], bias[order]
        self.weight, self.bias = weight.detach().contiguous(), bias.detach().contiguous()
        # Sums of the rounded weight, which are zero but for a rest that the kernel for Hopper GPUs leaves out.
        self.row_sums = None if norm is None else self.weight.float().sum(dim=1)
        self.gelu, self.norm_after = gelu, copy.deepcopy(norm_after)
        self.eps = next((given.eps for given in (norm, norm_after) if given is not None), 0.0)
        self.gain_and_shift = None
        if norm_after is not None:
            self.gain_and_shift = norm_after.weight.float().contiguous(), norm_after.bias.float().contiguous()
        self._wait_until_written()

    def _wait_until_written(self):
        """Wait for the device, where the weights have just been written: see the class."""
        if self.weight.is_cuda:
            torch.cuda.current_stream(self.weight.device).synchronize()

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors of the layer."""
        all_tensors = self.weight, self.bias, self.row_sums, *(self.gain_and_shift or ())
        return [tensor for tensor in all_tensors if tensor is not None]

    def replace(self, copies: Iterator[torch.Tensor]):
        """Replace each of `tensors`, in their order, by the next one of these copies of them."""
        self.weight, self.bias = next(copies), next(copies)
        self.row_sums = None if self.row_sums is None else next(copies)
        self.gain_and_shift = None if self.gain_and_shift is None else (next(copies), next(copies))
        self._wait_until_written()

    def __call__(
        self,
        rows: RowsWithStatistics,
        residual: torch.Tensor | None = None,
        statistics: bool = False,
        memory: torch.Tensor | None = None,
    ) -> RowsWithStatistics:
        """Apply the layer to rows (M, K).

        Args:
            rows: half precision (M, K), on the weight's device. Missing statistics are computed if there is a norm.
            residual: (M, N), or (M / n, N) to be added n times over.
            statistics: whether to compute statistics of the result.
            memory: 1-D tensor of at least M * N elements; a kernel writes its result to the beginning of it. It may be
                the memory of a residual (M, N), from its first element on, but not that of `rows`.

        Returns:
            Rows (M, N).
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


def _with_zero_sums(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Subtract the means of rows (N, K), and round to `dtype` so that the sums of the rounded rows are zero, too.

    The mean of a row of x, which is multiplied by these sums, may be many times as large as its standard deviation. So
    the sum of the errors of rounding is taken from the 16 smallest elements, and what they leave from the smallest.
    """
    weight = weight - weight.mean(dim=1, keepdim=True)
    rounded = weight.to(dtype)
    smallest = weight.abs().topk(min(16, weight.shape[1]), largest=False).indices
    for places in (smallest, smallest[:, :1]):
        errors = rounded.float().sum(dim=1, keepdim=True)
        corrected = rounded.gather(1, places).float() - errors / places.shape[1]
        rounded.scatter_(1, places, corrected.to(dtype))
    return rounded


def embed_patches(
    layer: FusedLinear,
    pixel_values: torch.Tensor,
    positions: torch.Tensor | None,
    memory: torch.Tensor | None = None,
) -> RowsWithStatistics:
    """Embed the patches of images; the kernel reads the pixels without a copy.

    Args:
        layer: of C * p * p input features, for patches of p x p pixels.
        pixel_values: (B, C, S, S).
        positions: (N, channels), added to the N tokens of each image; None for none.
        memory: as for `FusedLinear.__call__`.

    Returns:
        Tokens (B * N, channels) with statistics.
    """
    if why_not_hopper_patches(layer, pixel_values, positions) is None:
        return launch_hopper(layer, patches_of(pixel_values), None, positions, statistics=True, memory=memory)
    if why_not_patches(layer, pixel_values, positions):
        size = _patch_size(layer.weight.shape[1], pixel_values.shape[1])
        patches = RowsWithStatistics(_split_patches(pixel_values.to(layer.weight.dtype), size))
        return layer(patches, positions, statistics=True, memory=memory)
    return launch_patches(layer, pixel_values, positions, memory=memory)


def _patch_size(in_features: int, channels: int) -> int:
    return math.isqrt(in_features // channels)


def _split_patches(pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    """Return the patches of images, (B, C, S, S) -> (B * N, C * p * p)."""
    batch_size, channels, height, width = pixel_values.shape
    patches = pixel_values.reshape(batch_size, channels, height // size, size, width // size, size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)


def convolve(layer: FusedLinear, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Apply a 3 x 3 convolution with zero padding.

    Args:
        layer: the convolution, of 9 * C input features in the order (y, x, channel).
        tokens: (B, h * w, C).
        grid: (h, w).

    Returns:
        Tokens (B, h * w, channels).
    """
    batch_size = len(tokens)
    images = tokens.unflatten(1, grid)
    neighbours = neighbours_of(images)
    # With many images cuDNN's kernel is the faster one.
    if neighbours.num_rows <= hopper_linear.FEW_ROWS and why_not_hopper(layer, neighbours) is None:
        return launch_hopper(layer, neighbours).values.unflatten(0, (batch_size, -1))
    convolved = F.conv2d(images.permute(0, 3, 1, 2), _kernel_of(layer), padding=1).permute(0, 2, 3, 1).flatten(1, 2)
    return convolved if layer.norm_after is None else add_layer_norm(convolved.contiguous(), layer.norm_after)


def load_convolution(device: torch.device, dtype: torch.dtype, channels: int, side: int):
    """Run a convolution like that of `convolve` with many images, for which cuDNN is loaded, in a tenth of a second."""
    with contextlib.suppress(Exception), torch.inference_mode():  # the real call says what is wrong
        weight = torch.zeros(channels, channels, 3, 3, device=device, dtype=dtype)
        images = torch.zeros(1 + hopper_linear.FEW_ROWS // side**2, channels, side, side, device=device, dtype=dtype)
        weight, images = (tensor.to(memory_format=torch.channels_last) for tensor in (weight, images))
        F.conv2d(images, weight, padding=1)


def _kernel_of(layer: FusedLinear) -> torch.Tensor:
    """Return the kernel (channels, C, 3, 3), channels last, of a layer of `convolve`."""
    return layer.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)


def fused_linear_reference(
    layer: FusedLinear, rows: RowsWithStatistics, residual: torch.Tensor | None = None, statistics: bool = False
) -> RowsWithStatistics:
    """Compute `FusedLinear` step by step, on any device and in any dtype."""
    compute = torch.float64 if rows.values.dtype == torch.float64 else torch.float32
    values = rows.values.to(compute)
    if layer.row_sums is not None:
        values = F.layer_norm(values, values.shape[-1:], eps=layer.eps)
    values = F.linear(values, layer.weight.to(compute), layer.bias.to(compute))
    if layer.gelu:
        values = F.gelu(values)
    if residual is not None:
        values = (values.unflatten(0, (-1, len(residual))) + residual.to(compute)).flatten(0, 1)
    if layer.gain_and_shift is not None:
        gain, shift = (tensor.to(compute) for tensor in layer.gain_and_shift)
        values = F.layer_norm(values, values.shape[-1:], gain, shift, layer.eps)
    values = values.to(rows.values.dtype)
    return with_statistics(values) if statistics else RowsWithStatistics(values)


def with_statistics(values: torch.Tensor) -> RowsWithStatistics:
    """Compute the statistics of rows (M, N) over all columns, as one part."""
    return RowsWithStatistics(values, _statistics_of(values, parts=1))


@dataclass(frozen=True)
class _Variant:
    """All properties of a layer that its kernel is compiled for, except the tile."""

    dtype: torch.dtype
    out_features: int
    in_features: int
    normalizes: bool = False
    gelu: bool = False
    parts: int = 1  # of the input's statistics
    adds: bool = False
    statistics: bool = False
    norm_after: bool = False


def why_not_triton(
    layer: FusedLinear, rows: RowsWithStatistics, residual: torch.Tensor | None = None, statistics: bool = False
) -> str | None:
    """Return why Triton's kernel cannot run on these inputs, as a sentence, or None if it can."""
    values, weight = rows.values, layer.weight
    if reason := _why_not_layer(layer, len(values)):
        return reason
    for tensor in (values, *(() if residual is None else (residual,))):
        if (tensor.dtype, tensor.device) != (weight.dtype, weight.device):
            return f"the weights are {weight.dtype} on {weight.device}, the input {tensor.dtype} on {tensor.device}."
    if residual is not None and (not len(residual) or len(residual) % 128 or len(values) % len(residual)):
        return f"{len(values)} rows and a residual of {len(residual)} rows are no multiples of that and of 128."
    if not hopper.are_aligned(weight, values, residual):
        return "the tensors are not contiguous, or begin at odd addresses."
    normalizes = layer.row_sums is not None
    out_features, in_features = weight.shape
    parts = len(rows.statistics) if normalizes and rows.statistics is not None else 1
    variant = _Variant(
        weight.dtype, out_features, in_features, normalizes, layer.gelu, parts, residual is not None, statistics
    )
    return _why_not_variant(weight.device, variant, triton_tile(len(values), out_features, in_features))


def why_not_patches(layer: FusedLinear, pixel_values: torch.Tensor, positions: torch.Tensor | None) -> str | None:
    """Return why Triton's kernel cannot embed these patches, as a sentence, or None if it can."""
    batch_size, channels, height, width = pixel_values.shape
    out_features, in_features = layer.weight.shape
    size = _patch_size(in_features, channels)
    grid = height // size, width // size
    if reason := _why_not_layer(layer, batch_size * grid[0] * grid[1]):
        return reason
    if (height, width) != (grid[0] * size, grid[1] * size):
        return f"{height} x {width} pixels cannot be divided into patches of {size} x {size}."
    dtype, device = layer.weight.dtype, layer.weight.device
    positions_differ = positions is not None and (positions.dtype, positions.device) != (dtype, device)
    if pixel_values.device != device or positions_differ:
        return f"the weights are {dtype} on {device}, and the pixels or the positions are not."
    if positions is not None and (len(positions) != grid[0] * grid[1] or len(positions) % 64):
        return f"{len(positions)} positions must be a multiple of 64 and match images of {grid[0]} x {grid[1]} patches."
    if not hopper.are_aligned(layer.weight, pixel_values, positions):
        return "the tensors are not contiguous, or begin at odd addresses."
    variant = _Variant(dtype, out_features, in_features, adds=positions is not None, statistics=True)
    return _why_not_patches_variant(device, variant, pixel_values.dtype, channels, height, width)


def _why_not_patches_variant(
    device: torch.device, variant: _Variant, dtype: torch.dtype, channels: int, height: int, width: int
) -> str | None:
    def attempt() -> bool:
        numbers, size = normal_numbers(device), _patch_size(variant.in_features, channels)
        layer, num_patches = _layer_of(numbers, variant), height * width // size**2
        # Enough images for the number of rows to be a multiple of a block.
        pixel_values = numbers(128 // math.gcd(128, num_patches), channels, height, width).to(dtype)
        positions = numbers(num_patches, variant.out_features).to(variant.dtype) if variant.adds else None
        patches = RowsWithStatistics(_split_patches(pixel_values.to(variant.dtype), size))
        result = tried(lambda: launch_patches(layer, pixel_values, positions))
        return _agree(result, fused_linear_reference(layer, patches, positions).values)

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
    """Return why no layer, not even a small one, runs in Triton on this device, or None if one does."""
    if triton is None:
        return "Triton is not installed."
    return _why_not_variant(device, _Variant(dtype, 64, 64, True, True), triton_tile(128, 64, 64))


def why_not_hopper_patches(
    layer: FusedLinear, pixel_values: torch.Tensor, positions: torch.Tensor | None
) -> str | None:
    """Return why the kernel for Hopper GPUs cannot embed these patches, as a sentence, or None if it can."""
    (_, channels, height, width), in_features = pixel_values.shape, layer.weight.shape[1]
    size = _patch_size(in_features, channels)
    if size != PATCH or height % size or width % size:
        return f"{height} x {width} pixels and patches of {size} x {size}: it needs multiples of {PATCH}, and {PATCH}."
    x = patches_of(pixel_values)
    if positions is not None and len(positions) != math.prod(x.grid):
        return f"{len(positions)} positions must match images of {x.grid[0]} x {x.grid[1]} patches."
    return why_not_hopper(layer, x, positions, statistics=True)


def why_not_hopper(
    layer: FusedLinear, x: Input, residual: torch.Tensor | None = None, statistics: bool = False, parts: int = 1
) -> str | None:
    """Return why the kernel for Hopper GPUs cannot run on these inputs, as a sentence, or None if it can.

    `parts` is the number of parts of x's statistics, if the layer normalizes x.
    """
    if reason := hopper_linear.why_not(layer, x, residual):
        return reason
    (out_features, in_features), normalizes = layer.weight.shape, layer.row_sums is not None
    tile = hopper_linear.tile_of(layer, x)
    constants = hopper_linear.constants_of(layer, x, parts, residual is not None, statistics)
    norm_after = bool(constants["NORM_AFTER"])

    def attempt() -> bool:
        sizes = layer.weight.dtype, out_features, in_features
        variant = _Variant(*sizes, normalizes, layer.gelu, parts, residual is not None, statistics, norm_after)
        small, rows, added = _example(layer.weight.device, variant, 512)
        # One multiprocessor for each tile's columns, so that a thread block takes several tiles.
        processors = out_features // tile.columns
        if x.kind == "ROWS":
            result = tried(
                lambda: launch_hopper(
                    small, rows_of(rows.values), rows.statistics, added, statistics, tile, None, processors
                )
            )
            return _agree(result, fused_linear_reference(small, rows, added).values)
        if x.kind == "PATCHES":
            return _agrees_on_patches(small, x, tile, adds=residual is not None)
        images = normal_numbers(layer.weight.device)(1, *x.grid, in_features // 9).to(variant.dtype)
        result = tried(lambda: launch_hopper(small, neighbours_of(images), tile=tile, num_processors=processors))
        expected = F.conv2d(images.float().movedim(3, 1), _kernel_of(small).float(), small.bias, padding=1)
        expected = expected.movedim(1, 3).flatten(0, 2)
        if small.gain_and_shift is not None:
            expected = F.layer_norm(expected, (out_features,), *small.gain_and_shift, small.eps)
        return _agree(result, expected)

    return why_not_tried(
        "linear layers", layer.weight.device, (tile, *constants.values()), attempt, "CUDA", "Triton's kernels"
    )


def _agrees_on_patches(layer: FusedLinear, x: Input, tile: hopper_linear.Tile, adds: bool) -> bool:
    numbers = normal_numbers(layer.weight.device)
    (lines, columns), (out_features, in_features) = x.grid, layer.weight.shape
    pixel_values = numbers(2, in_features // PATCH**2, lines * PATCH, columns * PATCH).to(layer.weight.dtype)
    positions = numbers(lines * columns, out_features).to(layer.weight.dtype) if adds else None
    processors = out_features // tile.columns  # so that a thread block takes several tiles
    result = tried(
        lambda: launch_hopper(layer, patches_of(pixel_values), None, positions, True, tile, num_processors=processors)
    )
    patches = RowsWithStatistics(_split_patches(pixel_values, PATCH))
    return _agree(result, fused_linear_reference(layer, patches, positions).values)


def _why_not_variant(device: torch.device, variant: _Variant, tile: dict[str, int]) -> str | None:
    def attempt() -> bool:
        layer, rows, residual = _example(device, variant, 256)
        result = tried(lambda: launch_triton(layer, rows, residual, variant.statistics, tile))
        return _agree(result, fused_linear_reference(layer, rows, residual).values)

    return why_not_tried("linear layers", device, (variant, *tile.values()), attempt)


def _example(
    device: torch.device, variant: _Variant, num_rows: int
) -> tuple[FusedLinear, RowsWithStatistics, torch.Tensor | None]:
    """Make a layer, its input of `num_rows` rows, and its residual of 128 rows."""
    numbers = normal_numbers(device)
    values = (numbers(num_rows, variant.in_features) + 1).to(variant.dtype)
    rows = RowsWithStatistics(values, _statistics_of(values, variant.parts) if variant.normalizes else None)
    residual = numbers(128, variant.out_features).to(variant.dtype) if variant.adds else None
    return _layer_of(numbers, variant), rows, residual


def _layer_of(numbers: Callable[..., torch.Tensor], variant: _Variant) -> FusedLinear:
    weight = numbers(variant.out_features, variant.in_features) * variant.in_features**-0.5
    norm = _norm_of(numbers, variant.in_features) if variant.normalizes else None
    after = _norm_of(numbers, variant.out_features) if variant.norm_after else None
    weight = weight.to(variant.dtype)
    return FusedLinear(weight, numbers(variant.out_features), norm, variant.gelu, norm_after=after)


def _norm_of(numbers: Callable[..., torch.Tensor], width: int) -> nn.LayerNorm:
    gain, shift = 1 + 0.3 * numbers(width), numbers(width)
    norm = nn.LayerNorm(width, device=gain.device, dtype=torch.float32)
    norm.weight.copy_(gain), norm.bias.copy_(shift)
    return norm


def _agree(result: RowsWithStatistics, expected: torch.Tensor) -> bool:
    """Return whether the values are as expected, up to rounding, and the statistics are those of the values."""
    pairs = [(result.values.float(), expected.float())]
    if result.statistics is not None:
        pairs += zip(result.statistics.unbind(1), _statistics_of(result.values, len(result.statistics)).unbind(1))
    return all(bool((a - b).norm() < 0.01 * b.norm()) for a, b in pairs)


def _statistics_of(values: torch.Tensor, parts: int) -> torch.Tensor:
    """Compute the statistics of values (M, N) in `parts` parts."""
    chunks = [chunk.float() for chunk in values.chunk(parts, dim=1)]
    moments = [(torch.var_mean(chunk, dim=1, correction=0), chunk.shape[1]) for chunk in chunks]
    return torch.stack([torch.stack([mean, variance * width]) for (variance, mean), width in moments])


def launch_hopper(
    layer: FusedLinear,
    x: Input,
    x_statistics: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    statistics: bool = False,
    tile: hopper_linear.Tile | None = None,
    memory: torch.Tensor | None = None,
    num_processors: int | None = None,
) -> RowsWithStatistics:
    """Run the layer in the kernel for Hopper GPUs.

    Args:
        layer: the layer.
        x: its input (M, K), as `rows_of`, `neighbours_of` or `patches_of` describe it.
        x_statistics: float32 (parts, 2, M), statistics of x's rows if the layer normalizes them.
        residual, statistics, memory: as for `FusedLinear.__call__`.
        tile: the kernel's tile; by default the one `hopper_tile` chooses.
        num_processors: number of multiprocessors to plan for; by default those of the device.
    """
    tile = tile or hopper_linear.tile_of(layer, x)
    result = _allocate(layer.weight, x.num_rows, tile.consumer_columns, statistics, memory)
    hopper_linear.launch_linear(
        layer, x, tile, result.values, x_statistics, result.statistics, residual, num_processors
    )
    return result if hopper_linear.fuses_norm_after(layer, x.num_rows) else _normalized(layer, result)


def launch_triton(
    layer: FusedLinear,
    rows: RowsWithStatistics,
    residual: torch.Tensor | None = None,
    statistics: bool = False,
    tile: dict[str, int] | None = None,
    memory: torch.Tensor | None = None,
) -> RowsWithStatistics:
    """Run the layer in Triton's kernel; arguments as for `FusedLinear.__call__`, and the kernel's `tile`."""
    out_features, in_features = layer.weight.shape
    tile = tile or triton_tile(len(rows.values), out_features, in_features)
    result = _allocate(layer.weight, len(rows.values), tile["BLOCK_N"], statistics, memory)
    launch_linear_kernel(
        rows.values, layer.weight, layer.bias, result.values, tile,
        row_sums=layer.row_sums, x_statistics=rows.statistics, eps=layer.eps, gelu=layer.gelu,
        residual=residual, statistics=result.statistics,
    )  # fmt: skip
    return _normalized(layer, result)


def _normalized(layer: FusedLinear, rows: RowsWithStatistics) -> RowsWithStatistics:
    """Apply the LayerNorm that follows a layer, if there is one."""
    if layer.norm_after is None:
        return rows
    return RowsWithStatistics(add_layer_norm(rows.values[None], layer.norm_after)[0])


def launch_patches(
    layer: FusedLinear,
    pixel_values: torch.Tensor,
    positions: torch.Tensor | None = None,
    tile: dict[str, int] | None = None,
    memory: torch.Tensor | None = None,
) -> RowsWithStatistics:
    """Run `embed_patches` in Triton's kernel."""
    batch_size, channels, height, width = pixel_values.shape
    size = _patch_size(layer.weight.shape[1], channels)
    num_rows = batch_size * (height // size) * (width // size)
    tile = tile or patch_tile(len(layer.weight))
    result = _allocate(layer.weight, num_rows, tile["BLOCK_N"], statistics=True, memory=memory)
    assert result.statistics is not None
    launch_patch_kernel(pixel_values, size, layer.weight, layer.bias, positions, result.values, result.statistics, tile)
    return result


def _allocate(
    weight: torch.Tensor, num_rows: int, columns: int, statistics: bool, memory: torch.Tensor | None = None
) -> RowsWithStatistics:
    """Allocate a layer's output, in `memory` if given, and its statistics in parts of `columns` columns if wanted."""
    out_features = len(weight)
    size = num_rows * out_features
    output = weight.new_empty(size) if memory is None else memory[:size]
    parts = weight.new_empty(out_features // columns, 2, num_rows, dtype=torch.float32) if statistics else None
    return RowsWithStatistics(output.view(num_rows, out_features), parts)
