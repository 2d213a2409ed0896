"""The mask decoder's attention between a prompt's tokens and the image tokens, in Triton kernels.

A prompt has few tokens and N = 4096 image tokens. Step by step, scores and attended values are written and read several
times for each prompt. The kernels read image tokens once, write new ones once, and keep the scores in registers. Sums
are float32. In both directions the projections of the image tokens are already applied to the prompt's tokens, which
therefore have the C channels of the image tokens; `engine/mask_decoder.py` explains this.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import nn

from .layer_norm import add_layer_norm, add_layer_norm_reference
from .support import (
    launch,
    launched,
    normal_numbers,
    num_processors,
    nvidia_generation,
    on_device_of,
    overlap_options,
    tl,
    tried,
    triton,
    why_not_decoder,
    why_not_tried,
)


_NAME = "the attention of the mask decoder"
_MOST_ROWS = 64  # of a prompt: its tokens times heads


class _Shape(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: Image tokens that are processed at a time.
        warps: Of a thread block.
        stages: Of the loop over blocks, in Triton's sense.
        resident: Thread blocks for each multiprocessor, which together process all image tokens.
    """

    block: int
    warps: int
    stages: int
    resident: int


# On Hopper: 229 KB of shared memory, and all registers.
_SEEN = _Shape(block=64, warps=4, stages=3, resident=1)
_UPDATE = _Shape(block=64, warps=4, stages=1, resident=2)
# On other GPUs: less than 99 KB, the least that one with these dtypes has.
_SMALL_SEEN = _Shape(block=32, warps=4, stages=2, resident=1)
_SMALL_UPDATE = _Shape(block=32, warps=4, stages=1, resident=1)
_SUM = 32  # parts times rows that a thread block combines at a time


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
        # Enough tokens for a thread block to process several blocks; full blocks have variants of their own. Both are
        # multiples of 16, as images have: for other numbers the kernels would be compiled once more.
        images = [(numbers(64, count, channels).to(dtype), numbers(count, channels).to(dtype)) for count in (960, 1008)]
        queries, keys, values = (0.1 * numbers(3, 64, 7 * num_heads, channels)).to(dtype).unbind()
        biases = numbers(64, 7 * num_heads).to(dtype)

        def run():
            attended = [launch_seen(queries, *image) for image in images]
            return attended + [launch_update(*image, keys, biases, values, norm, num_heads) for image in images]

        results = tried(run, several=True)
        images = [(image_tokens.float(), positions.float()) for image_tokens, positions in images]
        sides = keys.float(), biases.float(), values.float(), copy.deepcopy(norm).float()
        expected = [seen_reference(queries.float(), *image) for image in images]
        expected += [update_reference(a, b, *sides, num_heads, add_layer_norm_reference) for a, b in images]
        return all(bool((a - b).norm() < 0.01 * b.norm()) for a, b in zip(results, expected))

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
    seen = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if not seen.numel():
        return seen
    shape = _SEEN if _is_hopper(image_tokens.device) else _SMALL_SEEN
    blocks = triton.cdiv(num_tokens, shape.block)
    whole, blocks_of_part = _whole_prompts(num_prompts, blocks, _resident(image_tokens.device, shape))
    num_parts = triton.cdiv(blocks, blocks_of_part)
    parts = whole + (num_prompts - whole) * num_parts
    sums = torch.empty(parts, num_rows, channels, dtype=torch.float32, device=image_tokens.device)
    # For each row and part the largest score, and the sum of the exponentials relative to it.
    statistics = torch.empty(2, parts, num_rows, dtype=torch.float32, device=image_tokens.device)
    parts_at_once = triton.next_power_of_2(num_parts)
    rows = max(1, _SUM // parts_at_once)
    with on_device_of(image_tokens):
        launch(
            _seen_kernel, (parts,),
            queries.contiguous(), image_tokens, positions, sums, *statistics,
            num_rows, num_tokens, _stride(image_tokens), whole, num_parts, blocks_of_part,
            CHANNELS=channels, ROWS=max(16, triton.next_power_of_2(num_rows)), BLOCK=shape.block,
            EVEN=num_tokens % shape.block == 0, num_warps=shape.warps, num_stages=shape.stages,
            **overlap_options(image_tokens),
        )  # fmt: skip
        launch(
            _sum_kernel, (num_prompts, triton.cdiv(num_rows, rows)),  # only the first may be more than 65,535
            sums, *statistics, seen, num_rows, whole, num_parts,
            CHANNELS=channels, PARTS=parts_at_once, ROWS=rows, **overlap_options(image_tokens),
        )  # fmt: skip
    return seen


def _whole_prompts(num_prompts: int, blocks: int, resident: int) -> tuple[int, int]:
    """Return how many prompts have one thread block each, and how many blocks those of the other prompts process.

    A thread block for a whole prompt costs least. The last prompts, too few for all multiprocessors, are divided.
    """
    rest = num_prompts % resident
    if not rest:
        return num_prompts, blocks
    return num_prompts - rest, triton.cdiv(blocks, min(blocks, resident // rest))


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
    rows, shape = num_rows // num_heads, _UPDATE if _is_hopper(image_tokens.device) else _SMALL_UPDATE
    size = num_prompts, num_tokens, channels
    assert not in_place or image_tokens.shape == size, "image tokens that prompts share cannot be overwritten"
    updated = image_tokens if in_place else torch.empty(size, dtype=image_tokens.dtype, device=image_tokens.device)
    if not updated.numel():
        return updated
    blocks = num_prompts * triton.cdiv(num_tokens, shape.block)
    with on_device_of(image_tokens):
        launch(
            _update_kernel, (min(blocks, _resident(image_tokens.device, shape)),),
            image_tokens, positions, keys.contiguous(), biases.contiguous(), values.contiguous(),
            norm.weight, norm.bias, updated, num_prompts, rows, num_tokens, _stride(image_tokens), norm.eps,
            CHANNELS=channels, HEADS=num_heads, TOKENS=max(16 // num_heads, triton.next_power_of_2(rows)),
            BLOCK=shape.block, EVEN=num_tokens % shape.block == 0, SHARED=_stride(image_tokens) == 0,
            num_warps=shape.warps, num_stages=shape.stages, **overlap_options(image_tokens),
        )  # fmt: skip
    return updated


def _is_hopper(device: torch.device) -> bool:
    """Return whether a device is a Hopper GPU; a CPU, on which Triton's interpreter runs, counts as one."""
    return device.type != "cuda" or nvidia_generation(device) == 9


def _resident(device: torch.device, shape: _Shape) -> int:
    """Return how many thread blocks run at a time."""
    return shape.resident * num_processors(device) if device.type == "cuda" else 3


def _stride(image_tokens: torch.Tensor) -> int:
    """Return the stride from one prompt's image tokens to the next; 0 if all prompts share them."""
    return 0 if len(image_tokens) == 1 else image_tokens.stride(0)


if triton is not None:
    from .support import grid_dependency_wait

    _LOG2E = tl.constexpr(math.log2(math.e))

    @triton.jit(do_not_specialize=["whole", "num_parts", "blocks_of_part"])
    def _seen_kernel(
        queries, image_tokens, positions, sums, maxima, totals,
        num_rows, num_tokens, image_stride, whole, num_parts, blocks_of_part,
        CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Attend from all queries of one prompt to a part of the image tokens; store sums before normalization.

        The first thread blocks take all image tokens of the first `whole` prompts.
        """
        grid_dependency_wait(OVERLAP)
        row = tl.arange(0, ROWS)
        channel = tl.arange(0, CHANNELS)
        wanted = row < num_rows
        rows = row[:, None] * CHANNELS + channel[None, :]
        part = tl.program_id(0)
        blocks = tl.cdiv(num_tokens, BLOCK)
        divided = tl.maximum(part - whole, 0)
        prompt = (tl.minimum(part, whole) + divided // num_parts).to(tl.int64)
        first = divided % num_parts * blocks_of_part
        last = tl.where(part < whole, blocks, tl.minimum(first + blocks_of_part, blocks))
        query = tl.load(queries + prompt * num_rows * CHANNELS + rows, mask=wanted[:, None], other=0.0)
        image_tokens += prompt * image_stride
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        seen = tl.zeros((ROWS, CHANNELS), tl.float32)
        for block in range(first, last):
            token = block * BLOCK + tl.arange(0, BLOCK)
            places = token[:, None] * CHANNELS + channel[None, :]
            if EVEN:
                tokens, position = tl.load(image_tokens + places), tl.load(positions + places)
            else:
                real = token < num_tokens
                tokens = tl.load(image_tokens + places, mask=real[:, None], other=0.0)
                position = tl.load(positions + places, mask=real[:, None], other=0.0)
            # Adding both blocks first would save a product, but Triton 3.6 overwrites blocks that are in use then.
            scores = tl.dot(query, tl.trans(position), tl.dot(query, tl.trans(tokens)))
            if not EVEN:
                scores = tl.where(real[None, :], scores, float("-inf"))
            higher = tl.maximum(largest, tl.max(scores, axis=1))
            factor = tl.exp2((largest - higher) * _LOG2E)
            weights = tl.exp2(scores * _LOG2E - (higher * _LOG2E)[:, None])
            total = total * factor + tl.sum(weights, axis=1)
            seen = tl.dot(weights.to(tokens.dtype), tokens, seen * factor[:, None])
            largest = higher
        line = part.to(tl.int64) * num_rows
        tl.store(maxima + line + row, largest, mask=wanted)
        tl.store(totals + line + row, total, mask=wanted)
        tl.store(sums + line * CHANNELS + rows, seen, mask=wanted[:, None])

    @triton.jit(do_not_specialize=["whole", "num_parts"])
    def _sum_kernel(
        sums, maxima, totals, seen, num_rows, whole, num_parts,
        CHANNELS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Combine all parts of some rows of one prompt."""
        grid_dependency_wait(OVERLAP)
        prompt = tl.program_id(0).to(tl.int64)
        first = tl.minimum(prompt, whole) + tl.maximum(prompt - whole, 0) * num_parts
        number, channel = tl.arange(0, PARTS), tl.arange(0, CHANNELS)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        wanted = row < num_rows
        place = (first + number)[:, None] * num_rows + tl.minimum(row, num_rows - 1)[None, :]
        real = (number < tl.where(prompt < whole, 1, num_parts))[:, None]
        largest = tl.load(maxima + place, mask=real, other=float("-inf"))
        factor = tl.exp2((largest - tl.max(largest, axis=0)[None, :]) * _LOG2E)
        total = tl.sum(factor * tl.load(totals + place, mask=real, other=0.0), axis=0)
        places = place[:, :, None] * CHANNELS + channel[None, None, :]
        parts = tl.load(sums + places, mask=real[:, :, None], other=0.0)
        result = tl.sum(parts * factor[:, :, None], axis=0) / total[:, None]
        places = (prompt * num_rows + row)[:, None] * CHANNELS + channel[None, :]
        tl.store(seen + places, result.to(seen.dtype.element_ty), mask=wanted[:, None])

    # Tensor cores take rows and give results so that a thread has pairs of channels, 8 apart, of each row. In the order
    # of channels that the next functions make, these are 8 neighbours in memory: image tokens are read into the
    # registers in which they are needed, and written from those where they are, without shared memory in between.

    @triton.jit
    def _reordered(sides, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
        """Bring the channels of (ROWS, CHANNELS) into this order."""
        sides = tl.reshape(sides, (ROWS, CHANNELS // 32, 4, 4, 2))
        return tl.reshape(tl.permute(sides, (0, 1, 3, 2, 4)), (ROWS, CHANNELS))

    @triton.jit
    def _as_rows(pieces, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
        """Bring pieces (CHANNELS / 32 * BLOCK, 32) of tokens into the order of a product's rows, (BLOCK, CHANNELS)."""
        pieces = tl.reshape(pieces, (CHANNELS // 32, 2, BLOCK // 16, 8, 4, 4, 2))
        return tl.reshape(tl.permute(pieces, (2, 1, 3, 0, 5, 4, 6)), (BLOCK, CHANNELS))

    @triton.jit
    def _from_rows(rows, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
        """Undo `_as_rows`."""
        rows = tl.reshape(rows, (BLOCK // 16, 2, 8, CHANNELS // 32, 4, 4, 2))
        return tl.reshape(tl.permute(rows, (3, 1, 0, 2, 5, 4, 6)), (CHANNELS // 32 * BLOCK, 32))

    @triton.jit(do_not_specialize=["num_prompts"])
    def _update_kernel(
        image_tokens, positions, keys, biases, values, norm_weight, norm_bias, updated,
        num_prompts, num_own, num_tokens, image_stride, eps,
        CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
        EVEN: tl.constexpr, SHARED: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Update parts of the image tokens of some prompts, which have `num_own` tokens in each head.

        Thread blocks share all prompts' blocks evenly. The share of one may hold parts of several prompts.
        """
        grid_dependency_wait(OVERLAP)
        COLUMNS: tl.constexpr = HEADS * TOKENS
        # The cache is for what all prompts share.
        POLICY: tl.constexpr = "" if SHARED else "evict_first"
        # A token's heads are neighbours: then a thread has all columns of a head in its registers.
        column = tl.arange(0, COLUMNS)
        own = column // HEADS
        row = column % HEADS * num_own + own
        wanted = own < num_own
        rows = row[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        # Pieces of 32 channels: the first of all tokens of a block, then the second.
        piece = tl.arange(0, CHANNELS // 32 * BLOCK)
        channels = (piece // BLOCK * 32)[:, None] + tl.arange(0, 32)[None, :]
        places = (piece % BLOCK)[:, None] * CHANNELS + channels
        blocks = tl.cdiv(num_tokens, BLOCK)
        program, programs, work = tl.program_id(0).to(tl.int64), tl.num_programs(0), num_prompts * blocks
        first, end = program * work // programs, (program + 1) * work // programs
        for prompt in range(first // blocks, tl.cdiv(end, blocks)):
            start = tl.maximum(first - prompt * blocks, 0).to(tl.int32)
            stop = tl.minimum(end - prompt * blocks, blocks).to(tl.int32)
            line = prompt * HEADS * num_own
            key = tl.load(keys + line * CHANNELS + rows, mask=wanted[:, None], other=0.0)
            value = tl.load(values + line * CHANNELS + rows, mask=wanted[:, None], other=0.0)
            key, value = _reordered(key, CHANNELS, COLUMNS), _reordered(value, CHANNELS, COLUMNS)
            bias = tl.load(biases + line + row, mask=wanted, other=0.0).to(tl.float32)
            bias = tl.where(wanted, bias, float("-inf"))[None, :] * _LOG2E
            own_tokens = image_tokens + prompt * image_stride
            own_updated = updated + prompt * num_tokens * CHANNELS
            for block in range(start, stop):
                before = block * BLOCK * CHANNELS
                if EVEN:
                    position = tl.load(positions + before + places)
                    tokens = tl.load(own_tokens + before + places, eviction_policy=POLICY)
                else:
                    real = (block * BLOCK + piece % BLOCK < num_tokens)[:, None]
                    position = tl.load(positions + before + places, mask=real, other=0.0)
                    tokens = tl.load(own_tokens + before + places, mask=real, other=0.0, eviction_policy=POLICY)
                if SHARED:
                    scores = tl.dot(_as_rows(tokens + position, CHANNELS, BLOCK), tl.trans(key))
                else:  # positions, from the cache, are there before the tokens
                    scores = tl.dot(_as_rows(position, CHANNELS, BLOCK), tl.trans(key))
                    scores = tl.dot(_as_rows(tokens, CHANNELS, BLOCK), tl.trans(key), scores)
                scores = scores * _LOG2E + bias
                scores = tl.reshape(scores, (BLOCK, TOKENS, HEADS))
                weights = tl.exp2(scores - tl.max(scores, axis=1, keep_dims=True))
                weights = weights * (1.0 / tl.sum(weights, axis=1, keep_dims=True))
                weights = tl.reshape(weights, (BLOCK, COLUMNS)).to(tokens.dtype)
                result = tl.dot(weights, value, _as_rows(tokens, CHANNELS, BLOCK).to(tl.float32))
                centred = result - (tl.sum(result, axis=1) * (1.0 / CHANNELS))[:, None]
                variance = tl.sum(centred * centred, axis=1) * (1.0 / CHANNELS)
                result = _from_rows(centred * tl.rsqrt(variance + eps)[:, None], CHANNELS, BLOCK)
                # Read again for each block: in registers they would take the place of results.
                scale = tl.load(norm_weight + channels).to(tl.float32)
                shift = tl.load(norm_bias + channels).to(tl.float32)
                result = (result * scale + shift).to(updated.dtype.element_ty)
                if EVEN:
                    tl.store(own_updated + before + places, result, eviction_policy=POLICY)
                else:
                    tl.store(own_updated + before + places, result, mask=real, eviction_policy=POLICY)
