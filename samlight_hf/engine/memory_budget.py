"""Batch sizes that fit into a given amount of device memory."""

import math
from numbers import Integral

from transformers import PreTrainedModel


DEFAULT_MEMORY_MB = 1500

_MAX_POINTS_PER_BATCH = 192
_CPU_POINTS_PER_BATCH = 4  # with more, image tokens do not fit into the caches, and are in new memory each time
_WORKSPACES = 128 * 2**20  # bytes of cuBLAS, cuBLASLt and cuDNN


class MemoryBudget:
    """The batch size of each step of everything mode for a given amount of memory, by arithmetic.

    Args:
        model: The model, with its weights on the device.
        max_memory_mb: The memory to stay within, weights included, in MB of 2**20 bytes.
        points_per_batch: The number of points decoded at once. Default: as many as fit.
        decoder: The decoder that will run. Default: the model's own, without kernels.
        use_triton: Triton kernels compute layer norms and the masks at the image's size.

    Attributes:
        points_per_batch: Points decoded at once.
        points_per_upscaling: Points whose masks are upscaled at once, the step that needs the most memory for each
            point.
        images_per_encoding: Images, or crops, encoded at once.
        waiting_bytes: Bytes of logits that may wait for the suppression of duplicates, before they become run lengths.

    Raises:
        ValueError: If the model needs more memory, or an argument is not a positive number.
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
        tokens = num_tokens * decoder_config.hidden_size * item_size  # bytes of the image tokens of one prompt
        # Attention scores of a prompt's 7 tokens: 5 output tokens, and 2 for the point.
        scores = 7 * decoder_config.num_attention_heads * num_tokens * item_size
        masks = 3 * 16 * num_tokens * 4  # bytes of the logits of one point's masks, float32
        # Bytes for each point, and shares of the free memory for points, upscaling and waiting logits, which are in use
        # at the same time. The rest is for run lengths: some 100 MB with kernels, `masks_per_step` without.
        if decoder is not None and decoder.is_lean:  # upscaling allocates nothing
            # At low thresholds the logits of 3072 masks wait: of each the tiles around it, a third to a half. With the
            # published model and the default memory, 32 x 32 points are six batches of 171.
            per_point, shares = 1.25 * tokens + 3 * masks, (0.63, 0.0, 0.32)
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
        self.waiting_bytes = for_waiting
        self._on_cpu = model.device.type == "cpu"
        self._for_masks = 0.15 * free
        self._input_pixels = config.vision_config.image_size**2

    def masks_per_step(self, size: tuple[int, int], crop_size: tuple[int, int]) -> int:
        """Return how many masks fit at the image's size: float32 logits of the input and the crop, and six bool masks.

        Args:
            size: (height, width) of the image.
            crop_size: (height, width) of the crop.
        """
        pixels, crop_pixels = math.prod(size), math.prod(crop_size)
        if self._on_cpu:  # two masks at the image's size are as much as a cache holds
            return 2
        return _between(1, self._for_masks / (4 * self._input_pixels + 4 * crop_pixels + 6 * pixels), 2**30 // pixels)


def _between(low: int, value: float, high: int) -> int:
    return max(low, min(int(value), high))
