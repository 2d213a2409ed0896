"""A decoder's logits at the size of the image."""

import math

import torch
from torch.nn import functional as F


def upscale_logits(
    logits: torch.Tensor, padded_size: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]
) -> torch.Tensor:
    """The decoder's logits (n, h, w) at the image's `original` size, float32 (n, H, W), as the image processor makes them.

    Bilinear to the `padded_size` of the model's input, cut to the `resized` image in it, and bilinear to the original;
    all sizes are (height, width). What would be cut off is not computed.
    """
    size = logits.shape[-2:]
    ratios = [padded / low if padded % low == 0 else 0 for padded, low in zip(padded_size, size)]
    if all(ratios):  # one more row and column than needed, whose neighbours are then the same
        rows, columns = (min(low, math.ceil(cut / r) + 1) for low, cut, r in zip(size, resized, ratios))
        logits, padded_size = logits[:, :rows, :columns], (int(rows * ratios[0]), int(columns * ratios[1]))
    logits = logits[:, None].float()
    if logits.shape[-2:] != padded_size:
        logits = F.interpolate(logits, padded_size, mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    if resized != original:
        logits = F.interpolate(logits, original, mode="bilinear", align_corners=False)
    return logits[:, 0]
