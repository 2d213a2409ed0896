"""How much is done at once, so that it fits into the memory of a device."""

import math
from numbers import Integral

from transformers import PreTrainedModel


DEFAULT_MEMORY_MB = 1500

_MAX_POINTS_PER_BATCH = 192
_CPU_POINTS_PER_BATCH = 8  # more leave the caches
_WORKSPACES = 128 * 2**20  # of cuBLAS, its light sister and cuDNN


class MemoryBudget:
    """How much of each step of everything mode fits into `max_memory_mb` at once, by arithmetic; see `MaskGenerator`.

    `decoder` is what decodes, by default as the model does without kernels; `use_triton` says that layer norms and masks at the
    image's size are kernels'.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_memory_mb: float,
        points_per_batch: int | None = None,
        decoder=None,
        use_triton: bool = False,
    ):
        if points_per_batch is not None and (not isinstance(points_per_batch, Integral) or points_per_batch < 1):
            raise ValueError(f"points_per_batch={points_per_batch!r} must be a positive integer.")
        if not max_memory_mb > 0:
            raise ValueError(f"max_memory_mb={max_memory_mb!r} must be a positive number.")
        config, item_size = model.config, (decoder or model).dtype.itemsize
        num_tokens = config.prompt_encoder_config.image_embedding_size**2
        decoder_config = config.mask_decoder_config
        tokens = num_tokens * decoder_config.hidden_size * item_size  # image tokens of one prompt
        # Of one prompt's tokens: 5, and 2 of the point.
        scores = 7 * decoder_config.num_attention_heads * num_tokens * item_size
        masks = 3 * 16 * num_tokens * 4  # logits of one point's masks, float32
        # With the shares of what is free for points, their upscaling and waiting logits: these are in use at the same time.
        # Left is what outlines need: at most 64 MB with kernels, `masks_per_step` without.
        if decoder is not None and decoder.is_lean:  # upscaling takes nothing
            per_point, shares = 2.25 * tokens + 3 * masks, (0.85, 0.0, 0.1)
        elif use_triton:
            per_point, shares = 3.25 * tokens + 3 * scores + 2 * masks, (0.7, 0.15, 0.1)
        else:
            per_point, shares = 4 * tokens + 3 * scores + 2 * masks, (0.55, 0.15, 0.15)
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
        for_points, for_upscaling, for_waiting = (share * free for share in shares)
        self.points_per_batch = points_per_batch or _between(1, for_points / per_point, most)
        self.points_per_upscaling = _between(1, for_upscaling / per_upscaling, most)
        self.images_per_encoding = 1 if model.device.type == "cpu" else _between(1, 0.25 * free / (25 * tokens), 4)
        self.waiting_bytes = for_waiting  # logits of masks whose outlines are not known yet
        self._for_masks = 0.15 * free
        self._input_pixels = config.vision_config.image_size**2

    def masks_per_step(self, size: tuple[int, int], crop_size: tuple[int, int]) -> int:
        """Masks at the image's size: logits as the model's input and as the crop, float32, and six times as bool."""
        pixels, crop_pixels = math.prod(size), math.prod(crop_size)
        return _between(1, self._for_masks / (4 * self._input_pixels + 4 * crop_pixels + 6 * pixels), 2**30 // pixels)


def _between(low: int, value: float, high: int) -> int:
    return max(low, min(int(value), high))
