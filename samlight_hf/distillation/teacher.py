"""The teacher's side of feature distillation: the targets of the student's features."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..loading import check_finite, weights_fingerprint
from ..utils.autocast import without_autocast
from .stages import encode


PIXEL_MEAN = (123.675, 116.28, 103.53)  # of ImageNet, on the scale of bytes, as in SAM
PIXEL_STD = (58.395, 57.12, 57.375)


def normalize_pixels(pixel_values: torch.Tensor, reshaped_input_sizes: torch.Tensor) -> torch.Tensor:
    """Normalize images on the device, so that one byte a channel is transferred, not a float.

    Equal to SamImageProcessor.

    Args:
        pixel_values: uint8 (B, 3, S, S).
        reshaped_input_sizes: (B, 2), the (height, width) of the image in its frame.

    Returns:
        float32 (B, 3, S, S), 0 in the padding.
    """
    mean, std = _pixel_statistics(pixel_values.device)
    rows, columns = (torch.arange(size, device=pixel_values.device) for size in pixel_values.shape[-2:])
    heights, widths = reshaped_input_sizes.to(pixel_values.device).unbind(1)
    inside = (rows < heights[:, None])[:, None, :, None] & (columns < widths[:, None])[:, None, None, :]
    return (pixel_values - mean) / std * inside


@cache
def _pixel_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation, (1, 3, 1, 1) each.

    They are cached, because a copy from the CPU waits for all pending work of the GPU.
    """
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        return mean, std


class Teacher:
    """A frozen SAM whose features the student learns.

    Args:
        model: a SamModel, a SamLighteningModel, or another model whose `vision_encoder` has SAM's parts.
        layers: indexes of the layers whose outputs are targets, in order.
        dtype: dtype of its weights and activations.
        compile: whether `torch.compile` makes it faster; it takes a minute or two at first.

    Raises:
        ValueError: for a model that has no such encoder, or has NaN or infinite weights.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], dtype: torch.dtype = torch.bfloat16, compile: bool = False
    ):
        parts: Any = model
        encoder = getattr(parts, "vision_encoder", None)
        missing = [name for name in ("patch_embed", "pos_embed", "layers", "neck") if not hasattr(encoder, name)]
        if missing:
            raise ValueError(
                f"a teacher of type {type(model).__name__} cannot be used: its image encoder has no "
                f"{', '.join(missing)}. Use a SAM whose encoder is a ViT, such as facebook/sam-vit-huge, or a "
                "SAM-Lightening."
            )
        assert encoder is not None  # it has the parts
        check_finite(encoder.state_dict(prefix="vision_encoder."), "the teacher")
        self.config = parts.config.vision_config
        self.fingerprint = weights_fingerprint(model)
        self.layers, self.dtype = tuple(layers), dtype
        self.encoder = encoder.to(dtype).eval().requires_grad_(False)
        self._encode = torch.compile(encode) if compile else encode

    @property
    def names(self) -> list[str]:
        """The names of the targets, in order."""
        return [*(f"layer_{index}" for index in self.layers), "embedding"]

    @without_autocast  # autocast would copy tensors that have the right dtype already
    def targets(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Compute the targets of a batch.

        The LayerNorm has no weights: it gives layers of very different magnitude the same weight in the loss. The
        embeddings are not normalized, because the mask decoder reads them.

        Args:
            pixel_values: normalized pixels (B, 3, S, S).

        Returns:
            The LayerNorm of each layer's output (B, h, w, C), then the embeddings (B, 256, h, w).
        """
        with torch.inference_mode():
            states, embeddings = self._encode(self.encoder, pixel_values.to(self.dtype), self.layers)
        with torch.no_grad():  # new tensors: autograd may not save those of inference mode
            return [*(F.layer_norm(state, state.shape[-1:]) for state in states), embeddings.clone()]
