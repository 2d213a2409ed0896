"""The mask decoder's attention between a prompt's tokens and the image tokens, in Triton kernels.

A prompt has few tokens and N = 4096 image tokens. Step by step, scores and what was attended are written and read several
times for each prompt; the kernels read image tokens once, write new ones once, and keep the scores in registers. Their
sums are float32. Both directions take the tokens' side of the projections as C channels of the image, as `mask_decoder` tells.
"""

import torch
from torch import nn

from .layer_norm import add_layer_norm, add_layer_norm_reference
from .support import launched, normal_numbers, overlap_options, tl, triton, why_not_decoder, why_not_tried


_NAME = "the attention of the mask decoder"
_BLOCK = 32  # image tokens
_PROGRAMS = 528  # that a device is given: two at a time on each multiprocessor of an H100, twice
_MOST_PARTS = 128  # of an image
_MOST_BLOCKS = 4  # of image tokens that a program updates, one after the other
_MOST_ROWS = 64  # of a prompt: its tokens times heads


def why_not_triton(device: torch.device, dtype: torch.dtype, channels: int, num_heads: int) -> str | None:
    """Why the kernels cannot run with these: a sentence, or None where they can."""
    if reason := why_not_decoder(device, dtype, channels):
        return reason
    if num_heads not in (1, 2, 4, 8):
        return f"the decoder has {num_heads} heads, and not 1, 2, 4 or 8."
    return _why_not_tried(device, channels, dtype, num_heads)


def _why_not_tried(device: torch.device, channels: int, dtype: torch.dtype, num_heads: int) -> str | None:
    def attempt() -> bool:
        numbers, norm = normal_numbers(device), nn.LayerNorm(channels).to(device, dtype)
        # So many that a program goes through several blocks, the last of them not full.
        image, positions = numbers(64, 1000, channels).to(dtype), numbers(1000, channels).to(dtype)
        queries, keys, values = (0.1 * numbers(3, 64, 7 * num_heads, channels)).to(dtype).unbind()
        biases = numbers(64, 7 * num_heads).to(dtype)
        pairs = [
            (launch_seen(queries, image, positions), seen_reference(*_floats(queries, image, positions))),
            (
                launch_update(image, positions, keys, biases, values, norm, num_heads),
                update_reference(
                    *_floats(image, positions, keys, biases, values),
                    norm.float(),
                    num_heads,
                    add_layer_norm_reference,
                ),
            ),
        ]
        return all(bool((found - expected).norm() < 0.01 * expected.norm()) for found, expected in pairs)

    return why_not_tried(_NAME, device, (channels, dtype, num_heads), attempt)


def _floats(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.float() for tensor in tensors]


def fits(num_heads: int, num_tokens: int) -> bool:
    """Whether prompts of so many tokens are few enough for the kernels. One with a point, or two, or a box, or both is."""
    return num_heads * triton.next_power_of_2(num_tokens) <= _MOST_ROWS


