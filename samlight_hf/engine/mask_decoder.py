"""SAM's mask decoder in fewer operations: the same results, up to rounding.

What the decoder costs is the image side: N = 4096 tokens of 256 channels for every prompt. Here there is less of that:

- In the first layer all prompts of an image see the same image tokens: their keys, values and queries are projected once.
- Later, tokens are few (T = 7) and image tokens many. A projection W of the image tokens x that only meets the tokens is
  moved to the tokens' side: q (W x)^T = (q W) x^T, and p (x W) = (p x) W, with p the probabilities of T tokens. So no
  projection of an image token is computed, written or read.
- Everything stays in the layout (prompts, tokens, channels): transposed convolutions of stride 2 are matrix products, and
  only the finished masks are put into the order of their pixels.
- Masks are computed for prompts that are kept by their predicted IoU, where the caller asks for a least one.
- In half precision Triton kernels do what is left of the image side: `image_attention` and `mask_head`.
- With few prompts the tokens' side, too: `token_kernels`.

What is small is computed in float32 whatever the model's dtype: where prompts and image tokens are (in bfloat16 a coordinate of an
image of 1024 pixels is off by up to a pixel), the predicted IoU (one score in a hundred would have a neighbour with
the same bits, and which of two masks is suppressed would be a matter of their order) and the hypernetworks.
"""

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.sam.modeling_sam import (
    SamAttention,
    SamMaskDecoder,
    SamPromptEncoder,
    SamTwoWayAttentionBlock,
)

from ..kernels import image_attention, mask_head
from ..kernels import tokens as token_kernels
from ..kernels.layer_norm import add_layer_norm
from ..kernels.prompt_embedding import PromptEmbedding
from ..kernels.tokens import TokenKernels, stack_layers
from ..utils.autocast import without_autocast
from ..utils.turns import takes_turns
from .cuda_graphs import GraphedFunction
from .plain_modules import same_bits, weights_of, why_not_plain_decoder


class Decoded(NamedTuple):
    """What P prompts gave: `iou` float32 (P, M), and `logits` (K, h, w) of the K masks whose place in it is in `kept`."""

    iou: torch.Tensor
    places: torch.Tensor | None  # `kept`, or None for all
    logits: torch.Tensor

    @property
    def kept(self) -> torch.Tensor:
        """int64 (K,), places in iou.flatten(), ascending."""
        return places_above(self.iou, None) if self.places is None else self.places


def why_not_fast(model: PreTrainedModel) -> str | None:
    """Why `FastMaskDecoder` cannot run this model: a sentence, or None where it can."""
    decoder, prompt_encoder = getattr(model, "mask_decoder", None), getattr(model, "prompt_encoder", None)
    if type(decoder) is not SamMaskDecoder or type(prompt_encoder) is not SamPromptEncoder:
        return f"{type(model).__name__} has no mask decoder of SAM's own build."
    return why_not_plain_decoder(model)


