"""The image encoder for inference: SAM-Lightening's in fewer kernels, with the same results up to rounding.

A layer takes five kernels: LayerNorm and projection to queries, keys and values; attention
(kernels/hopper/attention.py, or as in the model); projection and residual; LayerNorm, linear layer and GELU; linear
layer and residual (kernels/linear.py). All tensors have the layout (B * N, channels), tokens in raster order. The
features of the projection are ordered (head, q/k/v, head dimension). In this order every group of dilated attention is
a view, so dilation copies nothing.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, SamImageProcessor

from ..images.preprocessing import preprocess, skipped_step
from ..kernels import linear as fused_linear
from ..kernels.hopper import attention as hopper_attention
from ..kernels.linear import FusedLinear, RowsWithStatistics, convolve, embed_patches
from ..modeling.dilated_attention import dilated_attention
from ..modeling.modeling_sam_lightening import SamLighteningVisionEncoder, SamLighteningVisionLayer
from ..utils.autocast import without_autocast
from ..utils.packing import packed
from ..utils.turns import takes_turns
from .cuda_graphs import GraphedFunction, GraphMemory, parts_of
from .padding import SkippingEncoder, why_not_skip_padding
from .plain_decoder import Decoder, PlainMaskDecoder
from .plain_modules import same_bits, warn_of_plain_part, weights_of, why_not_plain_encoder


# Images of a graph. Larger batches are replayed in parts: a graph keeps the memory of all its images, and more at once
# are hardly faster.
MOST_IMAGES = 16


def why_not_fast_encoder(model: PreTrainedModel) -> str | None:
    """Return why `FastVisionEncoder` is no fast path for the image encoder of this model, as a sentence, or None."""
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
        return (
            f"{tokens} tokens, {patch}, {width}, {config.mlp_dim} and {config.output_channels} features are no "
            "multiples of 128 and 64."
        )
    return why_not_kernels(model)


def why_not_kernels(model: PreTrainedModel) -> str | None:
    """Return why the kernels of `FastVisionEncoder` do not run, for a model that passes all other checks of it."""
    return fused_linear.why_not_at_all(model.device, model.dtype)


class FastVisionEncoder:
    """A fused copy of SAM-Lightening's image encoder for inference.

    Maps pixel values (B, 3, S, S) to embeddings (B, C, S / 16, S / 16), which are channels_last in memory, the layout
    that the mask decoder reads. The weights are copied: later changes of the encoder have no effect. It runs on any
    device and dtype if `why_not_plain_encoder` returns None, and is fast where `why_not_fast_encoder` returns None.
    """

    @without_autocast
    @torch.no_grad()
    def __init__(self, encoder: SamLighteningVisionEncoder):
        self.config = encoder.config
        projection, neck = encoder.patch_embed.projection, encoder.neck
        self.patch_size = projection.kernel_size[0]
        self.patch_embedding = FusedLinear(projection.weight.flatten(1), projection.bias)
        self.positions = None if encoder.pos_embed is None else encoder.pos_embed.flatten(0, 2)
        self.layers = [_Layer(layer) for layer in encoder.layers]
        self.largest_width = max(len(linear.weight) for layer in self.layers for linear in (layer.qkv, layer.lin1))
        self.reduce = FusedLinear(neck.conv1.weight.flatten(1), None, norm_after=neck.layer_norm1)
        kernel = neck.conv2.weight.permute(0, 2, 3, 1).flatten(1)
        self.convolution = FusedLinear(kernel, None, norm_after=neck.layer_norm2)
        self._copy_weights()

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        """Return whether a copy of the model made now would compute the same."""
        return why_not_plain_encoder(model) is None and same_bits(
            self._weights(), FastVisionEncoder(model.vision_encoder)._weights()
        )

    def _copy_weights(self):
        """Copy all weights, some of which are the encoder's own, into one memory."""
        copies = iter(packed(self._weights()))
        self.positions = None if self.positions is None else next(copies)
        for linear in self._linears():
            linear.replace(copies)

    def _linears(self) -> list[FusedLinear]:
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.proj, layer.lin1, layer.lin2)]
        return [*linears, self.patch_embedding, self.reduce, self.convolution]

    def _weights(self) -> list[torch.Tensor]:
        positions = [] if self.positions is None else [self.positions]
        return [*positions, *(tensor for linear in self._linears() for tensor in linear.tensors())]

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        batch_size, _, height, width = pixel_values.shape
        grid = height // self.patch_size, width // self.patch_size
        new, num_rows = self.convolution.weight.new_empty, batch_size * grid[0] * grid[1]
        sizes = self.config.hidden_size * num_rows, self.largest_width * num_rows
        new(sum(sizes))  # allocated and freed at once, so that both find room in one segment of torch's allocator
        # The two large intermediate results of a layer share memory: the first is not needed when the second is
        # written.
        rows_memory, memory = map(new, sizes)
        rows = embed_patches(self.patch_embedding, pixel_values, self.positions, memory=rows_memory)
        del rows_memory
        for layer in self.layers:
            rows = layer.feed_forward(layer.attend(rows, batch_size, memory), memory)
        del memory  # the neck has room in it
        tokens = self.reduce(rows).values.unflatten(0, (batch_size, -1))
        del rows  # the result, which a graph keeps, has room in it, and leaves the larger memory whole to other graphs
        tokens = convolve(self.convolution, tokens, grid)
        return tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, N, C) -> (B, C, h, w), channels last


