"""The image encoder without the rows of padding: a landscape image of 1024x683 takes two thirds of the work.

SAM pads an image at the bottom to a square. Tokens of padding are keys like all others, so an encoder that leaves them
out computes something else. Here they are frozen: in every layer the tokens of the rows that hold no image are those of
a blank image, which are computed once. Only the rows that hold image are computed, and they attend to themselves and to
the frozen rows. The embedding of the padding, too, is that of a blank image.

In the model itself the padding also attends to the image and changes with it, from the second layer on. The masks are
therefore close to the model's, not equal (docs/sizes.md has the numbers), and skipping is something to ask for. The
slow sibling, which tests compare with, computes all rows and overwrites those of padding before each layer.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..modeling.dilated_attention import dense_attention, dilated_attention, merge_groups, split_groups
from ..modeling.modeling_sam_lightening import SamLighteningVisionEncoder
from .plain_modules import same_bits, weights_of, why_not_plain_encoder


def why_not_skip_padding(model: PreTrainedModel) -> str | None:
    """Return why the rows of padding of this model cannot be skipped, as a sentence, or None if they can.

    The caller asks first whether a faster encoder runs, which computes all rows.
    """
    config = model.config.vision_config
    if model.config.model_type != "sam_lightening":
        return f"model_type={model.config.model_type!r} has another image encoder."
    if reason := why_not_plain_encoder(model):
        return reason
    columns = config.image_size // config.patch_size
    for layer, pattern in enumerate(config.layer_patterns()):
        if pattern.window_size:
            return f"layer {layer} attends in windows of {pattern.window_size}x{pattern.window_size} tokens."
        if pattern.dilation_offsets != "all":
            return f"layer {layer} has dilation_offsets={pattern.dilation_offsets!r}, and it needs 'all'."
        if columns % pattern.dilation_rate:
            return f"dilation_rate={pattern.dilation_rate} of layer {layer} does not divide rows of {columns} tokens."
    return None


def rows_with_image(pixel_values: torch.Tensor, patch_size: int) -> int:
    """Return the number of rows of patches of a batch (B, 3, S, S) up to the last one that is not all zeros."""
    rows = pixel_values.unflatten(2, (-1, patch_size)).ne(0).any(dim=4).any(dim=3).any(dim=1).any(dim=0)
    filled = rows.nonzero()
    return int(filled[-1]) + 1 if len(filled) else 0


class SkippingEncoder:
    """SAM-Lightening's image encoder, which computes only the rows of patches that hold image.

    Args:
        encoder: the image encoder. It is not copied.
        plain: its function from pixel values to embeddings, for images without padding below.

    Attributes:
        last_rows: rows that the last call computed.
    """

    def __init__(self, encoder: SamLighteningVisionEncoder, plain: Callable[[torch.Tensor], torch.Tensor]):
        self.encoder, self.plain = encoder, plain
        config = encoder.config
        self.patch_size, self.grid_size = config.patch_size, config.image_size // config.patch_size
        self.last_rows: int | None = None
        self._frozen: tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor] | None = None

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        """Return whether the model's encoder still has these weights, and nothing else in it."""
        own, copies = weights_of(model.vision_encoder), weights_of(self.encoder)
        return why_not_plain_encoder(model) is None and same_bits(own, copies)

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        rows = max(1, rows_with_image(pixel_values, self.patch_size))
        if rows >= self.grid_size - 1:  # the neck needs two rows more
            self.last_rows = self.grid_size
            return self.plain(pixel_values)
        self.last_rows = rows
        keys_and_values, last_states, embedding = self._frozen_states(pixel_values)
        batch_size = len(pixel_values)
        states = self._embed(pixel_values[:, :, : rows * self.patch_size])
        for layer, frozen in zip(self.encoder.layers, keys_and_values, strict=True):
            states = self._layer(layer, states, frozen)
        below = last_states[:, rows : rows + 2].expand(batch_size, -1, -1, -1)
        # The convolution of the neck sees one row below: the last row of this output is wrong, and is not used.
        top = self.encoder.neck(torch.cat([states, below], dim=1))[:, :, : rows + 1]
        return torch.cat([top, embedding[:, :, rows + 1 :].expand(batch_size, -1, -1, -1)], dim=2)

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return patches with their positions, (B, rows, columns, C)."""
        projection, positions = self.encoder.patch_embed.projection, self.encoder.pos_embed
        states = projection(pixel_values).permute(0, 2, 3, 1)
        return states if positions is None else states + positions[:, : states.shape[1]]

    def _layer(self, layer, states: torch.Tensor, frozen: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        states = states + self._attend(layer.attn, layer.layer_norm1(states), frozen)
        return states + layer.mlp(layer.layer_norm2(states))

    def _attend(self, attention, states: torch.Tensor, frozen: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Attend from the tokens of the image to themselves and to the frozen ones of the same segment."""
        query, key, value = _project(attention, states)
        num_tokens, num_heads = query.shape[1:3]
        length, rate = attention.segment_length, attention.dilation_rate
        whole = num_tokens // length * length  # tokens of segments without padding
        outputs = []
        if whole:
            tokens = (tensor[:, :whole] for tensor in (query, key, value))
            outputs.append(dilated_attention(*tokens, length, rate, scaling=attention.scale, backend="sdpa"))
        if rest := num_tokens - whole:
            key, value = (
                torch.cat([own[:, whole:], other[:, num_tokens : whole + length].expand(len(own), -1, -1, -1)], dim=1)
                for own, other in zip((key, value), frozen)
            )
            groups = split_groups(query[:, whole:], rest, rate), split_groups(key, length, rate)
            output = dense_attention(*groups, split_groups(value, length, rate), attention.scale, backend="sdpa")
            outputs.append(merge_groups(output, rest, num_heads, rest, rate))
        return attention.proj(torch.cat(outputs, dim=1).reshape(states.shape))

    def _frozen_states(self, like: torch.Tensor):
        """Return keys and values of each layer, the last states and the embedding of a blank image."""
        if self._frozen is None:
            states = self._embed(torch.zeros_like(like[:1]))
            keys_and_values = []
            for layer in self.encoder.layers:
                _, key, value = _project(layer.attn, layer.layer_norm1(states))
                keys_and_values.append((key.contiguous(), value.contiguous()))
                states = self._layer(layer, states, keys_and_values[-1])
            self._frozen = keys_and_values, states, self.encoder.neck(states)
        return self._frozen


def _project(attention, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values, (B, N, H, D) each."""
    batch_size, height, width, _ = states.shape
    shape = batch_size, height * width, 3, attention.num_attention_heads, -1
    return attention.qkv(states).view(*shape).unbind(2)
