"""The teacher's side of feature distillation: what the student's features are compared with."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from ..loading import weights_fingerprint
from ..utils.autocast import without_autocast
from .stages import encode


PIXEL_MEAN = (123.675, 116.28, 103.53)  # of ImageNet, in the units of a byte: SAM's
PIXEL_STD = (58.395, 57.12, 57.375)


def normalize_pixels(pixel_values: torch.Tensor, reshaped_input_sizes: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, S, S) and the (height, width) that the image fills (B, 2) -> float32, 0 in the padding.

    The same as SamImageProcessor, on the device: a byte a channel travels there, and not a float.
    """
    mean, std = _pixel_statistics(pixel_values.device)
    rows, columns = (torch.arange(size, device=pixel_values.device) for size in pixel_values.shape[-2:])
    heights, widths = reshaped_input_sizes.to(pixel_values.device).unbind(1)
    inside = (rows < heights[:, None])[:, None, :, None] & (columns < widths[:, None])[:, None, None, :]
    return (pixel_values - mean) / std * inside


@cache
def _pixel_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, (1, 3, 1, 1) each. Once a device: each copy from the CPU waits for all that the GPU has to do."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))


class Teacher:
    """A frozen SAM whose features the student learns.

    Args:
        model: a SamModel, a SamLighteningModel, or another whose `vision_encoder` has SAM's parts.
        layers: indexes of the layers whose outputs are targets, in order.
        dtype: of its weights and activations.
        compile: whether `torch.compile` makes it faster; it takes a minute or two at first.

    Raises:
        ValueError: for a model that has no such encoder, or has NaN or infinite weights.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], dtype: torch.dtype = torch.bfloat16, compile: bool = False
    ):
        encoder = getattr(model, "vision_encoder", None)
        missing = [name for name in ("patch_embed", "pos_embed", "layers", "neck") if not hasattr(encoder, name)]
        if missing:
            raise ValueError(
                f"a teacher of type {type(model).__name__} cannot be used: its image encoder has no {', '.join(missing)}. "
                "Use a SAM whose encoder is a ViT, such as facebook/sam-vit-huge, or a SAM-Lightening."
            )
        for name, tensor in encoder.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"the teacher has NaN or infinite values in vision_encoder.{name}. Use another checkpoint."
                )
        self.config = model.config.vision_config
        self.fingerprint = weights_fingerprint(model)
        self.layers, self.dtype = tuple(layers), dtype
        self.encoder = encoder.to(dtype).eval().requires_grad_(False)
        self._encode = torch.compile(encode) if compile else encode

    @property
    def names(self) -> list[str]:
        """Of the targets, in order."""
        return [*(f"layer_{index}" for index in self.layers), "embedding"]

    @without_autocast  # which would cast a copy of what is in the right dtype already
    def targets(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Normalized pixels (B, 3, S, S) -> LayerNorm of each layer's output (B, h, w, C), then the embeddings (B, 256, h, w).

        The LayerNorm has no weights: it makes layers of very different magnitude weigh the same. The embeddings stay as they
        are, because the mask decoder reads them.
        """
        with torch.inference_mode():
            states, embeddings = self._encode(self.encoder, pixel_values.to(self.dtype), self.layers)
        with torch.no_grad():  # new tensors, which autograd may keep: those of inference mode it may not
            return [*(F.layer_norm(state, state.shape[-1:]) for state in states), embeddings.clone()]
