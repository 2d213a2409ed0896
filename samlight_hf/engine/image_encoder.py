"""SAM-Lightening's image encoder in fewer kernels: the same results, up to rounding.

A layer of five kernels: LayerNorm and projection to queries, keys and values; attention (kernels/hopper/attention.py, or as in
the model); projection and residual; LayerNorm, linear layer and GELU; linear layer and residual (kernels/linear.py). All in
the layout (B * N, channels), tokens in raster order. The projection's features are in the order (head, q/k/v, head
dimension), in which every dilated group is a view, so that dilation copies nothing.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ..kernels import linear as fused_linear
from ..kernels.hopper import attention as hopper_attention
from ..kernels.layer_norm import add_layer_norm
from ..kernels.linear import FusedLinear, RowsWithStatistics, convolve, embed_patches
from ..modeling.dilated_attention import dilated_attention
from ..utils.autocast import without_autocast
from .plain_modules import same_bits, why_not_plain_encoder


def why_not_fast_encoder(model: PreTrainedModel) -> str | None:
    """Why `FastVisionEncoder` cannot run this model's image encoder as it is: a sentence, or None where it can."""
    config = model.config.vision_config
    if model.config.model_type != "sam_lightening":
        return f"model_type={model.config.model_type!r} has another image encoder."
    if reason := why_not_plain_encoder(model):
        return reason
    if model.device.type != "cuda" or model.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs half precision on a CUDA device, and this model is {model.dtype} on {model.device}."
    if config.hidden_act != "gelu":
        return f"hidden_act={config.hidden_act!r}, and it has GELU alone."
    tokens, width = (config.image_size // config.patch_size) ** 2, config.hidden_size
    patch = config.num_channels * config.patch_size**2
    if tokens % 128 or any(features % 64 for features in (patch, width, config.mlp_dim, config.output_channels)):
        return f"{tokens} tokens, {patch}, {width}, {config.mlp_dim} and {config.output_channels} features are no multiples of 128 and 64."
    return fused_linear.why_not_at_all(model.device, model.dtype)


class FastVisionEncoder:
    """A SAM-Lightening image encoder for inference: pixel values (B, 3, S, S) to embeddings (B, C, S / 16, S / 16).

    The embeddings are channels_last in memory, which is how the mask decoder reads them. The encoder's weights are copied when
    this is made, and later changes of them do not reach it. Runs on any device and dtype, for an encoder whose `why_not_plain_encoder`
    is None; it is fast where `why_not_fast_encoder` is None.
    """

    @without_autocast
    @torch.no_grad()
    def __init__(self, encoder: nn.Module):
        self.config = encoder.config
        # Its own copies, of which what is folded below is given back at the end.
        projection, neck = copy.deepcopy((encoder.patch_embed.projection, encoder.neck))
        self.patch_size = projection.kernel_size[0]
        self.patch_embedding = FusedLinear(projection.weight.flatten(1), projection.bias)
        self.positions = None if encoder.pos_embed is None else encoder.pos_embed.flatten(0, 2).clone()
        self.layers = [_Layer(copy.deepcopy(layer)) for layer in encoder.layers]
        self.largest_width = max(len(linear.weight) for layer in self.layers for linear in (layer.qkv, layer.lin1))
        self.reduce = FusedLinear(neck.conv1.weight.flatten(1), None)
        self.convolution = FusedLinear(neck.conv2.weight.permute(0, 2, 3, 1).flatten(1), None)
        self.norms = neck.layer_norm1, neck.layer_norm2

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        """Whether another one, made of the model now, would compute the same."""
        return why_not_plain_encoder(model) is None and same_bits(
            self._weights(), FastVisionEncoder(model.vision_encoder)._weights()
        )

    def _weights(self) -> list[torch.Tensor]:
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.proj, layer.lin1, layer.lin2)]
        linears += [self.patch_embedding, self.reduce, self.convolution]
        tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
        tensors += [tensor for norm in self.norms for tensor in (norm.weight, norm.bias)]
        return tensors if self.positions is None else [*tensors, self.positions]

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        batch_size, _, height, width = pixel_values.shape
        grid = height // self.patch_size, width // self.patch_size
        # Of a layer's two large intermediate results the first is not needed any more when the second is made.
        memory = self.convolution.weight.new_empty(self.largest_width * batch_size * grid[0] * grid[1])
        rows = embed_patches(self.patch_embedding, pixel_values, self.positions)
        for layer in self.layers:
            rows = layer(rows, batch_size, memory)
        tokens = add_layer_norm(self.reduce(rows).values.unflatten(0, (batch_size, -1)), self.norms[0])
        tokens = add_layer_norm(convolve(self.convolution, tokens, grid), self.norms[1])
        return tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, N, C) -> (B, C, h, w), channels last


class _Layer:
    def __init__(self, layer: nn.Module):
        attention, mlp = layer.attn, layer.mlp
        self.num_heads, self.scaling = attention.num_attention_heads, attention.scale
        self.pattern = attention.segment_length, attention.dilation_rate, attention.dilation_offsets
        self.head_dim = attention.qkv.out_features // (3 * self.num_heads)
        # (q/k/v, head, D) -> (head, q/k/v, D)
        order = torch.arange(attention.qkv.out_features, device=attention.qkv.weight.device)
        order = order.view(3, self.num_heads, self.head_dim).transpose(0, 1).flatten()
        self.qkv = FusedLinear(attention.qkv.weight, attention.qkv.bias, layer.layer_norm1, order=order)
        self.proj = FusedLinear(attention.proj.weight, attention.proj.bias)
        self.lin1 = FusedLinear(mlp.lin1.weight, mlp.lin1.bias, layer.layer_norm2, gelu=True)
        self.lin2 = FusedLinear(mlp.lin2.weight, mlp.lin2.bias)

    def __call__(self, rows: RowsWithStatistics, batch_size: int, memory: torch.Tensor) -> RowsWithStatistics:
        qkv = self.qkv(rows, memory=memory).values.view(batch_size, -1, self.num_heads, 3, self.head_dim)
        if hopper_attention.why_not(qkv, *self.pattern) is None:
            attended = hopper_attention.launch_attention(qkv, *self.pattern, self.scaling)
        else:
            attended = dilated_attention(*qkv.unbind(3), *self.pattern, scaling=self.scaling)
        rows = self.proj(RowsWithStatistics(attended.reshape(rows.values.shape)), rows.values, statistics=True)
        return self.lin2(self.lin1(rows, memory=memory), rows.values, statistics=True)