class FastMaskDecoder:
    """The prompt encoder and mask decoder of a `SamModel` or `SamLighteningModel`, for inference.

    The model's weights are copied when this is made, and later changes of them do not reach it. `triton_kernels` are used
    by default where they can run; ValueError for True where they cannot in half precision, but for those of a few prompts'
    tokens, which are tried when such prompts come. It computes in `dtype`, by default
    the model's. Threads may share it: `decode` takes turns.
    """

    @without_autocast
    def __init__(
        self,
        model: PreTrainedModel,
        cuda_graphs: bool = False,
        triton_kernels: bool | None = None,
        dtype: torch.dtype | None = None,
    ):
        if reason := why_not_fast(model):
            raise ValueError(reason)
        self.dtype, self.device = dtype or model.dtype, model.device
        self.image_embedding, self.prompt_encoder, self.decoder = (
            copy.deepcopy(part).to(self.dtype)
            for part in (model.shared_image_embedding, model.prompt_encoder, model.mask_decoder)
        )
        self.cuda_graphs = cuda_graphs
        self.pool = torch.cuda.graph_pool_handle() if cuda_graphs else None  # of memory that graphs may share
        # Image tokens that a graph returns stay where they are, some hundred MB for each: no more than two.
        self.transform = GraphedFunction(self._transform, cuda_graphs, max_graphs=2, pool=self.pool)
        self.all_masks = {
            (multimask, with_mask): GraphedFunction(
                partial(self._all_masks, multimask, with_mask), cuda_graphs, pool=self.pool
            )
            for multimask in (False, True)
            for with_mask in (False, True)
        }
        decoder = self.decoder
        with torch.no_grad():
            self.positions = _image_positions(model).to(self.dtype)  # (N, C)
            self.no_mask = self.prompt_encoder.no_mask_embed.weight  # (1, C)
            self.output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).float()
            self.embed = PromptEmbedding(copy.deepcopy(model.prompt_encoder))  # whose dtype may have more bits
            first, second = _as_linear(decoder.upscale_conv1), _as_linear(decoder.upscale_conv2)
            self.head = mask_head.HeadWeights(*first, decoder.upscale_layer_norm, *second)
            self.hypernetworks, self.iou_head = (
                [(weight.float(), bias.float()) for weight, bias in stack_layers(mlps)]
                for mlps in (decoder.output_hypernetworks_mlps, [decoder.iou_prediction_head])
            )
        self.grid_size = tuple(self.prompt_encoder.image_embedding_size)
        heads = model.config.mask_decoder_config.num_attention_heads
        self.why_not_triton = {
            "attention": image_attention.why_not_triton(model.device, self.dtype, self.positions.shape[1], heads),
            "head": mask_head.why_not_triton(self.head),
        }
        reasons = [reason for reason in self.why_not_triton.values() if reason]
        if triton_kernels and reasons and self.dtype != torch.float32:
            raise ValueError(f"triton_kernels=True is not possible: {reasons[0]}")
        self.use_attention_kernels, self.use_head_kernel = (
            reason is None and triton_kernels is not False for reason in self.why_not_triton.values()
        )
        # Whether of a prompt with one point nothing but tokens and masks is ever in memory; see `MemoryBudget`.
        self.is_lean = self.use_head_kernel and self._has_kernels_for(heads, len(self.output_tokens) + 2)

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        """Whether another one, made of the model now, would compute the same."""
        copies = {
            "shared_image_embedding": self.image_embedding,
            "prompt_encoder": self.prompt_encoder,
            "mask_decoder": self.decoder,
        }
        if why_not_plain_decoder(model, copies) is not None:
            return False
        own = weights_of(*(getattr(model, name) for name in copies))
        return same_bits([tensor.to(self.dtype) for tensor in own], weights_of(*copies.values()))

    def prepare(self, embedding: torch.Tensor) -> torch.Tensor:
        """Image embeddings (B, C, h, w) of the encoder as image tokens (B, N, C), a copy."""
        tokens = embedding.flatten(2).transpose(1, 2)
        return tokens.to(self.dtype, memory_format=torch.contiguous_format, copy=True)

    @takes_turns
    @without_autocast
    @torch.inference_mode()
    def decode(
        self,
        image: torch.Tensor,
        points: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        mask_logits: torch.Tensor | None = None,
        multimask_output: bool = True,
        min_iou: float | None = None,
        prompts_per_upscaling: int | None = None,
        repeated: bool = False,
    ) -> Decoded:
        """Masks for P prompts, in pixels of the resized image as `SamProcessor` makes them.

        `image` is prepared image tokens, (1, N, C) of the image of all prompts, or (P, N, C). Prompts may be on the CPU. A prompt is `points`
        (P, k, 2) with `labels` (P, k), or a box of `boxes` (P, 4), or both, and may have the logits of an earlier mask,
        `mask_logits` (P, h, w), or be these alone. Three masks for each prompt, or one without `multimask_output`; only those with a
        predicted IoU above `min_iou`, where it is given. Logits are (4 * h, 4 * w) for embeddings of h x w.

        `prompts_per_upscaling` bounds how many prompts are at once in the part that needs the most memory. `repeated` says
        that batches of this shape come again and again, which is what repays the capture of a CUDA graph.
        """
        prompts = [tensor for tensor in (points, labels, boxes) if tensor is not None]
        num_prompts = len(prompts[0] if prompts else mask_logits)
        if len(image) not in (1, num_prompts):
            raise ValueError(f"{len(image)} images for {num_prompts} prompts: give one image, or one for each.")
        image = image.to(self.dtype)  # which another decoder may have prepared
        with_mask = mask_logits is not None
        inputs = (image, mask_logits, *prompts) if with_mask else (image, *prompts)
        if repeated and min_iou is None and num_prompts == 1:
            iou, logits = self.all_masks[multimask_output, with_mask](*inputs)
            return Decoded(iou.clone(), None, logits.to(torch.float32, copy=True))
        if not repeated and min_iou is None and self.use_head_kernel and self._have_token_kernels_for(prompts):
            inputs = (tensor.to(image.device, non_blocking=True) for tensor in inputs)
            iou, logits = self._all_masks(multimask_output, with_mask, *inputs)
            return Decoded(iou, None, logits)
        prompts = [prompt.to(image.device, non_blocking=True) for prompt in prompts]
        image = image + self._dense(mask_logits)
        transform = self.transform if repeated else self._transform
        tokens, image_tokens, iou = transform(image, *prompts)
        masks = _mask_slice(multimask_output)
        iou = iou[:, masks].float().clone()  # what a graph returned is overwritten by its next replay
        kept = places_above(iou, min_iou)
        logits = self._masks(tokens[:, 1:][:, masks], image_tokens, iou.shape, kept, masks, prompts_per_upscaling)
        return Decoded(iou, kept, logits)

    def _dense(self, mask_logits: torch.Tensor | None) -> torch.Tensor:
        """What an earlier mask's logits (P, h, w), or none, add to image tokens: (P, N, C) or (1, C)."""
        if mask_logits is None:
            return self.no_mask
        dense = self.prompt_encoder.mask_embed(mask_logits[:, None].to(self.no_mask.dtype))
        return dense.flatten(2).transpose(1, 2)

    def _all_masks(self, multimask_output: bool, with_mask: bool, image: torch.Tensor, *prompts: torch.Tensor):
        """Predicted IoU (P, M) and the logits (P * M, 4h, 4w) of all masks, without a look at what was computed."""
        masks = _mask_slice(multimask_output)
        image, prompts = image + self._dense(prompts[0] if with_mask else None), prompts[with_mask:]
        if self._have_token_kernels_for(prompts):
            iou, hyper, image_tokens = self.token_kernels(image, prompts, masks)
        else:
            tokens, image_tokens, iou = self._transform(image, *prompts)
            iou = iou[:, masks].float()
            hyper = self._hyper(tokens[:, 1:][:, masks], masks)
        if self.use_head_kernel:
            slots = torch.arange(iou.numel(), dtype=torch.int32, device=iou.device).view(iou.shape)
            logits = mask_head.masks_of(image_tokens, hyper, slots, iou.numel(), self.grid_size, self.head)
        else:
            logits = self._upscale(image_tokens, hyper).flatten(0, 1)
        return iou, logits

    @cached_property
    def token_kernels(self) -> TokenKernels | None:
        """Tried, and made, for the first prompts that fit: everything mode does without them."""
        if not self.use_attention_kernels:
            return None
        reason = token_kernels.why_not_triton(self.decoder, self.positions.device, self.dtype)
        self.why_not_triton["tokens"] = reason
        return None if reason else TokenKernels(self.decoder, self.embed, self.positions)

    def _have_token_kernels_for(self, prompts: Sequence[torch.Tensor]) -> bool:
        return bool(prompts) and token_kernels.fits(self.decoder, prompts) and self.token_kernels is not None

    def _transform(self, image: torch.Tensor, *prompts: torch.Tensor):
        """Tokens (P, 1 + masks, C), image tokens (P, N, C), and predicted IoU (P, masks), all masks of the decoder.

        `image` (1, N, C) or (P, N, C) has the embedding of a mask, or of none, added; it is all there is of a mask alone.
        """
        output_tokens = self.output_tokens.expand(len(prompts[0] if prompts else image), -1, -1)
        given = self.embed(*prompts) if prompts else []
        tokens = torch.cat([output_tokens, *given], dim=1).to(image.dtype)
        tokens, image_tokens = self._two_way(tokens, image)
        iou = _run_mlps(self.iou_head, tokens[None, :, 0].float())[0]
        return tokens[:, : len(self.output_tokens)], image_tokens, iou

    def _two_way(self, embedded: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two-way transformer; `embedded` (P, T, C) are tokens as they came in, and their positions."""
        transformer, tokens = self.decoder.transformer, embedded
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                tokens = _attend(layer.self_attn, tokens, tokens)
            else:
                tokens = tokens + _attend(layer.self_attn, tokens + embedded, tokens)
            tokens = layer.layer_norm1(tokens)
            tokens = tokens + self._tokens_to_image(layer.cross_attn_token_to_image, tokens + embedded, image)
            tokens = layer.layer_norm2(tokens)
            tokens = layer.layer_norm3(tokens + layer.mlp(tokens))
            image = self._image_to_tokens(layer, image, tokens + embedded, tokens)
        attention = self._tokens_to_image(transformer.final_attn_token_to_image, tokens + embedded, image)
        return transformer.layer_norm_final_attn(tokens + attention), image

    def _has_kernels_for(self, num_heads: int, num_tokens: int) -> bool:
        return self.use_attention_kernels and image_attention.fits(num_heads, num_tokens)

    def _tokens_to_image(self, attention: SamAttention, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Cross attention of tokens (P, T, C) to image tokens (1, N, C) or (P, N, C) with positions, values without."""
        heads, (num_prompts, num_tokens, _) = attention.num_attention_heads, tokens.shape
        query = _heads(attention.q_proj(tokens), heads) * attention.scaling  # (P, T, H, D)
        use_kernels = self._has_kernels_for(heads, num_tokens)
        if len(image) == 1 and not use_kernels:  # shared: project it once
            key = _heads(attention.k_proj(image[0] + self.positions), heads)  # (N, H, D)
            value = _heads(attention.v_proj(image[0]), heads)
            scores = query.permute(2, 0, 1, 3).flatten(1, 2) @ key.permute(1, 2, 0)  # (H, P * T, N)
            output = scores.softmax(dim=-1) @ value.transpose(0, 1)  # (H, P * T, D)
            output = output.view(heads, num_prompts, num_tokens, -1).permute(1, 2, 0, 3)
        else:
            # The key's bias adds the same to all scores of a token, and softmax does not see it.
            query = _to_image_side(query, attention.k_proj.weight)  # (P, H * T, C)
            see = image_attention.seen if use_kernels else image_attention.seen_reference
            seen = see(query, image, self.positions).view(num_prompts, heads, num_tokens, -1)  # (P, H, T, C)
            weight = attention.v_proj.weight.view(heads, -1, seen.shape[-1])  # (H, D, C)
            output = (seen @ weight.transpose(1, 2)).transpose(1, 2)  # (P, T, H, D)
            output = output + attention.v_proj.bias.view(heads, -1)  # probabilities sum to 1
        return attention.out_proj(output.flatten(2))

    def _image_to_tokens(
        self, layer: SamTwoWayAttentionBlock, image: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """The image tokens (P, N, C) after their attention to the tokens, and its layer norm."""
        attention, norm = layer.cross_attn_image_to_token, layer.layer_norm4
        heads, (num_prompts, num_tokens, _) = attention.num_attention_heads, keys.shape
        use_kernels = self._has_kernels_for(heads, num_tokens)
        key = _heads(attention.k_proj(keys), heads) * attention.scaling  # (P, T, H, D)
        value = _to_image_side(_heads(attention.v_proj(values), heads), attention.out_proj.weight.T)  # (P, H * T, C)
        # Each of the heads' probabilities sums to 1, so together they add the bias once.
        value = value + attention.out_proj.bias / heads
        if len(image) == 1 and not use_kernels:
            query = _heads(attention.q_proj(image[0] + self.positions), heads)  # (N, H, D)
            scores = key.permute(2, 0, 1, 3).flatten(1, 2) @ query.permute(1, 2, 0)  # (H, P * T, N)
            scores = scores.view(heads, num_prompts, num_tokens, -1).transpose(0, 1)
            probabilities = scores.softmax(dim=2).reshape(num_prompts, heads * num_tokens, -1)  # of the tokens
            return add_layer_norm(probabilities.transpose(1, 2) @ value, norm, residual=image)
        # The query's bias, in contrast, adds to each token's score what that token's key makes of it.
        bias = (key * attention.q_proj.bias.view(heads, -1)).sum(dim=-1).transpose(1, 2).flatten(1)  # (P, H * T)
        key = _to_image_side(key, attention.q_proj.weight)
        update = image_attention.update if use_kernels else image_attention.update_reference
        return update(image, self.positions, key, bias, value, norm, heads)

    def _masks(self, tokens, image_tokens, shape, kept, masks: slice, prompts_at_once: int | None) -> torch.Tensor:
        """Logits (K, 4h, 4w) of the masks `kept` (K,), places in the `shape` (P, M) of all."""
        height, width = (4 * size for size in self.grid_size)
        num_masks = shape[1]
        if self.use_head_kernel:
            slots = torch.full(shape, -1, dtype=torch.int32, device=kept.device)
            slots.view(-1)[kept] = torch.arange(len(kept), dtype=torch.int32, device=kept.device)
            hyper = self._hyper(tokens, masks)
            return mask_head.masks_of(image_tokens, hyper, slots, len(kept), self.grid_size, self.head)
        if len(kept) == shape.numel():
            prompts, tokens_kept = None, tokens
        else:
            prompts, places = torch.unique_consecutive(kept // num_masks, return_inverse=True)
            tokens_kept = tokens[prompts]
            kept = places * num_masks + kept % num_masks
        logits = tokens.new_empty(len(tokens_kept), num_masks, height, width)
        hyper = self._hyper(tokens_kept, masks)  # (P', M, C / 8)
        for start in range(0, len(hyper), prompts_at_once or len(hyper) or 1):
            part = slice(start, start + (prompts_at_once or len(hyper)))
            image_part = image_tokens[part] if prompts is None else image_tokens[prompts[part]]
            logits[part] = self._upscale(image_part, hyper[part])
        logits = logits.flatten(0, 1)
        return logits if prompts is None else logits[kept]

    def _hyper(self, tokens: torch.Tensor, masks: slice) -> torch.Tensor:
        """The hypernetworks' MLPs, one for each mask token, side by side: (P, M, C) -> (P, M, C / 8)."""
        layers = [(weight[masks], bias[masks]) for weight, bias in self.hypernetworks]
        return _run_mlps(layers, tokens.transpose(0, 1).float()).transpose(0, 1)

    def _upscale(self, image_tokens: torch.Tensor, hyper: torch.Tensor) -> torch.Tensor:
        """(P, N, C) and (P, M, C / 8) -> logits (P, M, 4h, 4w)."""
        return mask_head.run_head(image_tokens, hyper, self.grid_size, self.head)


def _mask_slice(multimask_output: bool) -> slice:
    return slice(1, None) if multimask_output else slice(0, 1)


def places_above(iou: torch.Tensor, min_iou: float | None) -> torch.Tensor:
    if min_iou is None:
        return torch.arange(iou.numel(), device=iou.device)
    return (iou.flatten() > min_iou).nonzero().squeeze(1)


def _image_positions(model: PreTrainedModel) -> torch.Tensor:
    """Where each of the image tokens is, float32 (N, C)."""
    embedding, size = model.shared_image_embedding, model.config.prompt_encoder_config.image_embedding_size
    line = (torch.arange(size, device=model.device) + 0.5) / size
    y, x = torch.meshgrid(line, line, indexing="ij")
    positions = copy.deepcopy(embedding).float()(torch.stack([x, y], dim=-1)[None])
    return positions.flatten(0, 2)


def _attend(attention: SamAttention, tokens: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The module's self-attention of (P, T, C), which it takes as one image's."""
    return attention(query=tokens[None], key=tokens[None], value=values[None])[0][0]


def _heads(projected: torch.Tensor, heads: int) -> torch.Tensor:
    return projected.unflatten(-1, (heads, -1))


def _to_image_side(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each head of the tokens (P, T, H, D) times its rows of `weight` (H * D, C): (P, H * T, C)."""
    num_prompts, num_tokens, heads, head_dim = tokens.shape
    weight = weight.reshape(heads, head_dim, -1)
    # (P, T, H, D) -> (H, P * T, D) -> (H, P * T, C) -> (P, H * T, C)
    product = tokens.permute(2, 0, 1, 3).reshape(heads, num_prompts * num_tokens, head_dim) @ weight
    return product.view(heads, num_prompts, num_tokens, -1).transpose(0, 1).reshape(num_prompts, heads * num_tokens, -1)


def _as_linear(convolution: nn.ConvTranspose2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (2 * 2 * out, in) and bias of a transposed convolution whose 2 x 2 kernel is its stride."""
    assert convolution.kernel_size == convolution.stride == (2, 2)
    weight = convolution.weight.permute(2, 3, 1, 0)  # (in, out, 2, 2) -> (2, 2, out, in)
    return weight.reshape(-1, weight.shape[-1]).contiguous(), convolution.bias.repeat(4)


def _run_mlps(layers: list[tuple[torch.Tensor, torch.Tensor]], hidden: torch.Tensor) -> torch.Tensor:
    """M MLPs of `stack_layers`, each on its own (M, P, in): (M, P, out), with ReLU between layers."""
    for index, (weight, bias) in enumerate(layers):
        hidden = torch.baddbmm(bias, hidden if index == 0 else hidden.relu(), weight)
    return hidden
