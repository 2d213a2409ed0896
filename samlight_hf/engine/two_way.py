"""The two-way transformer of SAM's mask decoder with less work on the image side; see `mask_decoder` for the idea."""

from collections.abc import Callable
from functools import partial

import torch
from transformers.models.sam.modeling_sam import SamAttention, SamTwoWayAttentionBlock, SamTwoWayTransformer

from ..kernels import cpu_blocks, image_attention, shared_attention
from ..kernels.layer_norm import add_layer_norm


def run_two_way(
    transformer: SamTwoWayTransformer,
    embedded: torch.Tensor,
    image_tokens: torch.Tensor,
    positions: torch.Tensor,
    use_kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the two-way transformer on P prompts of T tokens.

    Args:
        transformer: The module whose weights are used.
        embedded: Prompt tokens (P, T, C), which also serve as their positional encoding.
        image_tokens: (1, N, C) if all prompts share one image, or (P, N, C).
        positions: Positional encoding of the image tokens (N, C).
        use_kernels: Use the Triton kernels of `image_attention` and `shared_attention` where they fit.

    Returns:
        The prompt tokens (P, T, C) and the image tokens (P, N, C) after the last layer.
    """
    tokens = embedded
    for place, layer in enumerate(transformer.layers):
        if layer.skip_first_layer_pe:
            tokens = _attend(layer.self_attn, tokens, tokens)
        else:
            tokens = tokens + _attend(layer.self_attn, tokens + embedded, tokens)
        tokens = layer.layer_norm1(tokens)
        attention = layer.cross_attn_token_to_image
        tokens = tokens + _tokens_to_image(attention, tokens + embedded, image_tokens, positions, use_kernels)
        tokens = layer.layer_norm2(tokens)
        tokens = layer.layer_norm3(tokens + layer.mlp(tokens))
        # Those of a layer before are needed no more, and the largest tensor.
        image_tokens = _image_to_tokens(
            layer, image_tokens, tokens + embedded, tokens, positions, use_kernels, in_place=place > 0
        )
    attention = transformer.final_attn_token_to_image
    attended = _tokens_to_image(attention, tokens + embedded, image_tokens, positions, use_kernels)
    return transformer.layer_norm_final_attn(tokens + attended), image_tokens


def _tokens_to_image(
    attention: SamAttention,
    tokens: torch.Tensor,
    image_tokens: torch.Tensor,
    positions: torch.Tensor,
    use_kernels: bool,
) -> torch.Tensor:
    """Attend from prompt tokens (P, T, C) to image tokens (1 or P, N, C); keys have positions, values have none."""
    heads, (num_prompts, num_tokens, _) = attention.num_attention_heads, tokens.shape
    if len(image_tokens) == 1:  # shared: project them once
        key = attention.k_proj(image_tokens[0] + positions)  # (N, H * D)
        value = attention.v_proj(image_tokens[0])
        if use_kernels and shared_attention.fits(heads, key.shape[1]):
            output = shared_attention.attend(tokens, attention.q_proj, key, value, heads)
        else:
            query = _heads(attention.q_proj(tokens), heads) * attention.scaling  # (P, T, H, D)
            scores = query.permute(2, 0, 1, 3).flatten(1, 2) @ _heads(key, heads).permute(1, 2, 0)  # (H, P * T, N)
            output = scores.softmax(dim=-1) @ _heads(value, heads).transpose(0, 1)  # (H, P * T, D)
            output = output.view(heads, num_prompts, num_tokens, -1).permute(1, 2, 0, 3)
    else:
        query = _heads(attention.q_proj(tokens), heads) * attention.scaling
        use_kernels = use_kernels and image_attention.fits(heads, num_tokens)
        # The key's bias adds the same to all scores of a token, which softmax ignores.
        query = _to_image_side(query, attention.k_proj.weight)  # (P, H * T, C)
        see = _choose(image_attention.seen, cpu_blocks.seen, image_attention.seen_reference, image_tokens, use_kernels)
        seen = see(query, image_tokens, positions).view(num_prompts, heads, num_tokens, -1)  # (P, H, T, C)
        weight = attention.v_proj.weight.view(heads, -1, seen.shape[-1])  # (H, D, C)
        output = (seen @ weight.transpose(1, 2)).transpose(1, 2)  # (P, T, H, D)
        output = output + attention.v_proj.bias.view(heads, -1)  # probabilities sum to 1
    return attention.out_proj(output.flatten(2))


def _image_to_tokens(
    layer: SamTwoWayAttentionBlock,
    image_tokens: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    use_kernels: bool,
    in_place: bool,
) -> torch.Tensor:
    """Attend from image tokens (1 or P, N, C) to prompt tokens, add the residual, apply the layer norm: (P, N, C).

    With `in_place` kernel and blocks overwrite the image tokens.
    """
    attention, norm = layer.cross_attn_image_to_token, layer.layer_norm4
    heads, (num_prompts, num_tokens, _) = attention.num_attention_heads, keys.shape
    use_kernels = use_kernels and image_attention.fits(heads, num_tokens)
    key = _heads(attention.k_proj(keys), heads) * attention.scaling  # (P, T, H, D)
    value = _to_image_side(_heads(attention.v_proj(values), heads), attention.out_proj.weight.T)  # (P, H * T, C)
    # The probabilities of each head sum to 1, so all heads together add the bias once.
    value = value + attention.out_proj.bias / heads
    if len(image_tokens) == 1 and not use_kernels:
        query = _heads(attention.q_proj(image_tokens[0] + positions), heads)  # (N, H, D)
        if cpu_blocks.why_not(image_tokens) is None:
            return cpu_blocks.update_shared(image_tokens, query, key, value, norm)
        scores = key.permute(2, 0, 1, 3).flatten(1, 2) @ query.permute(1, 2, 0)  # (H, P * T, N)
        scores = scores.view(heads, num_prompts, num_tokens, -1).transpose(0, 1)
        probabilities = scores.softmax(dim=2).reshape(num_prompts, heads * num_tokens, -1)  # over the prompt tokens
        return add_layer_norm(probabilities.transpose(1, 2) @ value, norm, residual=image_tokens)
    # The query's bias, in contrast, adds a different number to each token's score: its product with the token's key.
    bias = (key * attention.q_proj.bias.view(heads, -1)).sum(dim=-1).transpose(1, 2).flatten(1)  # (P, H * T)
    key = _to_image_side(key, attention.q_proj.weight)
    kernel, blocks = (partial(module.update, in_place=in_place) for module in (image_attention, cpu_blocks))
    update = _choose(kernel, blocks, image_attention.update_reference, image_tokens, use_kernels)
    return update(image_tokens, positions, key, bias, value, norm, heads)


def _choose(
    kernel: Callable, blocks: Callable, reference: Callable, image_tokens: torch.Tensor, use_kernels: bool
) -> Callable:
    """Choose among the kernel for GPUs, the blocks for CPUs and the plain operations that both must equal."""
    if use_kernels:
        return kernel
    return reference if cpu_blocks.why_not(image_tokens) else blocks


def _attend(attention: SamAttention, tokens: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Run self-attention on (P, T, C), which the module takes as a batch of one image."""
    return attention(query=tokens[None], key=tokens[None], value=values[None])[0][0]


def _heads(projected: torch.Tensor, heads: int) -> torch.Tensor:
    return projected.unflatten(-1, (heads, -1))


def _to_image_side(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply each head of the tokens (P, T, H, D) by its rows of `weight` (H * D, C): (P, H * T, C)."""
    num_prompts, num_tokens, heads, head_dim = tokens.shape
    weight = weight.reshape(heads, head_dim, -1)
    # (P, T, H, D) -> (H, P * T, D) -> (H, P * T, C) -> (P, H * T, C)
    product = tokens.permute(2, 0, 1, 3).reshape(heads, num_prompts * num_tokens, head_dim) @ weight
    return product.view(heads, num_prompts, num_tokens, -1).transpose(0, 1).reshape(num_prompts, heads * num_tokens, -1)
