"""Attention of many prompts' tokens to the image tokens that all of them share, in a Triton kernel.

In the mask decoder's first layer all prompts of an image see the same image tokens. Their keys and values are projected
once, and the tokens of all prompts are rows of one attention. The kernel also projects the queries, after a LayerNorm
where there is one. Sums are float32.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from .support import (
    launch,
    launched,
    normal_numbers,
    num_processors,
    on_device_of,
    overlap_options,
    tl,
    tried,
    triton,
    why_not_decoder,
    why_not_tried,
)


_NAME = "the attention to shared image tokens"
_ROWS = 64  # tokens of prompts that a thread block takes
_BLOCK = 128  # image tokens that it processes at a time
_WARPS = 4
_STAGES = 3
_RESIDENT = 2  # thread blocks for each multiprocessor, if there is work for as many
_MOST_PARTS = 16  # of the image tokens
_SUM_ROWS = 4  # that a thread block combines
_TILE = 64  # image tokens of which a thread block computes 32 features


def fits(num_heads: int, features: int) -> bool:
    """Return whether heads that have `features` features together are of a size that the kernel has."""
    return features in (16 * num_heads, 32 * num_heads, 64 * num_heads)


def why_not_triton(
    device: torch.device, dtype: torch.dtype, channels: int, num_heads: int, features: int
) -> str | None:
    """Return why the kernel cannot run, as a sentence, or None if it can, or if it is not needed: see `fits`.

    Args:
        device: of the weights.
        dtype: of the weights.
        channels: of the tokens.
        num_heads: of the attention.
        features: of all heads' keys together.
    """
    if not fits(num_heads, features):
        return None
    return why_not_decoder(device, dtype, channels) or _why_not_tried(device, channels, dtype, num_heads, features)


def _why_not_tried(
    device: torch.device, channels: int, dtype: torch.dtype, num_heads: int, features: int
) -> str | None:
    def attempt() -> bool:
        numbers = normal_numbers(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            query, norm = nn.Linear(channels, features, dtype=dtype), nn.LayerNorm(channels, dtype=dtype)
        # More rows than a thread block has; the last block of keys is not full.
        tokens, embedded = numbers(2, 11, 7, channels)
        keys, values = numbers(2, 1000, features).to(dtype)
        kinds = [(tokens.to(dtype), query), (tokens, query, norm, embedded)]

        def run():
            return [launch_attend(*kind[:2], keys, values, num_heads, *kind[2:]) for kind in kinds]

        results = tried(run, several=True)
        sides = copy.deepcopy(query).float(), keys.float(), values.float(), num_heads
        expected = [
            attend_reference(tokens, *sides),
            attend_reference(tokens, *sides, copy.deepcopy(norm).float(), embedded),
        ]
        return all(bool((a - b).norm() < 0.01 * b.norm()) for a, b in zip(results, expected))

    return why_not_tried(_NAME, device, (channels, dtype, num_heads, features), attempt)


def attend(
    tokens: torch.Tensor,
    query: nn.Linear,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
    norm: nn.LayerNorm | None = None,
    embedded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `launch_attend`, or `attend_reference` if Triton cannot compile the kernel for these shapes."""
    arguments = tokens, query, keys, values, num_heads, norm, embedded
    return launched(
        _NAME, tokens.device, (tokens.dtype, keys.dtype, num_heads, *tokens.shape, *keys.shape, norm is None),
        lambda: launch_attend(*arguments), lambda: attend_reference(*arguments),
    )  # fmt: skip


