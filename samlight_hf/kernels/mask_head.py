"""The end of SAM's mask decoder in one kernel: from image tokens to the logits of the selected masks.

Two transposed convolutions, a layer norm, two GELUs and the product with a prompt's hypernetworks make 16 pixels of
each image token. Step by step they write and read 16 times as many numbers as the masks have. The kernels keep
everything in registers: they read each image token once and write finished logits, in float32, computed from sums in
float32. There is one in Triton, and for Hopper GPUs one in CUDA (`hopper/head.cu`).
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .hopper import head as hopper_head
from .layer_norm import add_layer_norm, add_layer_norm_reference
from .support import (
    launch,
    launched,
    normal_numbers,
    on_device_of,
    overlap_options,
    tl,
    tried,
    triton,
    why_not_decoder,
    why_not_tried,
)


_NAME = "the end of the mask decoder"
_BLOCK = 64  # image tokens
_THREAD_BLOCKS = 528  # of a launch, at least: two at a time on each multiprocessor of an H100, twice


class HeadWeights(NamedTuple):
    """Weights of the decoder's end for C channels; each of the two layers makes 2 x 2 pixels of one, row by row.

    Attributes:
        weight1: (4 * C / 4, C).
        bias1: (4 * C / 4,).
        norm: LayerNorm of C / 4 features.
        weight2: (4 * C / 8, C / 4).
        bias2: (4 * C / 8,).
    """

    weight1: torch.Tensor
    bias1: torch.Tensor
    norm: nn.LayerNorm
    weight2: torch.Tensor
    bias2: torch.Tensor


def why_not_triton(weights: HeadWeights) -> str | None:
    """Return why the kernel cannot run with these weights, as a sentence, or None if it can."""
    weight = weights.weight1
    reason = why_not_decoder(weight.device, weight.dtype, weight.shape[1])
    return reason or _why_not_tried(weight.device, weight.shape[1], weight.dtype)


def _why_not_tried(device: torch.device, channels: int, dtype: torch.dtype) -> str | None:
    def attempt() -> bool:
        return _is_right(device, channels, dtype, 3, launch_head)

    return why_not_tried(_NAME, device, (channels, dtype), attempt)


def _is_right(device: torch.device, channels: int, dtype: torch.dtype, masks: int, launch: Callable) -> bool:
    """Return whether a kernel computes the right logits of three prompts, the first of which has no selected mask."""
    numbers = normal_numbers(device)
    norm = nn.LayerNorm(channels // 4, eps=1e-6, device=device, dtype=dtype)
    weights = HeadWeights(
        0.1 * numbers(channels, channels).to(dtype), numbers(channels).to(dtype), norm,
        0.1 * numbers(channels // 2, channels // 4).to(dtype), numbers(channels // 2).to(dtype),
    )  # fmt: skip
    # A grid whose width is a multiple of 16, as for images: for another Triton would compile the kernel once more.
    image_tokens, hyper, grid = numbers(3, 256, channels).to(dtype), numbers(3, masks, channels // 8), (16, 16)
    slots = torch.full((3 * masks,), -1, dtype=torch.int32, device=device)
    kept = torch.tensor([3 * masks - 1, masks], device=device)
    slots[kept] = torch.arange(len(kept), dtype=torch.int32, device=device)
    logits = tried(lambda: launch(image_tokens, hyper, slots.view(3, masks), len(kept), grid, weights))
    expected = run_head(image_tokens.float(), hyper, grid, _in_float32(weights), add_layer_norm_reference)
    expected = expected.flatten(0, 1)[kept]
    return bool((logits - expected).norm() < 0.02 * expected.norm())


def why_not_hopper(
    image_tokens: torch.Tensor, hyper: torch.Tensor, grid: tuple[int, int], weights: HeadWeights
) -> str | None:
    """Return why the kernel in CUDA cannot run with these arguments of `launch_head`, as a sentence, or None."""
    if reason := hopper_head.why_not(image_tokens, hyper, grid, weights):
        return reason
    channels, dtype, masks = weights.weight1.shape[1], weights.weight1.dtype, hyper.shape[1]

    def attempt() -> bool:
        return _is_right(weights.weight1.device, channels, dtype, masks, launch_hopper)

    return why_not_tried(_NAME, weights.weight1.device, (dtype, masks), attempt, "CUDA", "Triton's kernels")


def _in_float32(weights: HeadWeights) -> HeadWeights:
    weight1, bias1, norm, weight2, bias2 = weights
    norm = copy.deepcopy(norm).float()
    return HeadWeights(weight1.float(), bias1.float(), norm, weight2.float(), bias2.float())


def run_head(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    grid: tuple[int, int],
    weights: HeadWeights,
    add_norm=add_layer_norm,
) -> torch.Tensor:
    """Compute the logits of all masks step by step.

    Args:
        image_tokens: (P, N, C), of an h x w grid.
        hyper: outputs of the hypernetworks, (P, M, C / 8).
        grid: (h, w).
        weights: the weights.
        add_norm: `add_layer_norm` or its reference.

    Returns:
        (P, M, 4h, 4w).
    """
    height, width = grid
    hidden = F.linear(image_tokens, weights.weight1, weights.bias1)
    hidden = hidden.view(len(image_tokens), -1, weights.weight2.shape[1])  # (P, N * 2 * 2, C / 4)
    hidden = add_norm(hidden, weights.norm, gelu=True)
    hidden = F.gelu(F.linear(hidden, weights.weight2, weights.bias2))  # (P, N * 2 * 2, 2 * 2 * C / 8)
    hidden = hidden.view(len(hidden), -1, hyper.shape[-1])  # (P, N * 2 * 2 * 2 * 2, C / 8)
    logits = hyper.to(hidden.dtype) @ hidden.transpose(1, 2)
    # Each image token has 2 x 2 pixels of 2 x 2 each: (P, M, h, w, 2, 2, 2, 2) -> (P, M, h, 2, 2, w, 2, 2)
    logits = logits.view(*logits.shape[:2], height, width, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return logits.reshape(*logits.shape[:2], 4 * height, 4 * width)


def masks_of(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    slots: torch.Tensor,
    num_kept: int,
    grid: tuple[int, int],
    weights: HeadWeights,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `launch_head` in the fastest kernel; step by step if Triton cannot compile its one for so many masks.

    Only kernels write to `out`.
    """
    if why_not_hopper(image_tokens, hyper, grid, weights) is None:
        return launch_hopper(image_tokens, hyper, slots, num_kept, grid, weights, out)
    return launched(
        _NAME, image_tokens.device, (*hyper.shape[1:], image_tokens.dtype, "masks"),
        lambda: launch_head(image_tokens, hyper, slots, num_kept, grid, weights, out),
        lambda: masks_reference(image_tokens, hyper, slots, num_kept, grid, weights),
    )  # fmt: skip


