"""How much is done at once, so that it fits into the memory of a device."""

import math
from numbers import Integral

import torch
from transformers import PreTrainedModel


DEFAULT_MEMORY_MB = 1500

_MAX_POINTS_PER_BATCH = 64
_CPU_POINTS_PER_BATCH = 8  # more leave the caches
_WORKSPACES = 128 * 2**20  # of cuBLAS, its light sister and cuDNN


class MemoryBudget:
    """How much of each step of everything mode fits into `max_memory_mb` at once, by arithmetic; see `MaskGenerator`."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_memory_mb: float,
        points_per_batch: int | None = None,
        decoder_dtype: torch.dtype | None = None,
    ):
        if points_per_batch is not None and (not isinstance(points_per_batch, Integral) or points_per_batch < 1):
            raise ValueError(f"points_per_batch={points_per_batch!r} must be a positive integer.")
        if not max_memory_mb > 0:
            raise ValueError(f"max_memory_mb={max_memory_mb!r} must be a positive number.")
        config, item_size = model.config, (decoder_dtype or model.dtype).itemsize
        num_tokens = config.prompt_encoder_config.image_embedding_size**2
        decoder = config.mask_decoder_config
        tokens = num_tokens * decoder.hidden_size * item_size  # image tokens of one prompt
        scores = (
            num_tokens * 7 * decoder.num_attention_heads * item_size
        )  # of one prompt's tokens, 5 and 2 of the point
        masks = 3 * 16 * num_tokens * 4  # logits of one point's masks, float32
        per_point = 4 * tokens + 3 * scores + 2 * masks
        per_upscaling = 8 * tokens
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        fixed = 2 * weights + _WORKSPACES
        free = max_memory_mb * 2**20 - fixed
        least = 2 * (per_point + per_upscaling)
        if model.device.type != "cpu" and free < least:
            raise ValueError(
                f"max_memory_mb={max_memory_mb:g} is too small: this model in {model.dtype} needs at least "
                f"{math.ceil((fixed + least) / 2**20)}."
            )
        free = max(free, least)
        most = _CPU_POINTS_PER_BATCH if model.device.type == "cpu" else _MAX_POINTS_PER_BATCH
        # Shares of what is free: they are in use at the same time, but for the encoder's.
        self.points_per_batch = points_per_batch or _between(1, 0.55 * free / per_point, most)
        self.points_per_upscaling = _between(1, 0.15 * free / per_upscaling, most)
        self.pictures_per_encoding = 1 if model.device.type == "cpu" else _between(1, 0.25 * free / (25 * tokens), 4)
        self.waiting_bytes = 0.15 * free  # logits of masks whose outlines are not known yet
        self._for_masks = 0.15 * free
        self._input_pixels = config.vision_config.image_size**2

    def masks_per_step(self, size: tuple[int, int], crop_size: tuple[int, int]) -> int:
        """Masks at the picture's size: logits as the model's input and as the crop, float32, and six times as bool."""
        pixels, crop_pixels = math.prod(size), math.prod(crop_size)
        return _between(1, self._for_masks / (4 * self._input_pixels + 4 * crop_pixels + 6 * pixels), 2**30 // pixels)


def _between(low: int, value: float, high: int) -> int:
    return max(low, min(int(value), high))