def attend_reference(
    tokens: torch.Tensor,
    query: nn.Linear,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
    norm: nn.LayerNorm | None = None,
    embedded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the heads' outputs of the attention with the queries query(LayerNorm(tokens) + embedded) step by step.

    Args:
        tokens: (P, T, C).
        query: linear layer from C channels to the features of all heads.
        keys: (N, H * D), head by head; a view of wider rows, too.
        values: (N, H * D), with the strides of the keys.
        num_heads: H.
        norm: LayerNorm of C channels. Default: none.
        embedded: (P, T, C), if there is a norm.

    Returns:
        (P, T, H * D), in the keys' dtype.
    """
    if norm is not None and embedded is not None:
        scale, shift = norm.weight.float(), norm.bias.float()
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:], scale, shift, norm.eps) + embedded
    queries = query(tokens.to(keys.dtype)).flatten(0, 1)
    heads = (part.unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in (queries, keys, values))
    attended = F.scaled_dot_product_attention(*(head[None] for head in heads))[0]  # (H, P * T, D)
    return attended.transpose(0, 1).reshape(*tokens.shape[:2], -1)


def launch_attend(
    tokens: torch.Tensor,
    query: nn.Linear,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
    norm: nn.LayerNorm | None = None,
    embedded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `attend_reference` with the kernel."""
    (num_keys, features), channels = keys.shape, tokens.shape[-1]
    attended = torch.empty(*tokens.shape[:2], features, dtype=keys.dtype, device=keys.device)
    if not attended.numel():
        return attended
    num_rows, head = tokens.shape[0] * tokens.shape[1], features // num_heads
    assert keys.stride() == values.stride() and keys.stride(1) == 1
    sides: tuple = None, None, 0.0, None
    if norm is not None and embedded is not None:
        sides = norm.weight, norm.bias, norm.eps, embedded.contiguous()
    row_blocks, blocks = triton.cdiv(num_rows, _ROWS), triton.cdiv(num_keys, _BLOCK)
    multiprocessors = num_processors(keys.device) if keys.is_cuda else 2
    parts = max(1, min(multiprocessors * _RESIDENT // (row_blocks * num_heads), blocks, _MOST_PARTS))
    parts = 1 << parts.bit_length() - 1  # few variants to compile; some of the last parts may be empty
    sums = torch.empty(parts, num_rows, features, dtype=torch.float32, device=keys.device)
    # For each part, row and head the largest score, and the sum of the exponentials relative to it.
    statistics = torch.empty(2, parts, num_rows, num_heads, dtype=torch.float32, device=keys.device)
    with on_device_of(keys):
        launch(
            _attend_kernel, (row_blocks, num_heads, parts),
            tokens.contiguous(), *sides, query.weight, query.bias, keys, values, sums, *statistics,
            num_rows, num_keys, keys.stride(0), triton.cdiv(blocks, parts), head**-0.5,
            CHANNELS=channels, HEADS=num_heads, HEAD=head, ROWS=_ROWS, BLOCK=_BLOCK, NORM=norm is not None,
            EVEN=num_keys % _BLOCK == 0, num_warps=_WARPS, num_stages=_STAGES, **overlap_options(keys),
        )  # fmt: skip
        launch(
            _combine_kernel, (triton.cdiv(num_rows, _SUM_ROWS),),
            sums, *statistics, attended, num_rows,
            PARTS=parts, HEADS=num_heads, HEAD=head, ROWS=_SUM_ROWS, **overlap_options(keys),
        )  # fmt: skip
    return attended


def launch_project(image_tokens: torch.Tensor, weight: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """Compute image_tokens weight^T + terms with a kernel, without the workspace of a library.

    Args:
        image_tokens: (N, C).
        weight: (F, C), where F is a multiple of 32.
        terms: (N, F).

    Returns:
        (N, F), in the dtype of the terms.
    """
    (num_tokens, channels), features = image_tokens.shape, len(weight)
    projected = torch.empty_like(terms)
    with on_device_of(image_tokens):
        launch(
            _project_kernel, (triton.cdiv(num_tokens, _TILE), features // 32),
            image_tokens.contiguous(), weight, terms, projected, num_tokens,
            CHANNELS=channels, FEATURES=features, ROWS=_TILE, **overlap_options(image_tokens),
        )  # fmt: skip
    return projected


if triton is not None:
    from .support import grid_dependency_wait

    _LOG2E = tl.constexpr(math.log2(math.e))

    @triton.jit
    def _project_kernel(
        image_tokens, weight, terms, projected, num_tokens,
        CHANNELS: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Compute some features of some image tokens."""
        row, feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * 32 + tl.arange(0, 32)
        channel, real = tl.arange(0, CHANNELS), (row < num_tokens)[:, None]
        block = tl.load(weight + feature[:, None] * CHANNELS + channel[None, :])
        grid_dependency_wait(OVERLAP)
        tokens = tl.load(image_tokens + row[:, None] * CHANNELS + channel[None, :], mask=real, other=0.0)
        places = row[:, None] * FEATURES + feature[None, :]
        result = tl.dot(tokens, tl.trans(block)) + tl.load(terms + places, mask=real, other=0.0).to(tl.float32)
        tl.store(projected + places, result.to(projected.dtype.element_ty), mask=real)

    @triton.jit
    def _by_row(pieces, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
        return tl.reshape(pieces, (CHANNELS // 32, ROWS, 32))

    @triton.jit(do_not_specialize=["num_rows", "blocks_of_part"])
    def _attend_kernel(
        tokens, norm_weight, norm_bias, eps, embedded, query_weight, query_bias, keys, values, sums, maxima, totals,
        num_rows, num_keys, key_stride, blocks_of_part, scaling,
        CHANNELS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
        NORM: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Attend from some tokens to a part of the keys, in one head; store sums before normalization."""
        head, part = tl.program_id(1), tl.program_id(2)
        row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
        feature = head * HEAD + tl.arange(0, HEAD)
        weight = tl.load(query_weight + feature[:, None] * CHANNELS + channel[None, :])
        bias = tl.load(query_bias + feature).to(tl.float32)
        grid_dependency_wait(OVERLAP)
        wanted = row < num_rows
        # In pieces of 32 channels, the first of all rows, then the second: so few threads share a row and its sums.
        piece = tl.arange(0, CHANNELS // 32 * ROWS)
        channels = (piece // ROWS * 32)[:, None] + tl.arange(0, 32)[None, :]
        line = tl.program_id(0).to(tl.int64) * ROWS + piece % ROWS
        inputs_at, real_rows = line[:, None] * CHANNELS + channels, (line < num_rows)[:, None]
        inputs = tl.load(tokens + inputs_at, mask=real_rows, other=0.0).to(tl.float32)
        if NORM:
            inputs = _by_row(inputs, CHANNELS, ROWS)
            inputs -= (tl.sum(tl.sum(inputs, axis=2), axis=0) / CHANNELS)[None, :, None]
            variance = tl.sum(tl.sum(inputs * inputs, axis=2), axis=0) / CHANNELS
            inputs *= tl.rsqrt(variance + eps)[None, :, None]
            inputs *= _by_row(tl.load(norm_weight + channels).to(tl.float32), CHANNELS, ROWS)
            inputs += _by_row(tl.load(norm_bias + channels).to(tl.float32), CHANNELS, ROWS)
            inputs += _by_row(tl.load(embedded + inputs_at, mask=real_rows, other=0.0), CHANNELS, ROWS)
        inputs = tl.permute(_by_row(inputs.to(weight.dtype), CHANNELS, ROWS), (1, 0, 2))
        inputs = tl.reshape(inputs, (ROWS, CHANNELS))
        query = tl.dot(inputs, tl.trans(weight)) + bias[None, :]
        query = (query * scaling).to(weight.dtype)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        result = tl.zeros((ROWS, HEAD), tl.float32)
        first = part * blocks_of_part
        for block in range(first, tl.minimum(first + blocks_of_part, tl.cdiv(num_keys, BLOCK))):
            place = block * BLOCK + tl.arange(0, BLOCK)
            real = place < num_keys
            places = place[:, None] * key_stride + feature[None, :]
            if EVEN:
                key, value = tl.load(keys + places), tl.load(values + places)
            else:
                key = tl.load(keys + places, mask=real[:, None], other=0.0)
                value = tl.load(values + places, mask=real[:, None], other=0.0)
            scores = tl.dot(query, tl.trans(key))
            if not EVEN:
                scores = tl.where(real[None, :], scores, float("-inf"))
            higher = tl.maximum(largest, tl.max(scores, axis=1))
            factor = tl.exp2((largest - higher) * _LOG2E)
            weights = tl.exp2(scores * _LOG2E - (higher * _LOG2E)[:, None])
            total = total * factor + tl.sum(weights, axis=1)
            result = tl.dot(weights.to(value.dtype), value, result * factor[:, None])
            largest = higher
        line = part.to(tl.int64) * num_rows + row  # of the results
        tl.store(maxima + line * HEADS + head, largest, mask=wanted)
        tl.store(totals + line * HEADS + head, total, mask=wanted)
        tl.store(sums + line[:, None] * (HEADS * HEAD) + feature[None, :], result, mask=wanted[:, None])

    @triton.jit(do_not_specialize=["num_rows"])
    def _combine_kernel(
        sums, maxima, totals, attended, num_rows,
        PARTS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """Combine all parts of some rows."""
        grid_dependency_wait(OVERLAP)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        wanted = row < num_rows
        column = row[:, None] * HEADS + tl.arange(0, HEADS)[None, :]
        places = column[:, :, None] * HEAD + tl.arange(0, HEAD)[None, None, :]
        largest = tl.full((ROWS, HEADS), float("-inf"), tl.float32)
        for part in tl.static_range(PARTS):
            some = tl.load(maxima + part * num_rows * HEADS + column, mask=wanted[:, None], other=0.0)
            largest = tl.maximum(largest, some)
        total = tl.zeros((ROWS, HEADS), tl.float32)
        result = tl.zeros((ROWS, HEADS, HEAD), tl.float32)
        for part in tl.static_range(PARTS):
            before = part * num_rows * HEADS
            factor = tl.load(maxima + before + column, mask=wanted[:, None], other=0.0) - largest
            factor = tl.exp2(factor * _LOG2E)
            total += factor * tl.load(totals + before + column, mask=wanted[:, None], other=1.0)
            some = tl.load(sums + before * HEAD + places, mask=wanted[:, None, None], other=0.0)
            result += factor[:, :, None] * some
        result = (result / total[:, :, None]).to(attended.dtype.element_ty)
        tl.store(attended + places, result, mask=wanted[:, None, None])