def seen(queries: torch.Tensor, image: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`launch_seen`, or `seen_reference` where Triton cannot compile the kernels for such shapes."""
    return launched(
        _NAME, image.device, ("seen", image.dtype, *queries.shape, *image.shape),
        lambda: launch_seen(queries, image, positions), lambda: seen_reference(queries, image, positions),
    )  # fmt: skip


def update(
    image: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    norm: nn.LayerNorm,
    num_heads: int,
) -> torch.Tensor:
    """`launch_update`, or `update_reference` where Triton cannot compile the kernel for such shapes."""
    given = image, positions, keys, biases, values, norm, num_heads
    return launched(
        _NAME, image.device, ("update", image.dtype, num_heads, *keys.shape, *image.shape),
        lambda: launch_update(*given), lambda: update_reference(*given),
    )  # fmt: skip


def seen_reference(queries: torch.Tensor, image: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What queries (P, R, C) see of image tokens (1, N, C) or (P, N, C), which are keys with `positions` (N, C): (P, R, C).

    softmax(queries (image + positions)^T) image, step by step.
    """
    return _scores(queries, image, positions).softmax(dim=-1) @ image


def update_reference(
    image: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    norm: nn.LayerNorm,
    num_heads: int,
    add_norm=add_layer_norm,
) -> torch.Tensor:
    """Image tokens (P, N, C) that have seen the tokens, of image tokens (1, N, C) or (P, N, C), step by step.

    `keys`, `biases` and `values` (P, H * T, C), (P, H * T) and (P, H * T, C) are of H heads' T tokens, head by head:
    LayerNorm(image + softmax((image + positions) keys^T + biases) values), with a softmax over each head's tokens.
    """
    scores = _scores(keys, image, positions, biases[..., None])  # (P, H * T, N)
    probabilities = scores.unflatten(1, (num_heads, -1)).softmax(dim=2).flatten(1, 2)
    return add_norm(probabilities.transpose(1, 2) @ values, norm, residual=image)


def _scores(
    tokens: torch.Tensor, image: torch.Tensor, positions: torch.Tensor, biases: torch.Tensor | None = None
) -> torch.Tensor:
    """tokens (P, R, C) times image tokens with positions, without adding the positions to each: (P, R, N)."""
    scores = tokens @ positions.T
    scores = scores if biases is None else scores.add_(biases)
    return scores.baddbmm_(tokens, image.transpose(1, 2).expand(len(tokens), -1, -1))


def launch_seen(queries: torch.Tensor, image: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`seen_reference` by the kernels: parts of the image by themselves, and their sum."""
    (num_prompts, num_rows, channels), num_tokens, image = queries.shape, image.shape[1], image.contiguous()
    blocks = triton.cdiv(num_tokens, _BLOCK)
    blocks_of_part = max(1, num_prompts * blocks // _PROGRAMS, triton.cdiv(blocks, _MOST_PARTS))
    num_parts = triton.cdiv(blocks, blocks_of_part)
    rows = max(16, triton.next_power_of_2(num_rows))
    sums = torch.empty(num_prompts, num_parts, num_rows, channels, dtype=torch.float32, device=image.device)
    # The largest score of each row and part, and the sum of what is relative to it.
    statistics = torch.empty(2, num_prompts, num_parts, num_rows, dtype=torch.float32, device=image.device)
    seen = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if not seen.numel():
        return seen
    with torch.cuda.device_of(image):  # where Triton launches
        _seen_kernel[(num_prompts, num_parts)](  # only the first may be more than 65,535
            queries.contiguous(), image, positions, sums, *statistics, num_rows, num_tokens, _stride(image), blocks_of_part,
            CHANNELS=channels, ROWS=rows, BLOCK=_BLOCK, num_warps=4, num_stages=2, **overlap_options(image),
        )  # fmt: skip
        _sum_kernel[(num_prompts, num_rows)](
            sums, *statistics, seen, num_parts,
            CHANNELS=channels, PARTS=triton.next_power_of_2(num_parts), **overlap_options(image),
        )  # fmt: skip
    return seen


def launch_update(
    image: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    norm: nn.LayerNorm,
    num_heads: int,
) -> torch.Tensor:
    """`update_reference` by the kernel."""
    (num_prompts, num_rows, channels), num_tokens, image = keys.shape, image.shape[1], image.contiguous()
    rows, blocks = num_rows // num_heads, triton.cdiv(num_tokens, _BLOCK)
    blocks_of_part = max(1, min(_MOST_BLOCKS, num_prompts * blocks // _PROGRAMS))
    updated = torch.empty(num_prompts, num_tokens, channels, dtype=image.dtype, device=image.device)
    if not updated.numel():
        return updated
    with torch.cuda.device_of(image):  # where Triton launches
        _update_kernel[(num_prompts, triton.cdiv(blocks, blocks_of_part))](
            image, positions, keys.contiguous(), biases.contiguous(), values.contiguous(), norm.weight, norm.bias, updated,
            rows, num_tokens, _stride(image), blocks_of_part, norm.eps,
            CHANNELS=channels, HEADS=num_heads, TOKENS=max(16 // num_heads, triton.next_power_of_2(rows)), BLOCK=_BLOCK,
            num_warps=4, num_stages=2, **overlap_options(image),
        )  # fmt: skip
    return updated


def _stride(image: torch.Tensor) -> int:
    """From one prompt's contiguous image tokens to the next one's."""
    return 0 if len(image) == 1 else image.stride(0)


if triton is not None:
    from .support import grid_dependency_wait

    @triton.jit
    def _seen_kernel(
        queries, image, positions, sums, maxima, totals, num_rows, num_tokens, image_stride, blocks_of_part,
        CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """What all queries of one prompt see of a part of the image."""
        grid_dependency_wait(OVERLAP)
        prompt = tl.program_id(0).to(tl.int64)
        row = tl.arange(0, ROWS)
        channel = tl.arange(0, CHANNELS)
        wanted = row < num_rows
        rows = (prompt * num_rows + row)[:, None] * CHANNELS + channel[None, :]
        query = tl.load(queries + rows, mask=wanted[:, None], other=0.0)
        image += prompt * image_stride
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        seen = tl.zeros((ROWS, CHANNELS), tl.float32)
        for number in range(blocks_of_part):
            token = (tl.program_id(1) * blocks_of_part + number) * BLOCK + tl.arange(0, BLOCK)
            real = token < num_tokens
            places = token[:, None] * CHANNELS + channel[None, :]
            tokens = tl.load(image + places, mask=real[:, None], other=0.0)
            position = tl.load(positions + places, mask=real[:, None], other=0.0)
            # The sum of both blocks would be one product less, but Triton 3.6 makes mistakes when it loads them ahead.
            scores = tl.dot(query, tl.trans(position), tl.dot(query, tl.trans(tokens)))
            scores = tl.where(real[None, :], scores, float("-inf"))
            higher = tl.maximum(largest, tl.max(scores, axis=1))
            # A part may end in a block without a token, but begins with one that has some: no maximum is infinite.
            factor = tl.exp(largest - higher)
            weights = tl.exp(scores - higher[:, None])
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
        sums, maxima, totals, seen, num_parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr
    ):
        """One row of one prompt, of all parts."""
        grid_dependency_wait(OVERLAP)
        prompt, row, num_rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        part = tl.arange(0, PARTS)
        channel = tl.arange(0, CHANNELS)
        real = part < num_parts
        place = (prompt * num_parts + part) * num_rows + row
        largest = tl.load(maxima + place, mask=real, other=float("-inf"))
        factor = tl.exp(largest - tl.max(largest, axis=0))
        total = tl.sum(factor * tl.load(totals + place, mask=real, other=0.0), axis=0)
        places = place[:, None] * CHANNELS + channel[None, :]
        parts = tl.load(sums + places, mask=real[:, None], other=0.0)
        result = tl.sum(parts * factor[:, None], axis=0) / total
        tl.store(seen + (prompt.to(tl.int64) * num_rows + row) * CHANNELS + channel, result.to(seen.dtype.element_ty))

    @triton.jit
    def _update_kernel(
        image, positions, keys, biases, values, norm_weight, norm_bias, updated,
        num_own, num_tokens, image_stride, blocks_of_part, eps,
        CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """A part of the image tokens and all tokens of one prompt, `num_own` of them in each head."""
        grid_dependency_wait(OVERLAP)
        prompt, part_of_prompt = tl.program_id(0).to(tl.int64), tl.program_id(1)
        channel = tl.arange(0, CHANNELS)
        column = tl.arange(0, HEADS * TOKENS)
        own = column % TOKENS
        row = column // TOKENS * num_own + own
        first = prompt * HEADS * num_own
        keys, values, biases = keys + first * CHANNELS, values + first * CHANNELS, biases + first
        wanted = own < num_own
        key = tl.load(keys + row[None, :] * CHANNELS + channel[:, None], mask=wanted[None, :], other=0.0)
        value = tl.load(values + row[:, None] * CHANNELS + channel[None, :], mask=wanted[:, None], other=0.0)
        bias = tl.load(biases + row, mask=wanted, other=0.0).to(tl.float32)
        bias = tl.where(wanted, bias, float("-inf"))[None, :]
        scale = tl.load(norm_weight + channel).to(tl.float32)[None, :]
        shift = tl.load(norm_bias + channel).to(tl.float32)[None, :]
        image += prompt * image_stride
        updated += prompt * num_tokens * CHANNELS
        for number in range(blocks_of_part):
            token = (part_of_prompt * blocks_of_part + number) * BLOCK + tl.arange(0, BLOCK)
            real = token < num_tokens
            places = token[:, None] * CHANNELS + channel[None, :]
            tokens = tl.load(image + places, mask=real[:, None], other=0.0)
            position = tl.load(positions + places, mask=real[:, None], other=0.0)
            scores = tl.dot(position, key, tl.dot(tokens, key)) + bias
            scores = tl.reshape(scores, (BLOCK, HEADS, TOKENS))
            weights = tl.exp(scores - tl.max(scores, axis=2, keep_dims=True))
            weights = weights / tl.sum(weights, axis=2, keep_dims=True)
            weights = tl.reshape(weights, (BLOCK, HEADS * TOKENS)).to(tokens.dtype)
            result = tl.dot(weights, value) + tokens.to(tl.float32)
            centred = result - (tl.sum(result, axis=1) / CHANNELS)[:, None]
            variance = tl.sum(centred * centred, axis=1) / CHANNELS
            result = centred / tl.sqrt(variance + eps)[:, None] * scale + shift
            tl.store(updated + places, result.to(updated.dtype.element_ty), mask=real[:, None])
