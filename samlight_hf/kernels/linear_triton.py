"""Triton kernels of the fused linear layers in `linear.py`: LayerNorm, product, bias, GELU and residual in one launch.

The functions here take plain tensors. Choosing a kernel, allocating its output and checking its inputs is up to
`linear.py`.
"""

import torch

from .support import launch, on_device_of, overlap_options, tl, triton


def triton_tile(num_rows: int, out_features: int, in_features: int) -> dict[str, int]:
    """Return block sizes and launch options of a linear layer's kernel.

    They were the fastest on an H100 among twenty candidates for each layer and three batch sizes. Four warps per tile
    and three stages leave room for several tiles on a multiprocessor. With few input features each tile is short, and
    its start and end overlap with the products of the others. Few rows need smaller tiles, so that there are enough of
    them.
    """
    few = num_rows <= 8192 and in_features < 1024
    return _tile(128, 64 if few or out_features % 128 else 128, num_warps=4, num_stages=3)


def patch_tile(out_features: int) -> dict[str, int]:
    """Return block sizes and launch options of the patch embedding's kernel."""
    return _tile(64, 64 if out_features % 128 else 128, num_warps=4, num_stages=3)


def _tile(rows: int, columns: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 64, "num_warps": num_warps, "num_stages": num_stages}


def launch_linear_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    output: torch.Tensor,
    tile: dict[str, int],
    *,
    row_sums: torch.Tensor | None = None,
    x_statistics: torch.Tensor | None = None,
    eps: float = 0.0,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
):
    """Write act(LayerNorm(x) W^T + b) + residual to `output`.

    Args:
        x: half precision (M, K).
        weight: in x's dtype, (N, K).
        bias: float32 (N,).
        output: in x's dtype, (M, N).
        tile: block sizes and launch options, as `triton_tile` gives them.
        row_sums: float32 (N,), sums of the weight's rows where x is normalized; None where it is not.
        x_statistics: float32 (parts, 2, M), statistics of x's rows where x is normalized.
        eps: of the LayerNorm.
        gelu: whether GELU follows the product.
        residual: in x's dtype, (M / n, N), added n times over; None for none.
        statistics: float32 (N / BLOCK_N, 2, M) to write the output's statistics to; None for none.
    """
    num_rows, (out_features, in_features), normalizes = len(x), weight.shape, row_sums is not None
    block = [tile["BLOCK_M"], tile["BLOCK_N"]]
    thread_blocks = num_rows // block[0] * (out_features // block[1])
    with on_device_of(x):
        launch(
            _linear_kernel, (thread_blocks,),
            _descriptor(x, [block[0], tile["BLOCK_K"]]),
            _descriptor(weight, [block[1], tile["BLOCK_K"]]),
            bias, row_sums, x_statistics if normalizes else None,
            None if residual is None else _descriptor(residual, block),
            _descriptor(output, block), statistics,
            num_rows, num_rows if residual is None else len(residual), eps,
            N=out_features, K=in_features, X_PARTS=0 if x_statistics is None or not normalizes else len(x_statistics),
            NORM=normalizes, GELU=gelu, RESIDUAL=residual is not None, STATISTICS=statistics is not None,
            PTX=x.is_cuda and torch.version.cuda is not None, **overlap_options(x), **tile,
        )  # fmt: skip


def launch_patch_kernel(
    pixel_values: torch.Tensor,
    size: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor | None,
    output: torch.Tensor,
    statistics: torch.Tensor,
    tile: dict[str, int],
):
    """Write the embedded patches of images to `output`, and the statistics of its rows to `statistics`.

    Args:
        pixel_values: (B, C, h * size, w * size).
        size: side of a patch in pixels.
        weight: half precision (N, C * size * size).
        bias: float32 (N,).
        positions: in the weight's dtype, (h * w, N), added to each image's tokens; None for none.
        output: in the weight's dtype, (B * h * w, N).
        statistics: float32 (N / BLOCK_N, 2, B * h * w).
        tile: block sizes and launch options, as `patch_tile` gives them.
    """
    _, channels, height, width = pixel_values.shape
    num_rows, out_features = output.shape
    block = [tile["BLOCK_M"], tile["BLOCK_N"]]
    thread_blocks = num_rows // block[0] * (out_features // block[1])
    with on_device_of(pixel_values):
        launch(
            _patch_kernel, (thread_blocks,),
            pixel_values, _descriptor(weight, [block[1], tile["BLOCK_K"]]), bias,
            None if positions is None else _descriptor(positions, block),
            _descriptor(output, block), statistics, num_rows,
            N=out_features, CHANNELS=channels, SIZE=size, HEIGHT=height // size, WIDTH=width // size,
            POSITIONS=positions is not None, **overlap_options(pixel_values), **tile,
        )  # fmt: skip


