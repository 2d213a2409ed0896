"""The image side of the mask decoder and masks at the image's size on a CPU, in blocks that stay in the caches.

Batched operations write and read all image tokens of all prompts, many megabytes, once for each step. Here a prompt
comes after another, and all steps but attention's sums over the image are done for a block of its image tokens before
the next block begins. In this way half the time of everything mode on a CPU is saved. Sums are in another order, so
results are equal up to rounding; the slow siblings are `image_attention.seen_reference`,
`image_attention.update_reference`, `mask_head.run_head` and `masks.upscaling.upscale_logits`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F


if TYPE_CHECKING:
    from .mask_head import HeadWeights

_BLOCK = 1024  # image tokens: 1 MB in float32
_HEAD_BLOCK = 512  # image tokens of the head, where each becomes 16 pixels of 32 channels
_LINES = 64  # rows or columns of an image that are interpolated by one product


def why_not(image_tokens: torch.Tensor) -> str | None:
    """Return why the blocks do not run on these image tokens, as a sentence, or None if they do."""
    if not image_tokens.is_cpu:
        return f"the tensors are on {image_tokens.device}."
    if torch.is_grad_enabled():
        return "they compute no gradients, which are enabled."
    return None


def seen(queries: torch.Tensor, image_tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Compute `image_attention.seen_reference`, which describes the arguments."""
    output, keys = torch.empty_like(queries), torch.empty_like(positions)
    for query, own, result in zip(queries, _of_prompts(image_tokens, len(queries)), output):
        probabilities = torch.mm(query, torch.add(own, positions, out=keys).T).softmax(dim=-1)
        torch.mm(probabilities, own, out=result)
    return output


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
    """Compute `image_attention.update_reference`, which describes the arguments.

    With `in_place` the image tokens of each prompt are overwritten. New memory would cost as much time as a product.
    """
    output = image_tokens if in_place else values.new_empty(len(keys), *image_tokens.shape[1:])
    for key, bias, value, own, result in zip(keys, biases, values, _of_prompts(image_tokens, len(keys)), output):
        for part in _blocks(len(own), _BLOCK):
            scores = torch.addmm(bias[:, None], key, (own[part] + positions[part]).T)  # (H * T, n)
            _add_seen(scores.unflatten(0, (num_heads, -1)), value, own[part], norm, result[part])
    return output


def update_shared(
    image_tokens: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, norm: nn.LayerNorm
) -> torch.Tensor:
    """Attend from image tokens that all prompts share, already projected, to the tokens of each prompt.

    Args:
        image_tokens: (1, N, C).
        queries: their projection, (N, H, D).
        keys: (P, T, H, D).
        values: (P, H * T, C).
        norm: LayerNorm of C channels.

    Returns:
        LayerNorm(image_tokens + softmax(queries keys^T) values) for each prompt, (P, N, C); the softmax is over each
        head's T tokens.
    """
    output = values.new_empty(len(keys), *image_tokens.shape[1:])
    queries = queries.permute(1, 2, 0)  # (H, D, N)
    for key, value, result in zip(keys.transpose(1, 2), values, output):  # key: (H, T, D)
        for part in _blocks(image_tokens.shape[1], _BLOCK):
            _add_seen(key @ queries[..., part], value, image_tokens[0, part], norm, result[part])
    return output