def masks_reference(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    slots: torch.Tensor,
    num_kept: int,
    grid: tuple[int, int],
    weights: HeadWeights,
) -> torch.Tensor:
    """Compute `launch_head` step by step."""
    logits = torch.empty(num_kept + 1, 4 * grid[0], 4 * grid[1], dtype=torch.float32, device=image_tokens.device)
    logits[slots.flatten().long()] = run_head(image_tokens, hyper, grid, weights).flatten(0, 1).float()
    return logits[:num_kept]  # the last one is where masks that are left out are written


def launch_head(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    slots: torch.Tensor,
    num_kept: int,
    grid: tuple[int, int],
    weights: HeadWeights,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the logits of selected masks in the kernel.

    Args:
        image_tokens: half precision (P, N, C), of an h x w grid.
        hyper: outputs of the hypernetworks, float32 (P, M, C / 8).
        slots: int32 (P, M), the index of each mask in the result, or -1 to leave it out.
        num_kept: number of masks in the result.
        grid: (h, w).
        weights: the weights.
        out: contiguous float32 memory for the result. Default: new memory.

    Returns:
        Float32 (num_kept, 4h, 4w).
    """
    (num_prompts, num_tokens, channels), (_, width) = image_tokens.shape, grid
    logits = _memory_of(num_kept, grid, image_tokens.device) if out is None else out
    image_tokens, hyper, slots = image_tokens.contiguous(), hyper.contiguous(), slots.contiguous()
    blocks = triton.cdiv(num_tokens, _BLOCK)
    # A thread block makes all four parts of its image tokens, or with few prompts one of them.
    splits = 1 if num_prompts * blocks >= _THREAD_BLOCKS else 4
    if num_kept:
        with on_device_of(image_tokens):
            launch(
                _kernel, (num_prompts, blocks, splits),  # only the first may be more than 65,535
                image_tokens, weights.weight1, weights.bias1, weights.norm.weight, weights.norm.bias,
                weights.weight2, weights.bias2, hyper, slots, logits, num_tokens, width, weights.norm.eps, 4 // splits,
                CHANNELS=channels, MASKS=hyper.shape[1], BLOCK=_BLOCK, num_warps=4, num_stages=1,
                **overlap_options(image_tokens),
            )  # fmt: skip
    return logits


def launch_hopper(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    slots: torch.Tensor,
    num_kept: int,
    grid: tuple[int, int],
    weights: HeadWeights,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `launch_head` in the kernel for Hopper GPUs."""
    logits = _memory_of(num_kept, grid, image_tokens.device) if out is None else out
    if num_kept:
        hopper_head.launch_head(image_tokens, hyper.contiguous(), slots.contiguous(), logits, grid, weights)
    return logits


def _memory_of(num_masks: int, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.empty(num_masks, 4 * grid[0], 4 * grid[1], dtype=torch.float32, device=device)


if triton is not None:
    from .support import grid_dependency_wait

    @triton.jit
    def _exact_gelu(values):
        return 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))

    @triton.jit
    def _kernel(
        image_tokens, weight1, bias1, norm_weight, norm_bias, weight2, bias2, hyper, slots, logits,
        num_tokens, grid_width, eps, parts,
        CHANNELS: tl.constexpr, MASKS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Compute the pixels of a block of one prompt's image tokens, for its selected masks."""
        QUARTER: tl.constexpr = CHANNELS // 4
        EIGHTH: tl.constexpr = CHANNELS // 8
        prompt = tl.program_id(0)
        grid_dependency_wait(OVERLAP)
        wanted = -1
        for place in tl.static_range(MASKS):
            wanted = tl.maximum(wanted, tl.load(slots + prompt * MASKS + place))
        if wanted >= 0:
            token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            real = token < num_tokens
            channel = tl.arange(0, CHANNELS)
            quarter = tl.arange(0, QUARTER)
            eighth = tl.arange(0, EIGHTH)
            own_tokens = image_tokens + prompt.to(tl.int64) * num_tokens * CHANNELS
            tokens = tl.load(own_tokens + token[:, None] * CHANNELS + channel[None, :], mask=real[:, None], other=0.0)
            scale = tl.load(norm_weight + quarter).to(tl.float32)[None, :]
            shift = tl.load(norm_bias + quarter).to(tl.float32)[None, :]
            # The first pixel of each token, in a mask 4 times as wide as the grid.
            corner = (token // grid_width) * 16 * grid_width + (token % grid_width) * 4
            for part in range(tl.program_id(2) * parts, (tl.program_id(2) + 1) * parts):  # of the token's 2 x 2
                rows = part * QUARTER + quarter
                weight = tl.load(weight1 + rows[None, :] * CHANNELS + channel[:, None])
                hidden = tl.dot(tokens, weight) + tl.load(bias1 + rows).to(tl.float32)[None, :]
                centred = hidden - (tl.sum(hidden, axis=1) / QUARTER)[:, None]
                variance = tl.sum(centred * centred, axis=1) / QUARTER
                hidden = centred / tl.sqrt(variance + eps)[:, None] * scale + shift
                hidden = _exact_gelu(hidden).to(image_tokens.dtype.element_ty)
                part_corner = corner + (part // 2) * 8 * grid_width + (part % 2) * 2
                for pixel in tl.static_range(4):  # of the part's 2 x 2
                    rows = pixel * EIGHTH + eighth
                    weight = tl.load(weight2 + rows[None, :] * QUARTER + quarter[:, None])
                    features = _exact_gelu(tl.dot(hidden, weight) + tl.load(bias2 + rows).to(tl.float32)[None, :])
                    target = part_corner + (pixel // 2) * 4 * grid_width + pixel % 2
                    for mask in tl.static_range(MASKS):
                        number = prompt * MASKS + mask
                        slot = tl.load(slots + number)
                        factors = tl.load(hyper + number * EIGHTH + eighth)
                        values = tl.sum(features * factors[None, :], axis=1)
                        output = logits + slot.to(tl.int64) * num_tokens * 16
                        tl.store(output + target, values, mask=real & (slot >= 0))
