"""The end of SAM's mask decoder in one Triton kernel: from image tokens to the pixels of the masks that are wanted.

Two transposed convolutions, a layer norm, two GELUs and the product with a prompt's hypernetworks make 16 pixels of each image
token. Step by step they write and read 16 times as many numbers as the masks have. The kernel keeps all of it in
registers: it reads each image token once and writes finished pixels, in float32, computed from sums in float32.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .layer_norm import add_layer_norm, add_layer_norm_reference
from .support import launched, normal_numbers, overlap_options, tl, triton, why_not_decoder, why_not_tried


_NAME = "the end of the mask decoder"
_BLOCK = 64  # image tokens
_PROGRAMS = 528  # that a device is given at least: two at a time on each multiprocessor of an H100, twice


class HeadWeights(NamedTuple):
    """Of C channels: `weight1` (4 * C / 4, C) and `weight2` (4 * C / 8, C / 4) make 2 x 2 of each token, row by row."""

    weight1: torch.Tensor
    bias1: torch.Tensor
    norm: nn.LayerNorm
    weight2: torch.Tensor
    bias2: torch.Tensor


def why_not_triton(weights: HeadWeights) -> str | None:
    """Why the kernel cannot run with these: a sentence, or None where it can."""
    weight = weights.weight1
    reason = why_not_decoder(weight.device, weight.dtype, weight.shape[1])
    return reason or _why_not_tried(weight.device, weight.shape[1], weight.dtype)


def _why_not_tried(device: torch.device, channels: int, dtype: torch.dtype) -> str | None:
    def attempt() -> bool:
        numbers = normal_numbers(device)
        norm = nn.LayerNorm(channels // 4, eps=1e-6, device=device, dtype=dtype)
        weights = HeadWeights(
            0.1 * numbers(channels, channels).to(dtype), numbers(channels).to(dtype), norm,
            0.1 * numbers(channels // 2, channels // 4).to(dtype), numbers(channels // 2).to(dtype),
        )  # fmt: skip
        image, hyper = numbers(2, 64, channels).to(dtype), numbers(2, 3, channels // 8)
        slots = torch.tensor([[0, 2, -1], [-1, 1, -1]], dtype=torch.int32, device=device)
        found = launch_head(image, hyper, slots, 3, (8, 8), weights)
        expected = run_head(image.float(), hyper, (8, 8), _in_float32(weights), add_layer_norm_reference)
        expected = expected.flatten(0, 1)[[0, 4, 1]]
        return bool((found - expected).norm() < 0.02 * expected.norm())

    return why_not_tried(_NAME, device, (channels, dtype), attempt)


def _in_float32(weights: HeadWeights) -> HeadWeights:
    norm = copy.deepcopy(weights.norm).float()
    return HeadWeights(*(part.float() if isinstance(part, torch.Tensor) else norm for part in weights))


def run_head(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    grid: tuple[int, int],
    weights: HeadWeights,
    add_norm=add_layer_norm,
) -> torch.Tensor:
    """The same, step by step, of all masks: image tokens (P, N, C) and `hyper` (P, M, C / 8) to logits (P, M, 4h, 4w)."""
    height, width = grid
    hidden = F.linear(image_tokens, weights.weight1, weights.bias1)
    hidden = hidden.view(len(image_tokens), -1, weights.weight2.shape[1])  # (P, N * 2 * 2, C / 4)
    hidden = add_norm(hidden, weights.norm, gelu=True)
    hidden = F.gelu(F.linear(hidden, weights.weight2, weights.bias2))  # (P, N * 2 * 2, 2 * 2 * C / 8)
    hidden = hidden.view(len(hidden), -1, hyper.shape[-1])  # (P, N * 2 * 2 * 2 * 2, C / 8)
    logits = hyper.to(hidden.dtype) @ hidden.transpose(1, 2)
    # Of each image token 2 x 2 pixels, and of each of those 2 x 2: (P, M, h, w, 2, 2, 2, 2) -> (P, M, h, 2, 2, w, 2, 2)
    logits = logits.view(*logits.shape[:2], height, width, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return logits.reshape(*logits.shape[:2], 4 * height, 4 * width)


def masks_of(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    slots: torch.Tensor,
    num_kept: int,
    grid: tuple[int, int],
    weights: HeadWeights,
) -> torch.Tensor:
    """`launch_head`, or the same step by step where Triton cannot compile the kernel for so many masks of a prompt."""
    return launched(
        _NAME, image_tokens.device, (*hyper.shape[1:], image_tokens.dtype, "masks"),
        lambda: launch_head(image_tokens, hyper, slots, num_kept, grid, weights),
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
    """`launch_head`, step by step."""
    logits = torch.empty(num_kept + 1, 4 * grid[0], 4 * grid[1], dtype=torch.float32, device=image_tokens.device)
    logits[slots.flatten().long()] = run_head(image_tokens, hyper, grid, weights).flatten(0, 1).float()
    return logits[:num_kept]  # those that are left out are at the end


def launch_head(
    image_tokens: torch.Tensor,
    hyper: torch.Tensor,
    slots: torch.Tensor,
    num_kept: int,
    grid: tuple[int, int],
    weights: HeadWeights,
) -> torch.Tensor:
    """Logits, float32 (num_kept, 4h, 4w): mask m of prompt p is number `slots[p, m]` of them, and left out where that is -1.

    image_tokens (P, N, C) of an h x w grid, hyper float32 (P, M, C / 8), slots int32 (P, M).
    """
    (num_prompts, num_tokens, channels), (height, width) = image_tokens.shape, grid
    logits = torch.empty(num_kept, 4 * height, 4 * width, dtype=torch.float32, device=image_tokens.device)
    image_tokens, hyper, slots = image_tokens.contiguous(), hyper.contiguous(), slots.contiguous()
    blocks = triton.cdiv(num_tokens, _BLOCK)
    # A program makes all four parts of an image token, or with few prompts one of them.
    programs_of_block = 1 if num_prompts * blocks >= _PROGRAMS else 4
    if num_kept:
        with torch.cuda.device_of(image_tokens):  # where Triton launches
            _kernel[(num_prompts, blocks, programs_of_block)](  # only the first may be more than 65,535
                image_tokens, weights.weight1, weights.bias1, weights.norm.weight, weights.norm.bias,
                weights.weight2, weights.bias2, hyper, slots, logits, num_tokens, width, weights.norm.eps, 4 // programs_of_block,
                CHANNELS=channels, MASKS=hyper.shape[1], BLOCK=_BLOCK, num_warps=4, num_stages=1, **overlap_options(image_tokens),
            )  # fmt: skip
    return logits


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
            image = tl.load(own_tokens + token[:, None] * CHANNELS + channel[None, :], mask=real[:, None], other=0.0)
            scale = tl.load(norm_weight + quarter).to(tl.float32)[None, :]
            shift = tl.load(norm_bias + quarter).to(tl.float32)[None, :]
            # The first pixel of each token, in a mask of 4 times the grid's width.
            corner = (token // grid_width) * 16 * grid_width + (token % grid_width) * 4
            for part in range(tl.program_id(2) * parts, (tl.program_id(2) + 1) * parts):  # of 2 x 2 of each token
                rows = part * QUARTER + quarter
                weight = tl.load(weight1 + rows[None, :] * CHANNELS + channel[:, None])
                hidden = tl.dot(image, weight) + tl.load(bias1 + rows).to(tl.float32)[None, :]
                centred = hidden - (tl.sum(hidden, axis=1) / QUARTER)[:, None]
                variance = tl.sum(centred * centred, axis=1) / QUARTER
                hidden = centred / tl.sqrt(variance + eps)[:, None] * scale + shift
                hidden = _exact_gelu(hidden).to(image_tokens.dtype.element_ty)
                part_corner = corner + (part // 2) * 8 * grid_width + (part % 2) * 2
                for pixel in tl.static_range(4):  # and 2 x 2 of each of these
                    rows = pixel * EIGHTH + eighth
                    weight = tl.load(weight2 + rows[None, :] * QUARTER + quarter[:, None])
                    colours = _exact_gelu(tl.dot(hidden, weight) + tl.load(bias2 + rows).to(tl.float32)[None, :])
                    target = part_corner + (pixel // 2) * 4 * grid_width + pixel % 2
                    for mask in tl.static_range(MASKS):
                        number = prompt * MASKS + mask
                        slot = tl.load(slots + number)
                        factors = tl.load(hyper + number * EIGHTH + eighth)
                        values = tl.sum(colours * factors[None, :], axis=1)
                        output = logits + slot.to(tl.int64) * num_tokens * 16
                        tl.store(output + target, values, mask=real & (slot >= 0))
