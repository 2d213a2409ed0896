"""Residual, LayerNorm and GELU of many short rows in one pass over memory.

The decoder normalizes millions of rows of 64 and 256 channels. torch uses a whole thread block for each row, which
leaves most of the memory's bandwidth unused for rows this short, and adds and activates in separate passes. The Triton
kernel processes many rows in a thread block. Like torch, it computes in float32 whatever the dtype.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .support import launch, normal_numbers, on_device_of, tl, tried, triton, why_not_tried


_TILE = 4096  # elements of a thread block


def add_layer_norm(
    values: torch.Tensor, norm: nn.LayerNorm, residual: torch.Tensor | None = None, gelu: bool = False
) -> torch.Tensor:
    """Compute LayerNorm(values + residual) over the last axis, then GELU if `gelu`. For inference only.

    Args:
        values: contiguous (P, N, C); may be overwritten.
        norm: LayerNorm of C features.
        residual: (P, N, C), or (1, N, C) for all P; None for none.
        gelu: whether to apply GELU.

    Returns:
        (P, N, C).
    """
    if why_not_triton(values, norm, residual, gelu):
        return add_layer_norm_reference(values, norm, residual, gelu)
    return launch_layer_norm(values, norm, residual, gelu)


def add_layer_norm_reference(
    values: torch.Tensor, norm: nn.LayerNorm, residual: torch.Tensor | None = None, gelu: bool = False
) -> torch.Tensor:
    """Compute `add_layer_norm` step by step."""
    if residual is not None:
        values = values + residual
    values = F.layer_norm(values, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return F.gelu(values) if gelu else values


def why_not_triton(
    values: torch.Tensor, norm: nn.LayerNorm, residual: torch.Tensor | None = None, gelu: bool = False
) -> str | None:
    """Return why the kernel cannot run on these inputs, as a sentence, or None if it can."""
    if triton is None:
        return "Triton is not installed."
    if not values.is_cuda:
        return f"the tensors are on {values.device}."
    width = values.shape[-1]
    if width & (width - 1) or width > _TILE:
        return f"the row width {width} is no power of two up to {_TILE}."
    if not values.is_contiguous() or (residual is not None and not residual.is_contiguous()):
        return "the tensors are not contiguous."
    if norm.weight is None or norm.bias is None or norm.normalized_shape != (width,):
        return f"the norm has the shape {norm.normalized_shape}, or is without a gain or a bias."
    types = values.dtype, norm.weight.dtype, None if residual is None else residual.dtype
    return _why_not_tried(values.device, width, gelu, *types)


def _why_not_tried(
    device: torch.device,
    width: int,
    gelu: bool,
    dtype: torch.dtype,
    norm_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> str | None:
    def attempt() -> bool:
        numbers = normal_numbers(device)
        norm = nn.LayerNorm(width, eps=1e-6, device=device, dtype=norm_dtype)
        norm.weight.copy_(1 + 0.3 * numbers(width))
        norm.bias.copy_(numbers(width))
        values, residual = (numbers(2, 3, width) + 1).to(dtype), None
        if residual_dtype is not None:
            residual = numbers(1, 3, width).to(residual_dtype)
        given = values.clone()  # the kernel overwrites its input
        result = tried(lambda: launch_layer_norm(values.copy_(given), norm, residual, gelu))
        expected = given.float() if residual is None else given.float() + residual.float()
        expected = add_layer_norm_reference(expected, copy.deepcopy(norm).float(), gelu=gelu)
        return bool((result - expected).norm() < (1e-4 if dtype == torch.float32 else 0.01) * expected.norm())

    return why_not_tried("layer norms", device, (width, gelu, dtype, norm_dtype, residual_dtype), attempt)


def launch_layer_norm(
    values: torch.Tensor, norm: nn.LayerNorm, residual: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """Run `add_layer_norm` in the kernel, which overwrites `values`."""
    width = values.shape[-1]
    num_rows = values.numel() // width
    rows = max(1, _TILE // width)
    with on_device_of(values):
        if num_rows:
            launch(
                _kernel, (triton.cdiv(num_rows, rows),),
                values, values if residual is None else residual, norm.weight, norm.bias,
                num_rows, 1 if residual is None else residual.numel() // width, norm.eps,
                WIDTH=width, ROWS=rows, ADD=residual is not None, GELU=gelu,
            )  # fmt: skip
    return values


if triton is not None:

    @triton.jit
    def _kernel(
        values, residual, weight, bias, num_rows, num_residual_rows, eps,
        WIDTH: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, GELU: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, WIDTH)[None, :]
        inside = rows < num_rows
        row = tl.load(values + rows * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            residual_rows = rows % num_residual_rows
            row += tl.load(residual + residual_rows * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        centred = row - tl.sum(row, axis=1, keep_dims=True) / WIDTH
        variance = tl.sum(centred * centred, axis=1, keep_dims=True) / WIDTH
        result = centred / tl.sqrt(variance + eps)
        result = result * tl.load(weight + columns).to(tl.float32) + tl.load(bias + columns).to(tl.float32)
        if GELU:
            result = 0.5 * result * (1.0 + tl.erf(result * 0.7071067811865476))
        tl.store(values + rows * WIDTH + columns, result.to(values.dtype.element_ty), mask=inside)
