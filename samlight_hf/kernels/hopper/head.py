"""The end of SAM's mask decoder on Hopper GPUs, by a CUDA kernel (head.cu).

It computes the same as the Triton kernel of mask_head.py, which reads the weights anew for each block of image tokens,
and whose tensor cores wait while GELUs are computed.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..support import in_compile_thread, only_compiles
from . import runtime as hopper


if TYPE_CHECKING:
    from ..mask_head import HeadWeights


MOST_MASKS = 3  # of a prompt
_CHANNELS, _TOKENS, _WARPGROUPS = 256, 64, 2  # as in head.cu
_QUARTER, _EIGHTH = _CHANNELS // 4, _CHANNELS // 8
_WEIGHT_BYTES = 2 * (_CHANNELS * _CHANNELS + 4 * _EIGHTH * _QUARTER)
_SHARED_BYTES = (
    _WEIGHT_BYTES
    + 2 * _WARPGROUPS * _TOKENS * _CHANNELS
    + 4 * (_CHANNELS + 2 * _QUARTER + 4 * _EIGHTH)  # biases and the norm, in float32
    + 8 * (1 + _WARPGROUPS)  # barriers
)


def why_not(
    image_tokens: torch.Tensor, hyper: torch.Tensor, grid: tuple[int, int], weights: "HeadWeights"
) -> str | None:
    """Return why the kernel cannot run with these arguments of `launch_head`, as a sentence, or None if it can."""
    dtype, device = weights.weight1.dtype, weights.weight1.device
    if reason := hopper.why_not_hopper(device, dtype):
        return reason
    if weights.weight1.shape[1] != _CHANNELS:
        return f"the decoder has {weights.weight1.shape[1]} channels, and not {_CHANNELS}."
    if not 1 <= hyper.shape[1] <= MOST_MASKS:
        return f"prompts have {hyper.shape[1]} masks, and not 1 to {MOST_MASKS}."
    if (image_tokens.dtype, image_tokens.device) != (dtype, device):
        return f"the weights are {dtype} on {device}, the image tokens {image_tokens.dtype} on {image_tokens.device}."
    if grid[0] * grid[1] % _TOKENS or not image_tokens.numel():
        return (
            f"{grid[0]} x {grid[1]} image tokens of {len(image_tokens)} prompts are no multiple of {_TOKENS}, or none."
        )
    others = weights.weight2, weights.bias1, weights.bias2, weights.norm.weight, weights.norm.bias
    if hyper.dtype != torch.float32 or any(tensor.dtype != dtype for tensor in others):
        return f"the hypernetworks' outputs are not float32, or not all weights are {dtype}."
    if not hopper.are_aligned(image_tokens, weights.weight1, *others):
        return "the tensors are not contiguous, or begin at odd addresses."
    return None


def launch_head(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    slots: torch.Tensor,
    logits: torch.Tensor,
    grid: tuple[int, int],
    weights: "HeadWeights",
):
    """Write the logits of selected masks.

    Args:
        image_tokens: half precision (P, N, 256), of an h x w grid.
        hyper: outputs of the hypernetworks, float32 (P, M, 32).
        slots: int32 (P, M), the index of each mask in the result, or -1 to leave it out.
        logits: float32 (K, 4h, 4w), to be written.
        grid: (h, w).
        weights: the weights.
    """
    dtype, device, num_prompts = image_tokens.dtype, image_tokens.device, len(image_tokens)
    constants = {"BFLOAT16": int(dtype == torch.bfloat16), "MASKS": hyper.shape[1]}
    if only_compiles():
        in_compile_thread(hopper.compile_in_process, source_of(**constants))
        return
    tiles_per_prompt = grid[0] * grid[1] // _TOKENS
    num_tiles = num_prompts * tiles_per_prompt
    num_blocks = min(num_tiles, hopper.num_processors(device))
    hopper.launch_kernel(
        _kernel(device, **constants), device, num_blocks, 128 * _WARPGROUPS, _SHARED_BYTES,
        _matrix(image_tokens.flatten(0, 1), _TOKENS),
        _matrix(weights.weight1, _CHANNELS), _matrix(weights.weight2, 4 * _EIGHTH),
        weights.bias1, weights.norm.weight, weights.norm.bias, weights.bias2, hyper, slots, logits,
        num_tiles, tiles_per_prompt, grid[1], float(weights.norm.eps),
    )  # fmt: skip


def _matrix(values: torch.Tensor, rows: int):
    """Describe a matrix to the tensor memory accelerator, which copies blocks of so many rows and 64 columns."""
    (num_rows, columns), total = values.shape, values.numel()
    return hopper.tensor_map(values, (columns, num_rows, 1, 1, 1), (columns, total, total, total), (64, rows, 1, 1, 1))


@cache
def _kernel(device: torch.device, **constants: int):
    return hopper.load_kernel(device, hopper.compiled(source_of(**constants)), _name(constants), _SHARED_BYTES)


def source_of(**constants: int) -> str:
    """Return the source of the kernel for these constants, which head.cu uses in capitals."""
    dtype = "bf16" if constants["BFLOAT16"] else "f16"
    functions = hopper.product("first_product", _QUARTER, dtype)
    functions += hopper.product("second_product", 4 * _EIGHTH, dtype, from_registers=True, transposed=True)
    defined: dict[str, int | str] = {**constants, "NAME": _name(constants), "SHARED_BYTES": _SHARED_BYTES}
    return hopper.source_of(Path(__file__).with_suffix(".cu"), defined, functions)


def _name(constants: dict[str, int]) -> str:
    """Return the kernel's name, which profilers show."""
    return f"head_{constants['MASKS']}"
