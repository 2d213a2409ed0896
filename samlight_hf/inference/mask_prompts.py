"""Masks as prompts: conversion to the logits that the mask decoder reads, in the frame of the model's input."""

import numpy as np
import torch
from torch.nn import functional as F

from .encoded_image import EncodedImage


# Logit of pixels inside a mask, negated outside: far from the threshold, and within the range of a decoder's own
# logits.
MASK_LOGIT = 10.0

_MASKS_AT_ONCE = 16  # resized at once to the size of the model's input


@torch.inference_mode()
def logits_of_prompt(
    values: np.ndarray | torch.Tensor,
    image: EncodedImage,
    size: tuple[int, int],
    device: torch.device,
    name: str = "logits",
) -> torch.Tensor:
    """Convert masks or logits of an earlier prediction to logits that the mask decoder reads.

    Args:
        values: (n, h, w). Either logits of an earlier prediction, of the decoder's `size`. Or masks, which are bool, or
            0 and 1, or 0 and 255 of any dtype, and are of the decoder's `size` or of the image's. Floats that are all 0
            are logits.
        image: The image that the prompts are on.
        size: (height, width) of the decoder's logits.
        device: The device of the result.
        name: The user's name for `values`: "logits", or "masks", which accepts masks alone.

    Returns:
        float32 (n, h, w) on the device.

    Raises:
        ValueError: For another shape, for NaN or infinite logits, and for integers that are neither masks nor logits.
    """
    values = tensor_of(values).to(device)
    if values.ndim != 3:
        raise ValueError(_shape_text(name, values, image, size))
    masks, extremes = _masks_of(values, name)
    if masks is not None:
        return _logits_of_masks(masks, image, size, name)
    if tuple(values.shape[1:]) != size:
        raise ValueError(_shape_text(name, values, image, size))
    if not np.isfinite(extremes).all():
        raise ValueError("logits hold NaN or infinite values.")
    return values.float()


def tensor_of(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert any array to a tensor, also flipped and read-only ones, which torch does not accept."""
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def _masks_of(values: torch.Tensor, name: str) -> tuple[torch.Tensor | None, list[float]]:
    """Return the masks as bool, or None if these are logits; and the lowest and the highest value, if needed."""
    if values.dtype == torch.bool:
        return values, []
    if not values.numel():
        return (values.bool() if name == "masks" else None), []
    is_whole = not values.is_floating_point()
    if is_whole:
        values = values.long()  # torch cannot compare all unsigned types
    low, high = torch.stack(values.aminmax()).tolist()
    highest = (0, 1, 255) if is_whole or name == "masks" else (1, 255)
    if high in highest and low in (0, high) and bool(((values == 0) | (values == high)).all()):
        return values > 0, [low, high]
    if name == "masks" or (is_whole and low >= 0):
        held = "whole numbers" if is_whole else "values"
        raise ValueError(
            f"{name} hold {held} from {low:g} to {high:g}: a mask is bool, or 0 and 1, or 0 and 255; logits are "
            "fractions, above 0 inside."
        )
    return None, [low, high]


def _logits_of_masks(masks: torch.Tensor, image: EncodedImage, size: tuple[int, int], name: str) -> torch.Tensor:
    """Convert masks, bool, of the image's size or of the decoder's `size`, to float32 (n, h, w)."""
    mask_size = tuple(masks.shape[1:])
    if mask_size not in (size, image.size):
        raise ValueError(_shape_text(name, masks, image, size))
    if mask_size == size:  # includes an image of that size: it is square and fills the model's input
        inside = masks.float()
    else:
        parts = [_resized(part[:, None].float(), image, size)[:, 0] for part in masks.split(_MASKS_AT_ONCE)]
        inside = torch.cat(parts) if parts else masks.new_zeros(0, *size, dtype=torch.float32)
    return (2 * inside - 1) * MASK_LOGIT


def _resized(masks: torch.Tensor, image: EncodedImage, size: tuple[int, int]) -> torch.Tensor:
    """Resize and pad masks like the image, then average over the decoder's cells: (n, 1, H, W) to (n, 1, h, w)."""
    masks = F.interpolate(masks, image.resized, mode="bilinear", antialias=True)
    (height, width), (padded_height, padded_width) = image.resized, image.padded
    masks = F.pad(masks, (0, padded_width - width, 0, padded_height - height))
    return F.interpolate(masks, size, mode="area")


def _shape_text(name: str, values: torch.Tensor, image: EncodedImage, size: tuple[int, int]) -> str:
    one = "one mask of an earlier prediction for each prompt"
    return (
        f"{name} have the shape {tuple(values.shape)}, and must be (prompts, {size[0]}, {size[1]}), {one}, {name}[:, i]"
        f"; masks may be (prompts, {image.size[0]}, {image.size[1]}), as large as the image, too."
    )