def _descriptor(tensor: torch.Tensor, block: list[int]):
    """Describe a matrix to the GPU's tensor memory accelerator, which copies blocks of it."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # here, for `import samlight_hf` to stay light

    return TensorDescriptor.from_tensor(tensor, block)


if triton is not None:
    from .support import grid_dependency_wait

    @triton.jit
    def _linear_kernel(
        x, weight, bias, row_sums, x_statistics, residual, output, statistics, num_rows, num_residual_rows, eps,
        N: tl.constexpr, K: tl.constexpr, X_PARTS: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr,
        RESIDUAL: tl.constexpr, STATISTICS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        # Tiles of the same rows are neighbours: they read these rows from the cache at about the same time.
        first_row, first_column = tile // (N // BLOCK_N) * BLOCK_M, tile % (N // BLOCK_N) * BLOCK_N
        rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        grid_dependency_wait(OVERLAP)
        # Loads for the steps after the product are issued before it, so that they have arrived by then.
        shift = tl.load(bias + columns)
        if NORM:
            sums = tl.load(row_sums + columns)
            mean, factor = _mean_and_factor(x_statistics, rows, num_rows, eps, K, X_PARTS, BLOCK_M)
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
            _store_statistics(result, statistics, first_column // BLOCK_N, rows, num_rows, BLOCK_N)

    @triton.jit
    def _mean_and_factor(
        x_statistics, rows, num_rows, eps, K: tl.constexpr, X_PARTS: tl.constexpr, BLOCK_M: tl.constexpr
    ):
        """Return mean and 1 / standard deviation of rows, from the statistics of their parts."""
        mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for part in tl.static_range(X_PARTS):
            mean += tl.load(x_statistics + 2 * part * num_rows + rows) / X_PARTS
        squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for part in tl.static_range(X_PARTS):
            deviation = tl.load(x_statistics + 2 * part * num_rows + rows) - mean
            squares += tl.load(x_statistics + (2 * part + 1) * num_rows + rows) + deviation * deviation * (K // X_PARTS)
        return mean, tl.rsqrt(squares / K + eps)

    @triton.jit
    def _patch_kernel(
        pixels, weight, bias, positions, output, statistics, num_rows,
        N: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
        POSITIONS: tl.constexpr, OVERLAP: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        first_row, first_column = tile // (N // BLOCK_N) * BLOCK_M, tile % (N // BLOCK_N) * BLOCK_N
        rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        grid_dependency_wait(OVERLAP)  # also for the writer of the weights, of this layer and of all that follow
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
        _store_statistics(result, statistics, first_column // BLOCK_N, rows, num_rows, BLOCK_N)

    @triton.jit
    def _fitted_gelu(x, PTX: tl.constexpr):
        """Compute GELU to about 2^-11 as x * (1 + tanh(x * Q(x^2))) / 2, with Q fitted to the normal distribution.

        The fit is exact to 3e-5. The GPU has an instruction for tanh. The error function takes about thirty operations
        and a branch for each element, which would cost as much as the product.
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
    def _store_statistics(result, statistics, part, rows, num_rows, BLOCK_N: tl.constexpr):
        """Store mean and sum of squared deviations of a tile's rows, of the rounded values."""
        stored = result.to(tl.float32)
        mean = tl.sum(stored, axis=1) / BLOCK_N
        deviation = stored - mean[:, None]
        place = statistics + 2 * part * num_rows + rows
        tl.store(place, mean)
        tl.store(place + num_rows, tl.sum(deviation * deviation, axis=1))
