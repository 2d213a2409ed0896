"""Masks as prompts. The mask decoder reads logits, at its own size and in the frame of the model's input; people have masks."""

import numpy as np
import torch
from torch.nn import functional as F

from .encoded_image import EncodedImage


# Inside, and with the other sign outside: well beyond a threshold, and within what a decoder itself gives.
MASK_LOGIT = 10.0

_MASKS_AT_ONCE = 16  # at the size of the model's input


@torch.inference_mode()
def logits_of_prompt(
    values: np.ndarray | torch.Tensor,
    image: EncodedImage,
    size: tuple[int, int],
    device: torch.device,
    name: str = "logits",
) -> torch.Tensor:
    """Logits that refine, as the mask decoder reads them.

    Args:
        values: (n, h, w). Of the decoder's `size`: an earlier prediction's logits. Or masks, bool, or 0 and 1, or 0 and
            255 of any dtype, which are of that size or of the image's; floats that are all 0 are logits.
        name: "logits", or "masks", which takes masks alone.

    Returns:
        float32 (n, h, w) on the device.

    Raises:
        ValueError: for another shape, NaN or infinite logits, and whole numbers that are neither.
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
    """Of any array, also of one that is flipped or read-only, which torch does not take."""
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def _masks_of(values: torch.Tensor, name: str) -> tuple[torch.Tensor | None, list[float]]:
    """Masks as bool, or None where these are logits; and the lowest and the highest value."""
    if values.dtype == torch.bool:
        return values, []
    if not values.numel():
        return (values.bool() if name == "masks" else None), []
    is_whole = not values.is_floating_point()
    if is_whole:
        values = values.long()  # in which all whole numbers can be compared
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
    """bool (n, H, W) of the image, or (n, h, w) of the decoder's size, to float32 (n, h, w); nothing is inside beyond the image."""
    given = tuple(masks.shape[1:])
    if given not in (size, image.size):
        raise ValueError(_shape_text(name, masks, image, size))
    if given == size:  # also of an image of that size, which is square, and fills the model's input
        inside = masks.float()
    else:
        parts = [_resized(part[:, None].float(), image, size)[:, 0] for part in masks.split(_MASKS_AT_ONCE)]
        inside = torch.cat(parts) if parts else masks.new_zeros(0, *size, dtype=torch.float32)
    return (2 * inside - 1) * MASK_LOGIT


def _resized(masks: torch.Tensor, image: EncodedImage, size: tuple[int, int]) -> torch.Tensor:
    """Shares of each cell that are inside: (n, 1, H, W) to (n, 1, h, w), by the resize and the padding of the image."""
    masks = F.interpolate(masks, image.resized, mode="bilinear", antialias=True)
    (height, width), (padded_height, padded_width) = image.resized, image.padded
    masks = F.pad(masks, (0, padded_width - width, 0, padded_height - height))
    return F.interpolate(masks, size, mode="area")


def _shape_text(name: str, values: torch.Tensor, image: EncodedImage, size: tuple[int, int]) -> str:
    one = "one mask of an earlier prediction for each prompt"
    return (
        f"{name} have the shape {tuple(values.shape)}, and must be (prompts, {size[0]}, {size[1]}), {one}, {name}[:, i]; "
        f"masks may be (prompts, {image.size[0]}, {image.size[1]}), as large as the image, too."
    )
