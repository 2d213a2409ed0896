"""SAM's mask decoder for few prompts: seven Triton kernels per layer for a prompt's tokens, three for the image tokens.

With few prompts the decoder is about a hundred operations on seven tokens, and each takes longer to launch than to
compute. Here each kernel covers the work between two points at which all tokens of a prompt must be known: a head of
the self-attention with its projections, or a linear layer with the norm before it and the residual after it. Thread
blocks divide the heads or columns, so that many multiprocessors read the weights at once. On Hopper each kernel starts
while the previous one is running (programmatic dependent launch) and can read its weights in the meantime. The kernels
of the image tokens are in `image_attention`, and in `shared_attention` for the first layer, in which all prompts of an
image see the same.

Between kernels, tokens are float32 and not yet normalized; the kernel that reads them applies the LayerNorm. Products
are summed in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import SamConfig
from transformers.models.sam.modeling_sam import (
    SamAttention,
    SamFeedForward,
    SamMaskDecoder,
    SamPromptEncoder,
    SamTwoWayAttentionBlock,
)

from . import image_attention, shared_attention
from .prompt_embedding import PromptEmbedding
from .support import (
    launch,
    normal_numbers,
    on_device_of,
    overlap_options,
    tried,
    triton,
    why_not_decoder,
    why_not_tried,
)


if triton is not None:
    from .tokens_triton import (
        add_kernel,
        add_seen_kernel,
        attend_kernel,
        embed_kernel,
        hidden_kernel,
        mlp_kernel,
        to_image_kernel,
    )


MOST_PROMPTS = 64  # with more, torch's operations have enough to do

_ROWS = 16  # of a block, which holds all tokens of a prompt
_FEATURES = 32  # of a linear layer, per thread block
_FEW_FEATURES = 16  # the same for a layer with many input features
_INPUTS = 256  # input features that are read at once


def fits(num_heads: int, num_output_tokens: int, prompts: Sequence[torch.Tensor]) -> bool:
    """Return whether the prompts are few enough, and each has few enough tokens, for these kernels."""
    num_tokens = num_output_tokens + _num_tokens(prompts)
    few_tokens = num_tokens <= _ROWS and image_attention.fits(num_heads, num_tokens)
    return prompts[0].shape[0] <= MOST_PROMPTS and few_tokens


def why_not_triton(decoder: SamMaskDecoder, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run this mask decoder, as a sentence, or None if they can.

    Args:
        decoder: the mask decoder.
        device: of its weights.
        dtype: of its weights.
    """
    config = decoder.config
    channels, heads = config.hidden_size, config.num_attention_heads
    if reason := why_not_decoder(device, dtype, channels):
        return reason
    for head_dim in (channels // heads, channels // config.attention_downsample_rate // heads):
        if head_dim not in (16, 32, 64):
            return f"an attention's heads have {head_dim} channels, and not 16, 32 or 64."
    if config.hidden_act != "relu":
        return f"hidden_act={config.hidden_act!r} is not 'relu'."
    if config.mlp_dim % _INPUTS:
        return f"mlp_dim={config.mlp_dim} is no multiple of {_INPUTS}."
    if (config.iou_head_depth, config.iou_head_hidden_dim) != (3, channels):
        return (
            f"the IoU head has {config.iou_head_depth} layers of {config.iou_head_hidden_dim}, and not 3 of {channels}."
        )
    if decoder.num_mask_tokens >= _ROWS or not config.num_hidden_layers:
        return f"the decoder has {decoder.num_mask_tokens} masks and {config.num_hidden_layers} layers."
    if not all(parameter.is_contiguous() for parameter in decoder.transformer.parameters()):
        return "the weights are not contiguous."
    shape = "hidden_size", "num_attention_heads", "attention_downsample_rate", "mlp_dim", "num_multimask_outputs"
    names = (*shape, "num_hidden_layers", "iou_head_hidden_dim")
    return _why_not_tried(device, dtype, tuple((name, getattr(config, name)) for name in names))


def _why_not_tried(device: torch.device, dtype: torch.dtype, shape: tuple[tuple[str, int], ...]) -> str | None:
    def attempt() -> bool:
        channels, masks = dict(shape)["hidden_size"], slice(1, None)
        config = SamConfig(
            vision_config={"num_pos_feats": channels // 2},
            prompt_encoder_config={"hidden_size": channels, "image_size": 256, "image_embedding_size": 16},
            mask_decoder_config=dict(shape),
        )
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            decoder, encoder = SamMaskDecoder(config.mask_decoder_config).to(dtype), SamPromptEncoder(config).to(dtype)
        numbers = normal_numbers(device)
        image_tokens, positions = numbers(1, 256, channels).to(dtype), numbers(256, channels).to(dtype)
        points = 100 + 50 * numbers(2, 1, 2), torch.ones(2, 1, dtype=torch.int32, device=device)
        boxes = 100 + 50 * torch.stack([-numbers(2, 2).abs(), numbers(2, 2).abs()], dim=1).flatten(1)
        kinds = points, (boxes,), (*points, boxes)
        kernels = TokenKernels(decoder, PromptEmbedding(encoder), positions)
        results = tried(lambda: [kernels(image_tokens, prompts, masks) for prompts in kinds], several=True)
        decoder, encoder = decoder.float(), encoder.float()
        expected = [reference(decoder, encoder, positions, image_tokens, prompts, masks) for prompts in kinds]
        pairs = zip(sum(results, ()), sum(expected, ()))
        return all(bool((a - b).norm() < 0.02 * b.norm()) for a, b in pairs)

    return why_not_tried("a prompt's tokens", device, (dtype, shape), attempt)


def reference(decoder, encoder, positions, image_tokens, prompts, masks: slice):
    """Compute the result of `TokenKernels` with the decoder's own modules."""
    batched = (None if prompt is None else prompt[None] for prompt in _by_name(prompts))
    embedded, _ = encoder(*batched, None)  # (1, P, t, C)
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(1, len(prompts[0]), -1, -1)
    side = int(len(positions) ** 0.5)
    maps = [part.to(outputs.dtype).mT.unflatten(-1, (side, -1)) for part in (image_tokens, positions[None])]
    tokens, image_tokens = decoder.transformer(torch.cat([outputs, embedded], dim=2), *maps, None)[:2]
    mlps = enumerate(decoder.output_hypernetworks_mlps, start=1)
    hyper = torch.stack([mlp(tokens[0, :, place]) for place, mlp in mlps], dim=1)
    return decoder.iou_prediction_head(tokens[0, :, 0])[:, masks], hyper[:, masks], image_tokens.flatten(0, 1)


class TokenKernels:
    """Mask decoder without its end: from prompts and image tokens to scores, hypernetwork outputs and new image tokens.

    The weights of the heads and of the prompt embedding are copied here; all others are read from the decoder at each
    call. Most kernels read them before the previous kernel has ended. The first of a call does not, and so waits for
    the kernel that wrote them.

    Args:
        decoder: SAM's mask decoder.
        embed: embedding of the prompts.
        positions: positional embedding of the image tokens, (N, C), in the kernels' dtype.
    """

    @torch.no_grad()
    def __init__(self, decoder: SamMaskDecoder, embed: PromptEmbedding, positions: torch.Tensor):
        self.transformer, self.heads = decoder.transformer, decoder.config.num_attention_heads
        self.positions, self.dtype, self.channels = positions, positions.dtype, positions.shape[1]
        self.mlps = stack_layers([decoder.iou_prediction_head, *decoder.output_hypernetworks_mlps])
        self.output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).float()
        self.scale, self.shift = embed.scale, float(embed.shift)
        self.waves = torch.cat([embed.weight, embed.phase[None]])
        corners = torch.cat([torch.ones_like(embed.corners), embed.corners], dim=1)
        self.kinds = torch.cat([embed.by_label, corners])  # rows by label, the last for padding, then corners
        self.shared_sides = self._project_positions(decoder.transformer.layers[0].cross_attn_token_to_image)

    def __call__(
        self, image_tokens: torch.Tensor, prompts: tuple[torch.Tensor, ...], masks: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the decoder.

        Args:
            image_tokens: (1, N, C) or (P, N, C).
            prompts: points (P, k, 2) and labels (P, k), or boxes (P, 4), or points, labels and boxes, in pixels of the
                resized image.
            masks: which of the decoder's masks to compute.

        Returns:
            Predicted IoU (P, M) and hypernetwork outputs (P, M, C / 8), float32, and image tokens (P, N, C).
        """
        tokens = embedded = self.embed(prompts)
        norm = None
        is_shared = len(image_tokens) == 1 and self.shared_sides is not None
        for place, layer in enumerate(self.transformer.layers):
            attended = self._attend(layer.self_attn, tokens, norm, None if norm is None else embedded)
            tokens = self._add(layer.self_attn.out_proj, attended, None if norm is None else tokens, norm)
            see = self._see_shared if is_shared and place == 0 else self._see
            tokens = see(layer.cross_attn_token_to_image, tokens, layer.layer_norm1, embedded, image_tokens)
            hidden = self._hidden(layer.mlp.lin1, tokens, layer.layer_norm2)
            tokens, norm = self._add(layer.mlp.lin2, hidden, tokens, layer.layer_norm2), layer.layer_norm3
            image_tokens = self._update(layer, tokens, norm, embedded, image_tokens, in_place=place > 0)
        tokens = self._see(self.transformer.final_attn_token_to_image, tokens, norm, embedded, image_tokens)
        return *self._run_heads(tokens, self.transformer.layer_norm_final_attn, masks), image_tokens

    def embed(self, prompts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the decoder's input tokens, float32 (P, T, C): output tokens, then the embedded prompts."""
        points, labels, boxes = _by_name(tuple(prompt.contiguous() for prompt in prompts))
        num_points = 0 if points is None else points.shape[1]
        num_outputs, num_prompts = len(self.output_tokens), len(prompts[0])
        embedded = self._new(num_prompts, num_outputs + _num_tokens(prompts), self.channels)
        self._launch(
            embed_kernel, embedded.shape[1], embedded, self.output_tokens, self.waves, self.kinds,
            points, labels, boxes, num_outputs, num_points, embedded.shape[1], self.scale, self.shift,
            CHANNELS=self.channels, POINTS=points is not None, BOXES=boxes is not None,
        )  # fmt: skip
        return embedded

    def _attend(self, attention: SamAttention, tokens, norm, embedded) -> torch.Tensor:
        """Return the output of the self-attention's heads, (P, T, C); `embedded` is added to queries and keys."""
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        attended = torch.empty_like(tokens, dtype=self.dtype)
        self._launch(
            attend_kernel, self.heads, tokens, *_norm(norm), embedded,
            query.weight, query.bias, key.weight, key.bias, value.weight, value.bias, attended,
            tokens.shape[1], attention.scaling,
            CHANNELS=self.channels, HEAD=self.channels // self.heads, ROWS=_ROWS, NORM=norm is not None,
        )  # fmt: skip
        return attended

    def _add(self, linear: nn.Linear, values: torch.Tensor, tokens, norm) -> torch.Tensor:
        """Compute linear(values), plus LayerNorm(tokens) if there are tokens: float32 (P, T, C)."""
        output = self._new(*values.shape[:2], self.channels)
        features = _FEATURES if linear.in_features <= _INPUTS else _FEW_FEATURES
        self._launch(
            add_kernel, self.channels // features, values, linear.weight, linear.bias, tokens, *_norm(norm), output,
            values.shape[1], IN=linear.in_features, BLOCK=min(linear.in_features, _INPUTS), CHANNELS=self.channels,
            FEATURES=features, ROWS=_ROWS, RESIDUAL=tokens is not None, NORM=norm is not None,
        )  # fmt: skip
        return output

    def _hidden(self, linear: nn.Linear, tokens: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """Compute relu(linear(LayerNorm(tokens))), (P, T, features)."""
        hidden = tokens.new_empty(*tokens.shape[:2], linear.out_features, dtype=self.dtype)
        self._launch(
            hidden_kernel, linear.out_features // _FEATURES, tokens, *_norm(norm), linear.weight, linear.bias, hidden,
            tokens.shape[1], OUT=linear.out_features, CHANNELS=self.channels, FEATURES=_FEATURES, ROWS=_ROWS,
        )  # fmt: skip
        return hidden

    def _see(self, attention: SamAttention, tokens, norm, embedded, image_tokens) -> torch.Tensor:
        """Compute LayerNorm(tokens) plus their attention to image tokens (1, N, C) or (P, N, C): float32 (P, T, C)."""
        queries, _, _ = self._to_image(attention.q_proj, attention.k_proj, attention, tokens, norm, embedded)
        seen = image_attention.seen(queries, image_tokens, self.positions)  # (P, H * T, C)
        output, value, out = torch.empty_like(tokens), attention.v_proj, attention.out_proj
        self._launch(
            add_seen_kernel, self.channels // _FEATURES, seen, value.weight, value.bias, out.weight, out.bias,
            tokens, *_norm(norm), output, tokens.shape[1],
            CHANNELS=self.channels, HEADS=self.heads, HEAD=value.out_features // self.heads,
            FEATURES=_FEATURES, ROWS=_ROWS,
        )  # fmt: skip
        return output

    def _project_positions(self, attention: SamAttention) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what image tokens that all prompts share are multiplied with and added to for keys and values.

        They are a weight (2 * H * D, C) and terms (N, 2 * H * D), None if the heads are of another size.
        """
        key, value = attention.k_proj, attention.v_proj
        if not shared_attention.fits(self.heads, key.out_features):
            return None
        # Feature by feature: a product of matrices would load cuBLAS, which nothing else in `optimize` needs.
        positions = self.positions.float()
        keys = torch.stack([(positions * row).sum(dim=1) for row in key.weight.float()], dim=1) + key.bias.float()
        terms = torch.cat([keys, value.bias.float().expand_as(keys)], dim=1)
        return torch.cat([key.weight, value.weight]), terms.to(self.dtype)

    def _see_shared(self, attention: SamAttention, tokens, norm, embedded, image_tokens) -> torch.Tensor:
        """Compute the same as `_see` for image tokens (1, N, C), whose keys and values are projected once."""
        assert self.shared_sides is not None
        keys, values = shared_attention.launch_project(image_tokens[0], *self.shared_sides).chunk(2, dim=1)
        attended = shared_attention.attend(tokens, attention.q_proj, keys, values, self.heads, norm, embedded)
        return self._add(attention.out_proj, attended, tokens, norm)

    def _update(
        self, layer: SamTwoWayAttentionBlock, tokens, norm, embedded, image_tokens, in_place: bool
    ) -> torch.Tensor:
        """Return the image tokens (P, N, C) after their attention to the tokens and its layer norm."""
        attention = layer.cross_attn_image_to_token
        sides = self._to_image(attention.k_proj, attention.q_proj, attention, tokens, norm, embedded, with_values=True)
        keys, biases, values = sides
        norm, heads = layer.layer_norm4, self.heads
        return image_attention.update(image_tokens, self.positions, keys, biases, values, norm, heads, in_place)

    def _to_image(self, own: nn.Linear, other: nn.Linear, attention, tokens, norm, embedded, with_values=False):
        """Project tokens into the channels of the image tokens, so that these need no projection of their own.

        Args:
            own: the tokens' projection.
            other: the image tokens' projection, whose weight is applied to the projected tokens instead.
            attention: the attention layer.
            tokens, norm, embedded: float32 (P, T, C), their LayerNorm, and the embedding that is added after it.
            with_values: whether to compute biases and values.

        Returns:
            The projected tokens (P, H * T, C), head by head. With values also the summands of the scores that come from
            the bias of `other`, (P, H * T), and the values after the output projection, (P, H * T, C); None without.
        """
        num_prompts, num_tokens, channels = tokens.shape
        shape = num_prompts, self.heads * num_tokens
        sides = tokens.new_empty(*shape, channels, dtype=self.dtype)
        biases = tokens.new_empty(shape, dtype=self.dtype) if with_values else None
        values = torch.empty_like(sides) if with_values else None
        value, out = attention.v_proj, attention.out_proj
        self._launch(
            to_image_kernel, self.heads, tokens, *_norm(norm), embedded, own.weight, own.bias, other.weight, other.bias,
            value.weight, value.bias, out.weight, out.bias, sides, biases, values, num_tokens, attention.scaling,
            CHANNELS=channels, HEADS=self.heads, HEAD=own.out_features // self.heads, ROWS=_ROWS, VALUES=with_values,
        )  # fmt: skip
        return sides, biases, values

    def _run_heads(self, tokens, norm: nn.LayerNorm, masks: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the IoU head and the hypernetworks of the `masks`, each on its token, in float32."""
        first, stop, _ = masks.indices(len(self.output_tokens) - 1)
        values = tokens
        for depth, (weight, bias) in enumerate(self.mlps):
            width = weight.shape[2]
            features = min(_FEATURES, width)
            output = self._new(len(tokens), 1 + stop - first, width)
            self._launch(
                mlp_kernel, output.shape[1] * width // features, values, *_norm(norm), weight, bias, output,
                tokens.shape[1], first, output.shape[1], IN=self.channels, OUT=width, FEATURES=features,
                FIRST=depth == 0, LAST=depth == len(self.mlps) - 1,
            )  # fmt: skip
            values = output
        return values[:, 0, first:stop], values[:, 1:]

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.positions.device)

    def _launch(self, kernel: Any, num_parts: int, *arguments, **options):
        """Launch a kernel with `num_parts` thread blocks per prompt; the first argument has a row for each prompt."""
        with on_device_of(self.positions):
            launch(kernel, (num_parts, len(arguments[0])), *arguments, **overlap_options(self.positions), **options)


def _by_name(prompts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return points, labels and boxes; None for those that are missing."""
    if len(prompts) == 1:
        return None, None, prompts[0]
    return prompts[0], prompts[1], prompts[2] if len(prompts) > 2 else None


def _num_tokens(prompts: Sequence[torch.Tensor]) -> int:
    """Count the tokens of a prompt: points and a padding point, or a box's corners, or points and corners."""
    points = prompts[0].shape[1] if len(prompts) > 1 else 0
    return points + (1 if len(prompts) == 2 else 2)


def _norm(norm: nn.LayerNorm | None) -> tuple:
    return (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)


def stack_layers(mlps: Sequence[SamFeedForward]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Stack the weights of M MLPs, layer by layer.

    Returns:
        For each layer weights (M, in, out) and biases (M, 1, out), padded with zeros to the widest MLP.
    """
    stacked = []
    for layers in zip(*([mlp.proj_in, *mlp.layers, mlp.proj_out] for mlp in mlps)):
        width = max(linear.out_features for linear in layers)
        weights = [F.pad(linear.weight.T, (0, width - linear.out_features)) for linear in layers]
        biases = [F.pad(linear.bias[None], (0, width - linear.out_features)) for linear in layers]
        stacked.append((torch.stack(weights), torch.stack(biases)))
    return stacked
