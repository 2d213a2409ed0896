"""The mask decoder's logits at the size of the image."""

import math

import torch
from torch.nn import functional as F


def upscale_logits(
    logits: torch.Tensor, padded_size: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]
) -> torch.Tensor:
    """Upscale the mask decoder's logits to the size of the image, as the image processor does.

    They are resized bilinearly to the model's input, cropped to the image in it, and resized bilinearly to the original
    size. Rows and columns that would be cropped are not computed.

    Args:
        logits: (n, h, w).
        padded_size: (height, width) of the model's input.
        resized: (height, width) of the image within the model's input, without padding.
        original: (H, W) of the image.

    Returns:
        float32 (n, H, W).
    """
    size = (logits.shape[-2], logits.shape[-1])
    rows, columns = visible_part(size, padded_size, resized)
    if (rows, columns) != size:
        logits = logits[:, :rows, :columns]
        padded_size = rows * padded_size[0] // size[0], columns * padded_size[1] // size[1]
    logits = logits[:, None].float()
    if logits.shape[-2:] != padded_size:
        logits = F.interpolate(logits, padded_size, mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    if resized != original:
        logits = F.interpolate(logits, original, mode="bilinear", align_corners=False)
    return logits[:, 0]


def visible_part(size: tuple[int, int], padded_size: tuple[int, int], resized: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns of logits `upscale_logits` reads: those beyond are the padding's.

    Args:
        size: (h, w) of the logits.
        padded_size, resized: as in `upscale_logits`.
    """
    if any(padded % low for padded, low in zip(padded_size, size)):
        return size
    # One more row and column than needed, whose neighbours are then the same.
    rows, columns = (
        min(low, math.ceil(cut * low / padded) + 1) for low, padded, cut in zip(size, padded_size, resized)
    )
    return rows, columns