def run_head(
    image_tokens: torch.Tensor,
    prompts: Sequence[int],
    hyper: torch.Tensor,
    grid: tuple[int, int],
    weights: "HeadWeights",
    visible: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Compute `mask_head.run_head` for some prompts, and for the part of the image that is needed.

    Args:
        image_tokens: (P, N, C), of an h x w grid.
        prompts: places of P' of the prompts.
        hyper: outputs of their hypernetworks, (P', M, C / 8).
        grid: (h, w).
        weights: the weights.
        visible: the number of rows and columns of the logits that will be read; the others are zero. All by default.

    Returns:
        (P', M, 4h, 4w).
    """
    (height, width), num_masks = grid, hyper.shape[1]
    rows, columns = grid if visible is None else (-(-visible[0] // 4), -(-visible[1] // 4))
    norm, channels = weights.norm, weights.weight2.shape[1]
    shape = len(prompts), num_masks, height, 2, 2, width, 2, 2
    output = image_tokens.new_empty(shape) if (rows, columns) == grid else image_tokens.new_zeros(shape)
    for prompt, masks, result in zip(prompts, hyper.to(image_tokens.dtype), output):
        own = image_tokens[prompt].unflatten(0, grid)[:rows, :columns]
        for part in _blocks(rows, max(1, _HEAD_BLOCK // columns)):
            tokens = own[part].flatten(0, 1)
            hidden = F.linear(tokens, weights.weight1, weights.bias1).view(-1, channels)
            hidden = F.gelu(F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
            hidden = F.gelu(F.linear(hidden, weights.weight2, weights.bias2)).view(-1, masks.shape[1])
            logits = torch.mm(masks, hidden.T).view(num_masks, -1, columns, 2, 2, 2, 2)
            result[:, part][..., :columns, :, :] = logits.permute(0, 1, 3, 5, 2, 4, 6)  # as in `mask_head.run_head`
    return output.view(len(prompts), num_masks, 4 * height, 4 * width)


def upscale(
    logits: torch.Tensor, padded_size: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]
) -> torch.Tensor:
    """Compute `upscale_logits`, which describes the arguments: both resizes at once, first of columns, then of rows."""
    logits, (height, width) = logits.float(), original
    vertical, horizontal = (_interpolation(*sizes) for sizes in zip(logits.shape[1:], padded_size, resized, original))
    stretched = logits.new_empty(*logits.shape[:2], width)
    for lines, places, weights in horizontal:
        torch.matmul(logits[..., places], weights.T, out=stretched[..., lines])
    output = logits.new_empty(len(logits), height, width)
    for image, result in zip(stretched, output):
        for lines, places, weights in vertical:
            torch.mm(weights, image[places], out=result[lines])
    return output


@lru_cache(maxsize=16)
def _interpolation(low: int, padded: int, resized: int, original: int) -> tuple[tuple[slice, slice, torch.Tensor], ...]:
    """Return for each block of an axis its lines, the places of the logits that they depend on, and their weights.

    Args:
        low, padded, resized, original: sizes of the logits, the model's input, the image in it, and the image.

    Returns:
        Slices of the image's axis and of the logits', and weights (lines, places), float32.
    """
    with torch.inference_mode(False):
        weights = torch.eye(low, dtype=torch.float32, device="cpu")[None]  # (1, logits, lines)
        for size, cut in ((padded, resized), (original, original)):
            if weights.shape[2] != size:
                weights = F.interpolate(weights, size, mode="linear", align_corners=False)
            weights = weights[..., :cut]
        blocks = []
        for lines in _blocks(original, _LINES):
            used = weights[0, :, lines].any(dim=1).nonzero().flatten()
            places = slice(int(used[0]), int(used[-1]) + 1)
            blocks.append((lines, places, weights[0, places, lines].T.contiguous()))
    return tuple(blocks)


def _add_seen(
    scores: torch.Tensor, values: torch.Tensor, residual: torch.Tensor, norm: nn.LayerNorm, output: torch.Tensor
):
    """Write LayerNorm(residual + softmax(scores)^T values) for scores (H, T, n) and values (H * T, C) to (n, C)."""
    seen = torch.addmm(residual, scores.softmax(dim=1).flatten(0, 1).T, values)
    output.copy_(F.layer_norm(seen, norm.normalized_shape, norm.weight, norm.bias, norm.eps))


def _of_prompts(image_tokens: torch.Tensor, num_prompts: int) -> torch.Tensor:
    return image_tokens.expand(num_prompts, -1, -1)


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