class _Layer:
    def __init__(self, layer: SamLighteningVisionLayer):
        attention, mlp = layer.attn, layer.mlp
        self.num_heads = attention.num_attention_heads
        self.pattern = attention.segment_length, attention.dilation_rate, attention.dilation_offsets
        self.head_dim = attention.qkv.out_features // (3 * self.num_heads)
        # (q/k/v, head, D) -> (head, q/k/v, D)
        order = torch.arange(attention.qkv.out_features, device=attention.qkv.weight.device)
        order = order.view(3, self.num_heads, self.head_dim).transpose(0, 1).flatten()
        # Queries contain the scale of the scores, for a softmax of powers of two.
        factors = torch.ones(len(order), dtype=torch.float32, device=order.device)
        factors[: len(order) // 3] = attention.scale / math.log(2)
        self.qkv = FusedLinear(
            attention.qkv.weight, attention.qkv.bias, layer.layer_norm1, order=order, factors=factors
        )
        self.proj = FusedLinear(attention.proj.weight, attention.proj.bias)
        self.lin1 = FusedLinear(mlp.lin1.weight, mlp.lin1.bias, layer.layer_norm2, gelu=True)
        self.lin2 = FusedLinear(mlp.lin2.weight, mlp.lin2.bias)

    def attend(self, rows: RowsWithStatistics, batch_size: int, memory: torch.Tensor) -> RowsWithStatistics:
        """Apply the attention. `memory` is for queries, keys, values and their result; `rows` may be overwritten."""
        qkv = self.qkv(rows, memory=memory).values.view(batch_size, -1, self.num_heads, 3, self.head_dim)
        if hopper_attention.why_not(qkv, *self.pattern) is None:
            # Behind queries, keys and values there is room, since an MLP has more features than these.
            room = memory[qkv.numel() :][: qkv.numel() // 3]
            attended = hopper_attention.launch_attention(
                qkv, *self.pattern, out=room if 3 * room.numel() == qkv.numel() else None
            )
        else:
            # exp(log(2) x) is the power of two.
            attended = dilated_attention(*qkv.unbind(3), *self.pattern, scaling=math.log(2))
        return _add_to(rows, self.proj, RowsWithStatistics(attended.reshape(rows.values.shape)))

    def feed_forward(self, rows: RowsWithStatistics, memory: torch.Tensor) -> RowsWithStatistics:
        """Apply the MLP. `memory` is for its hidden features, and `rows` may be overwritten."""
        return _add_to(rows, self.lin2, self.lin1(rows, memory=memory))


def _add_to(rows: RowsWithStatistics, layer: FusedLinear, x: RowsWithStatistics) -> RowsWithStatistics:
    """Return layer(x) + rows with statistics, in the memory of `rows` if a kernel computes it."""
    return layer(x, rows.values, statistics=True, memory=rows.values.view(-1))


class CopiedEncoder:
    """A copy of SAM-Lightening's image encoder that runs its modules, with the interface of `FastVisionEncoder`."""

    def __init__(self, model: PreTrainedModel):
        self.encoder = copy.deepcopy(model.vision_encoder)

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        """Return whether the model's encoder still has the copied weights, and nothing else in it."""
        own, copies = weights_of(model.vision_encoder), weights_of(self.encoder)
        return why_not_plain_encoder(model) is None and same_bits(own, copies)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values)[0]


def copy_encoder(model: PreTrainedModel) -> FastVisionEncoder | CopiedEncoder | None:
    """Make the fastest copy of a model's image encoder, or return None if only the model itself can run it."""
    if why_not_fast_encoder(model) is None:
        return FastVisionEncoder(model.vision_encoder)
    if model.config.model_type != "sam_lightening":  # another encoder, which may be large
        return None
    if reason := why_not_plain_encoder(model):
        warn_of_plain_part("image encoder", reason, model)
        return None
    # The encoder of an optimized model never changes, and needs no copy.
    return None if hasattr(model.vision_encoder, "plain_embeddings") else CopiedEncoder(model)


def make_encoder(
    model: PreTrainedModel, cuda_graphs: bool, memory: GraphMemory | None = None, skip_padding: bool = False
) -> tuple[GraphedFunction, FastVisionEncoder | CopiedEncoder | SkippingEncoder | None]:
    """Make the fastest image encoder that can run this model.

    Args:
        model: Any model with `get_image_embeddings`.
        cuda_graphs: Replay it from CUDA graphs, if it is SAM-Lightening's own encoder.
        memory: The memory of the graphs.
        skip_padding: Compute only the rows of patches that hold image, see `engine.padding`.

    Returns:
        The function from pixel values (B, 3, S, S) to embeddings, and the copy of the encoder that it runs, if any.

    Raises:
        ValueError: For `skip_padding` where it is not possible.
    """
    if skip_padding:
        return _skipping_encoder(model)
    copied = copy_encoder(model)
    # Other encoders may copy from the CPU while they run, and hooks and adapters run Python: no graph can record that.
    is_own = copied is not None or (
        model.config.model_type == "sam_lightening" and why_not_plain_encoder(model) is None
    )
    graphed = GraphedFunction(
        copied or _plain_encoder(model),
        cuda_graphs and is_own,
        memory=memory,
        has_kernels=isinstance(copied, FastVisionEncoder),
    )
    return graphed, copied


def _skipping_encoder(model: PreTrainedModel) -> tuple[GraphedFunction, SkippingEncoder | None]:
    reason = why_not_skip_padding(model)
    if reason is None and why_not_fast_encoder(model) is None:
        reason = "the fused encoder, which runs this model on a CUDA device, computes all rows, and is faster."
    if reason:
        raise ValueError(f"skip_padding=True is not possible: {reason}")
    if hasattr(model.vision_encoder, "plain_embeddings"):  # of an optimized model, which never changes
        return GraphedFunction(SkippingEncoder(model.vision_encoder, _plain_encoder(model)), False), None
    copied = CopiedEncoder(model)
    skipping = SkippingEncoder(copied.encoder, copied)
    return GraphedFunction(skipping, False), skipping  # no graph: the number of rows depends on the image


def _plain_encoder(model: PreTrainedModel) -> Callable:
    """Return the model's own function to embeddings, which an optimized model keeps beside its fast one."""
    return getattr(model.vision_encoder, "plain_embeddings", model.get_image_embeddings)


class ImageEncoder:
    """The image side of a predictor: images to embeddings that a mask decoder has prepared. Threads may share it.

    Args:
        model: The model.
        image_processor: Its image processor.
        decoder: The decoder that will read the embeddings.
        skip_padding: See `make_encoder`.

    Raises:
        ValueError: If the image processor is something else, does not resize or pad, and see `make_encoder`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: SamImageProcessor,
        decoder: Decoder,
        skip_padding: bool = False,
    ):
        if not all(hasattr(image_processor, name) for name in ("size", "pad_size", "image_mean")):
            raise ValueError(
                f"image_processor is a {type(image_processor).__name__}, and must be the model's SamImageProcessor, or "
                "the processor that holds it."
            )
        if step := skipped_step(image_processor):
            raise ValueError(f"the image processor's {step} must be true: prompts and masks follow from it.")
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.image_processor, self.decoder = image_processor, decoder
        self.encode, self.copied = make_encoder(model, decoder.cuda_graphs, decoder.graph_memory, skip_padding)

    @without_autocast
    def check_weights(self, also_copies: bool = False):
        """Raise ValueError if a part runs in the model itself, and that is in training mode, or a copied part or the
        mask decoder is not as in the model any more.

        Args:
            also_copies: Look at copies alone, too, and not at the mode.
        """
        if self.copied is not None and not isinstance(self.decoder, PlainMaskDecoder) and not also_copies:
            return  # both parts are copies, which do not change
        model = self.model
        if not also_copies and any(part.training for part in (model, model.vision_encoder, model.mask_decoder)):
            raise ValueError("the model is in training mode, and a part of it runs as it is: call model.eval() first.")
        parts = [part for part in (self.copied, self.decoder) if part is not None]
        if not all(part.is_copy_of(self.model) for part in parts):
            raise ValueError(
                "the model has changed since its weights were read: make a new Predictor, MaskGenerator or pipeline."
            )

    @takes_turns  # from the writing of pixel values to the copying of embeddings
    @torch.inference_mode()
    def __call__(self, images: Sequence[torch.Tensor]) -> list[Any]:
        """Encode images, each uint8 (3, H, W): return what `decoder.prepare` makes of each one's embedding."""
        self.check_weights()
        prepared: list[Any] = [None] * len(images)
        for part in parts_of(len(images), MOST_IMAGES if self.encode.enabled else max(1, len(images))):
            prepared[part] = self._encode(images[part])
        return prepared

    def _encode(self, images: Sequence[torch.Tensor]) -> list[Any]:
        pixel_values = preprocess(self.image_processor, images, self.device, self.dtype, self.encode.empty)
        embeddings = self.encode(pixel_values)
        if isinstance(embeddings, tuple):  # SAM-HQ
            assert isinstance(self.decoder, PlainMaskDecoder)
            final, between = embeddings
            return [
                self.decoder.prepare((final[i : i + 1], [tensor[i : i + 1] for tensor in between]))
                for i in range(len(images))
            ]
        return list(self.decoder.prepare(embeddings).split(1))
