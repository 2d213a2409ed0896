"""The mask decoder's attention between a prompt's tokens and the image tokens, in Triton kernels.

A prompt has few tokens and N = 4096 image tokens. Step by step, scores and attended values are written and read several
times for each prompt. The kernels read image tokens once, write new ones once, and keep the scores in registers. Sums
are float32. In both directions the projections of the image tokens are already applied to the prompt's tokens, which
therefore have the C channels of the image tokens; `engine/mask_decoder.py` explains this.
"""

import copy
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from .layer_norm import add_layer_norm, add_layer_norm_reference
from .support import (
    launch,
    launched,
    normal_numbers,
    overlap_options,
    tl,
    tried,
    triton,
    why_not_decoder,
    why_not_tried,
)


_NAME = "the attention of the mask decoder"
_SUM_ROWS = 8  # that a thread block of the sum combines
_MOST_ROWS = 64  # of a prompt: its tokens times heads


class _Shape(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: Image tokens that are processed at a time.
        warps: Of a thread block.
        stages: Of the loop over blocks, in Triton's sense.
        resident: Thread blocks that a multiprocessor of an H100 holds at a time.
        start: How many blocks of image tokens take as long as the start and the end of a thread block.
        add: Whether positions are added to image tokens before the product.
    """

    block: int
    warps: int
    stages: int
    resident: int
    start: int
    add: bool = False


_SEEN = _Shape(block=64, warps=4, stages=3, resident=1, start=3)
_UPDATE = _Shape(block=64, warps=4, stages=1, resident=2, start=2, add=True)


def why_not_triton(device: torch.device, dtype: torch.dtype, channels: int, num_heads: int) -> str | None:
    """Return why the kernels cannot run in a decoder of this kind, as a sentence, or None if they can."""
    if reason := why_not_decoder(device, dtype, channels):
        return reason
    if num_heads not in (1, 2, 4, 8):
        return f"the decoder has {num_heads} heads, and not 1, 2, 4 or 8."
    return _why_not_tried(device, channels, dtype, num_heads)


def _why_not_tried(device: torch.device, channels: int, dtype: torch.dtype, num_heads: int) -> str | None:
    def attempt() -> bool:
        numbers, norm = normal_numbers(device), nn.LayerNorm(channels).to(device, dtype)
        # Enough tokens for a thread block to process several blocks, the last of them not full; and a multiple of 16,
        # as images have: for another number the kernels would be compiled once more.
        image_tokens, positions = numbers(64, 1008, channels).to(dtype), numbers(1008, channels).to(dtype)
        queries, keys, values = (0.1 * numbers(3, 64, 7 * num_heads, channels)).to(dtype).unbind()
        biases = numbers(64, 7 * num_heads).to(dtype)

        def run():
            attended = launch_seen(queries, image_tokens, positions)
            return attended, launch_update(image_tokens, positions, keys, biases, values, norm, num_heads)

        attended, updated = tried(run, several=True)
        image, places = image_tokens.float(), positions.float()
        sides = keys.float(), biases.float(), values.float(), copy.deepcopy(norm).float()
        pairs = [
            (attended, seen_reference(queries.float(), image, places)),
            (updated, update_reference(image, places, *sides, num_heads, add_layer_norm_reference)),
        ]
        return all(bool((result - expected).norm() < 0.01 * expected.norm()) for result, expected in pairs)

    return why_not_tried(_NAME, device, (channels, dtype, num_heads), attempt)


def fits(num_heads: int, num_tokens: int) -> bool:
    """Return whether a prompt of `num_tokens` tokens is small enough: with one or two points, a box, or both, it is."""
    return num_heads * 2 ** (num_tokens - 1).bit_length() <= _MOST_ROWS  # tokens are filled up to a power of 2


def seen(queries: torch.Tensor, image_tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Compute `launch_seen`, or `seen_reference` if Triton cannot compile the kernels for these shapes."""
    return launched(
        _NAME, image_tokens.device, ("seen", image_tokens.dtype, *queries.shape, *image_tokens.shape),
        lambda: launch_seen(queries, image_tokens, positions), lambda: seen_reference(queries, image_tokens, positions),
    )  # fmt: skip


def update(
    image_tokens: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    norm: nn.LayerNorm,
    num_heads: int,
    in_place: bool = False,
) -> torch.Tensor:
    """Compute `launch_update`, or `update_reference` if Triton cannot compile the kernel for these shapes.

    With `in_place` the kernel overwrites the image tokens, which then are (P, N, C).
    """
    arguments = image_tokens, positions, keys, biases, values, norm, num_heads
    return launched(
        _NAME, image_tokens.device, ("update", image_tokens.dtype, num_heads, *keys.shape, *image_tokens.shape),
        lambda: launch_update(*arguments, in_place), lambda: update_reference(*arguments),
    )  # fmt: skip


def seen_reference(queries: torch.Tensor, image_tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Compute softmax(queries (image_tokens + positions)^T) image_tokens step by step.

    Args:
        queries: (P, R, C).
        image_tokens: (1, N, C) or (P, N, C).
        positions: (N, C), added to the image tokens in their role as keys.

    Returns:
        (P, R, C).
    """
    return _scores(queries, image_tokens, positions).softmax(dim=-1) @ image_tokens


def update_reference(
    image_tokens: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    norm: nn.LayerNorm,
    num_heads: int,
    add_norm=add_layer_norm,
) -> torch.Tensor:
    """Compute LayerNorm(image_tokens + softmax((image_tokens + positions) keys^T + biases) values) step by step.

    The softmax is over each head's T tokens; keys, biases and values are ordered head by head.

    Args:
        image_tokens: (1, N, C) or (P, N, C).
        positions: (N, C), added to the image tokens in their role as queries.
        keys: (P, H * T, C).
        biases: (P, H * T).
        values: (P, H * T, C).
        norm: LayerNorm of C channels.
        num_heads: H.
        add_norm: `add_layer_norm` or its reference.

    Returns:
        New image tokens (P, N, C).
    """
    scores = _scores(keys, image_tokens, positions, biases[..., None])  # (P, H * T, N)
    probabilities = scores.unflatten(1, (num_heads, -1)).softmax(dim=2).flatten(1, 2)
    return add_norm(probabilities.transpose(1, 2) @ values, norm, residual=image_tokens)


def _scores(
    tokens: torch.Tensor, image_tokens: torch.Tensor, positions: torch.Tensor, biases: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply tokens (P, R, C) with image tokens and with positions, and add both and the biases: (P, R, N)."""
    scores = tokens @ positions.T
    scores = scores if biases is None else scores.add_(biases)
    return scores.baddbmm_(tokens, image_tokens.transpose(1, 2).expand(len(tokens), -1, -1))


def launch_seen(queries: torch.Tensor, image_tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Compute `seen_reference` with the kernels: first for parts of the image tokens, then the sum of the parts."""
    (num_prompts, num_rows, channels), num_tokens = queries.shape, image_tokens.shape[1]
    image_tokens = image_tokens.contiguous()
    blocks_of_part, num_parts = _parts(num_prompts, num_tokens, image_tokens.device, _SEEN)
    rows = max(16, triton.next_power_of_2(num_rows))
    sums = torch.empty(num_prompts, num_parts, num_rows, channels, dtype=torch.float32, device=image_tokens.device)
    # For each row and part the largest score, and the sum of the exponentials relative to it.
    statistics = torch.empty(2, num_prompts, num_parts, num_rows, dtype=torch.float32, device=image_tokens.device)
    seen = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if not seen.numel():
        return seen
    with torch.cuda.device_of(image_tokens):  # where Triton launches
        launch(
            _seen_kernel, (num_prompts, num_parts),  # only the first may be more than 65,535
            queries.contiguous(), image_tokens, positions, sums, *statistics,
            num_rows, num_tokens, _stride(image_tokens), blocks_of_part,
            CHANNELS=channels, ROWS=rows, BLOCK=_SEEN.block, EVEN=num_tokens % _SEEN.block == 0,
            num_warps=_SEEN.warps, num_stages=_SEEN.stages, **overlap_options(image_tokens),
        )  # fmt: skip
        launch(
            _sum_kernel, (num_prompts, triton.cdiv(num_rows, _SUM_ROWS)),
            sums, *statistics, seen, num_parts, num_rows,
            CHANNELS=channels, ROWS=_SUM_ROWS, **overlap_options(image_tokens),
        )  # fmt: skip
    return seen


def launch_update(
    image_tokens: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    norm: nn.LayerNorm,
    num_heads: int,
    in_place: bool = False,
) -> torch.Tensor:
    """Compute `update_reference` with the kernel; with `in_place` in the memory of the image tokens, (P, N, C).

    A thread block reads the image tokens that it updates, and no others.
    """
    (num_prompts, num_rows, channels), num_tokens = keys.shape, image_tokens.shape[1]
    image_tokens = image_tokens.contiguous()
    rows = num_rows // num_heads
    blocks_of_part, num_parts = _parts(num_prompts, num_tokens, image_tokens.device, _UPDATE)
    shape = num_prompts, num_tokens, channels
    assert not in_place or image_tokens.shape == shape, "image tokens that prompts share cannot be overwritten"
    updated = image_tokens if in_place else torch.empty(shape, dtype=image_tokens.dtype, device=image_tokens.device)
    if not updated.numel():
        return updated
    with torch.cuda.device_of(image_tokens):  # where Triton launches
        launch(
            _update_kernel, (num_prompts, num_parts),
            image_tokens, positions, keys.contiguous(), biases.contiguous(), values.contiguous(),
            norm.weight, norm.bias, updated,
            rows, num_tokens, _stride(image_tokens), blocks_of_part, norm.eps,
            CHANNELS=channels, HEADS=num_heads, TOKENS=max(16 // num_heads, triton.next_power_of_2(rows)),
            BLOCK=_UPDATE.block, EVEN=num_tokens % _UPDATE.block == 0, ADD=_UPDATE.add,
            num_warps=_UPDATE.warps, num_stages=_UPDATE.stages, **overlap_options(image_tokens),
        )  # fmt: skip
    return updated


def _parts(num_prompts: int, num_tokens: int, device: torch.device, shape: _Shape) -> tuple[int, int]:
    """Return how many blocks of image tokens a thread block processes, and how many thread blocks a prompt has."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return _fastest_parts(num_prompts, triton.cdiv(num_tokens, shape.block), multiprocessors, shape)


@lru_cache
def _fastest_parts(num_prompts: int, blocks: int, multiprocessors: int, shape: _Shape) -> tuple[int, int]:
    """Choose parts so that the last thread blocks end early: as many as run at a time, or a multiple of that."""
    choices = []
    for blocks_of_part in range(1, blocks + 1):
        parts = triton.cdiv(blocks, blocks_of_part)
        rounds = triton.cdiv(num_prompts * parts, multiprocessors * shape.resident)
        choices.append((rounds * (blocks_of_part + shape.start), blocks_of_part, parts))
    return min(choices, default=(0, 1, 0))[1:]


def _stride(image_tokens: torch.Tensor) -> int:
    """Return the stride from one prompt's image tokens to the next; 0 if all prompts share them."""
    return 0 if len(image_tokens) == 1 else image_tokens.stride(0)


if triton is not None:
    from .support import grid_dependency_wait

    _LOG2E = tl.constexpr(math.log2(math.e))

    @triton.jit
    def _block(pointers, real, EVEN: tl.constexpr):
        """Load a block of tokens, which are all real if EVEN."""
        if EVEN:
            return tl.load(pointers)
        return tl.load(pointers, mask=real[:, None], other=0.0)

    @triton.jit
    def _seen_kernel(
        queries, image_tokens, positions, sums, maxima, totals, num_rows, num_tokens, image_stride, blocks_of_part,
        CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Attend from all queries of one prompt to a part of the image tokens; store sums before normalization."""
        grid_dependency_wait(OVERLAP)
        prompt = tl.program_id(0).to(tl.int64)
        row = tl.arange(0, ROWS)
        channel = tl.arange(0, CHANNELS)
        wanted = row < num_rows
        rows = (prompt * num_rows + row)[:, None] * CHANNELS + channel[None, :]
        query = tl.load(queries + rows, mask=wanted[:, None], other=0.0)
        image_tokens += prompt * image_stride
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        seen = tl.zeros((ROWS, CHANNELS), tl.float32)
        first = tl.program_id(1) * blocks_of_part
        for number in range(first, tl.minimum(first + blocks_of_part, tl.cdiv(num_tokens, BLOCK))):
            token = number * BLOCK + tl.arange(0, BLOCK)
            real = token < num_tokens
            places = token[:, None] * CHANNELS + channel[None, :]
            tokens = _block(image_tokens + places, real, EVEN)
            position = _block(positions + places, real, EVEN)
            # Adding both blocks first would save a product, but Triton 3.6 miscompiles the prefetched loads then.
            scores = tl.dot(query, tl.trans(position), tl.dot(query, tl.trans(tokens)))
            if not EVEN:
                scores = tl.where(real[None, :], scores, float("-inf"))
            higher = tl.maximum(largest, tl.max(scores, axis=1))
            factor = tl.exp2((largest - higher) * _LOG2E)
            weights = tl.exp2(scores * _LOG2E - (higher * _LOG2E)[:, None])
            total = total * factor + tl.sum(weights, axis=1)
            seen = tl.dot(weights.to(tokens.dtype), tokens, seen * factor[:, None])
            largest = higher
        part = prompt * tl.num_programs(1) + tl.program_id(1)
        tl.store(maxima + part * num_rows + row, largest, mask=wanted)
        tl.store(totals + part * num_rows + row, total, mask=wanted)
        places = (part * num_rows + row)[:, None] * CHANNELS + channel[None, :]
        tl.store(sums + places, seen, mask=wanted[:, None])

    @triton.jit
    def _sum_kernel(
        sums, maxima, totals, seen, num_parts, num_rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Combine all parts of some rows of one prompt."""
        grid_dependency_wait(OVERLAP)
        prompt = tl.program_id(0).to(tl.int64)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        channel = tl.arange(0, CHANNELS)
        wanted = row < num_rows
        first = prompt * num_parts * num_rows
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        for part in range(num_parts):
            largest = tl.maximum(largest, tl.load(maxima + first + part * num_rows + row, mask=wanted, other=0.0))
        total = tl.zeros((ROWS,), tl.float32)
        result = tl.zeros((ROWS, CHANNELS), tl.float32)
        for part in range(num_parts):
            place = first + part * num_rows + row
            factor = tl.exp2((tl.load(maxima + place, mask=wanted, other=0.0) - largest) * _LOG2E)
            total += factor * tl.load(totals + place, mask=wanted, other=1.0)
            places = place[:, None] * CHANNELS + channel[None, :]
            result += tl.load(sums + places, mask=wanted[:, None], other=0.0) * factor[:, None]
        places = (prompt * num_rows + row)[:, None] * CHANNELS + channel[None, :]
        tl.store(seen + places, (result / total[:, None]).to(seen.dtype.element_ty), mask=wanted[:, None])

    @triton.jit
    def _update_kernel(
        image_tokens, positions, keys, biases, values, norm_weight, norm_bias, updated,
        num_own, num_tokens, image_stride, blocks_of_part, eps,
        CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
        EVEN: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Update a part of the image tokens for one prompt, which has `num_own` tokens in each head."""
        grid_dependency_wait(OVERLAP)
        prompt = tl.program_id(0).to(tl.int64)
        channel = tl.arange(0, CHANNELS)
        # A token's heads are neighbours: then all columns of a head are in one thread's registers.
        column = tl.arange(0, TOKENS * HEADS)
        own = column // HEADS
        row = column % HEADS * num_own + own
        first = prompt * HEADS * num_own
        keys, values, biases = keys + first * CHANNELS, values + first * CHANNELS, biases + first
        wanted = own < num_own
        rows = row[:, None] * CHANNELS + channel[None, :]
        key = tl.load(keys + rows, mask=wanted[:, None], other=0.0)
        value = tl.load(values + rows, mask=wanted[:, None], other=0.0)
        bias = tl.load(biases + row, mask=wanted, other=0.0).to(tl.float32)
        bias = tl.where(wanted, bias, float("-inf"))[None, :] * _LOG2E
        image_tokens += prompt * image_stride
        updated += prompt * num_tokens * CHANNELS
        first = tl.program_id(1) * blocks_of_part
        for number in range(first, tl.minimum(first + blocks_of_part, tl.cdiv(num_tokens, BLOCK))):
            token = number * BLOCK + tl.arange(0, BLOCK)
            real = token < num_tokens
            places = token[:, None] * CHANNELS + channel[None, :]
            tokens = _block(image_tokens + places, real, EVEN)
            position = _block(positions + places, real, EVEN)
            if ADD:
                scores = tl.dot(tokens + position, tl.trans(key))
            else:
                scores = tl.dot(position, tl.trans(key), tl.dot(tokens, tl.trans(key)))
            scores = tl.reshape(scores * _LOG2E + bias, (BLOCK, TOKENS, HEADS))
            weights = tl.exp2(scores - tl.max(scores, axis=1, keep_dims=True))
            weights = weights * (1.0 / tl.sum(weights, axis=1, keep_dims=True))
            weights = tl.reshape(weights, (BLOCK, TOKENS * HEADS)).to(tokens.dtype)
            result = tl.dot(weights, value, tokens.to(tl.float32))
            centred = result - (tl.sum(result, axis=1) * (1.0 / CHANNELS))[:, None]
            variance = tl.sum(centred * centred, axis=1) * (1.0 / CHANNELS)
            scale = tl.load(norm_weight + channel).to(tl.float32)[None, :]  # kept in registers, they would be too many
            shift = tl.load(norm_bias + channel).to(tl.float32)[None, :]
            result = (centred * tl.rsqrt(variance + eps)[:, None] * scale + shift).to(updated.dtype.element_ty)
            if EVEN:
                tl.store(updated + places, result)
            else:
                tl.store(updated + places, result, mask=real[:, None])
