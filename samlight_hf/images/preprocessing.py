"""Preprocessing on the model's device, bit for bit equal to that of transformers' image processor on a CPU."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import SamImageProcessor
from transformers.image_utils import PILImageResampling

from ..kernels.resize import resize_into
from .levels import is_upright_rgb, log_changes, stretch, to_rgb
from .reading import open_image


ImageInput = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor


def image_tensor(image: ImageInput) -> torch.Tensor:
    """Read one image as uint8 (3, H, W), by the same rules for every type of input.

    Integers and floats other than uint8 are stretched between robust percentiles, and a line is logged: see
    `levels.stretch`. A file or a PIL image is turned upright, and its transparency composited on white.

    Args:
        image: a path, a PIL image, an array (H, W) or (H, W, 3), or a tensor (H, W) or (3, H, W), grey or RGB. A tensor
            stays on its device.

    Raises:
        ValueError: for another type, dtype or shape, and for an image without pixels.
        ImageError: a ValueError, for a file that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = open_image(image)
    if isinstance(image, Image.Image):
        image = image if is_upright_rgb(image) else to_rgb(image, "the image", upright=True)
        image.load()
        image = np.asarray(image)
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise ValueError(
            f"an image is a {type(image).__name__}, and must be a path, a PIL image, an array or a tensor."
        )
    is_array, shape = isinstance(image, np.ndarray), tuple(image.shape)
    if len(shape) != 2 and not (len(shape) == 3 and shape[2 if is_array else 0] == 3):
        raise ValueError(
            f"an image has the shape {shape}, and must be (H, W) or {'(H, W, 3)' if is_array else '(3, H, W)'}."
        )
    if 0 in shape:
        raise ValueError(f"an image of shape {shape} has no pixels.")
    if isinstance(image, np.ndarray):
        levels = _stretch_array(image)
        # A copy: torch accepts no negative strides, and warns of memory that is read-only.
        tensor = torch.from_numpy(np.array(levels.transpose(2, 0, 1) if len(shape) == 3 else levels))
    else:
        tensor = _stretch_tensor(image)
    return tensor if len(shape) == 3 else tensor.expand(3, -1, -1)


def _stretch_array(levels: np.ndarray) -> np.ndarray:
    """Stretch levels that are not uint8. Raises ValueError for levels that are neither integers nor floats."""
    if levels.dtype == np.uint8:
        return levels
    if levels.dtype.kind not in "iuf":
        raise _wrong_levels(levels.dtype)
    stretched, note = stretch(levels)
    log_changes("the image", [note] if note else [])
    return stretched


def _stretch_tensor(levels: torch.Tensor) -> torch.Tensor:
    """Stretch levels that are not uint8, on a CPU; the result is on their device."""
    if levels.dtype == torch.uint8:
        return levels
    if levels.dtype == torch.bool or levels.is_complex():
        raise _wrong_levels(levels.dtype)
    array = (levels.float() if levels.dtype == torch.bfloat16 else levels).detach().cpu().numpy()
    return torch.from_numpy(_stretch_array(array)).to(levels.device)


def _wrong_levels(dtype: np.dtype | torch.dtype) -> ValueError:
    return ValueError(f"an image's levels are {dtype}, and must be integers or floats.")


def check_size(image_processor: SamImageProcessor, height: int, width: int):
    """Raise ValueError for an image whose short side would vanish when its long side is resized for the model."""
    longest_edge = image_processor.size["longest_edge"]
    if min(height, width) * longest_edge / max(height, width) < 0.5:
        raise ValueError(
            f"an image of {width}x{height} pixels is too thin: resized to {longest_edge} pixels it would be 0 pixels "
            f"thick. Cut it to a ratio below {2 * longest_edge}:1."
        )


def resized_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """Return the (height, width) of an image within the model's input, rounded as the image processor does."""
    scale = longest_edge / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def preprocess(
    image_processor: SamImageProcessor,
    images: Sequence[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    empty: Callable[..., torch.Tensor] = torch.empty,
) -> torch.Tensor:
    """Preprocess images to pixel values.

    Images are resized to the image processor's longest edge, normalised, and padded with zeros at the right and at the
    bottom. This is computed in float32 and rounded to `dtype`.

    Args:
        image_processor: the model's.
        images: B images, uint8 (3, H, W) of any sizes and on any device.
        device: where the pixel values are made.
        dtype: of the pixel values.
        empty: called as `torch.empty` for the tensor that kernels write to. Not called on the CPU, nor where the image
            processor itself does the work, see `why_not_on_device`.

    Returns:
        Pixel values (B, 3, S, S), where S is the size that the image processor pads to.

    Raises:
        ValueError: for an image processor that resizes to more than it pads to.
    """
    if device.type == "cpu" or why_not_on_device(image_processor):
        # By itself it warns of images whose width is 1 or 3 pixels, which could be channels.
        options = {"input_data_format": "channels_first", "device": None if device.type == "cpu" else device}
        inputs = image_processor(list(images), return_tensors="pt", **options)
        return inputs["pixel_values"].to(dtype)
    height, width = image_processor.pad_size["height"], image_processor.pad_size["width"]
    levels = normalised_levels(image_processor, dtype, device)
    pixel_values = empty(len(images), 3, height, width, dtype=dtype, device=device)
    for target, image in zip(pixel_values, images):
        size = resized_size(image.shape[-2], image.shape[-1], image_processor.size["longest_edge"])
        resize_into(target, image.to(device, non_blocking=True), size, levels)
    return pixel_values


def normalised_levels(image_processor: SamImageProcessor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the normalised value of each uint8 level, (3, 256), as the image processor computes it on a CPU."""
    mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    return _normalised_levels(image_processor, image_processor.rescale_factor, mean, std, dtype, device)


@lru_cache(maxsize=16)  # keyed by all settings that the levels depend on: an image processor is mutable
def _normalised_levels(image_processor, rescale_factor, mean, std, dtype, device) -> torch.Tensor:
    levels = torch.arange(256, dtype=torch.uint8, device="cpu").expand(3, 1, 256).contiguous()
    levels = image_processor.rescale_and_normalize(levels, True, rescale_factor, True, mean, std)
    return levels[:, 0].to(device, dtype)


def skipped_step(image_processor: SamImageProcessor) -> str | None:
    """Return a step that places an image in the model's input, and that the image processor skips, or None."""
    return next((step for step in ("do_resize", "do_pad") if not getattr(image_processor, step)), None)


def why_not_on_device(image_processor: SamImageProcessor) -> str | None:
    """Return why `resize_into` cannot resize images for this processor, or None if it can."""
    if image_processor.resample not in (PILImageResampling.BILINEAR, int(PILImageResampling.BILINEAR)):
        return f"resample={image_processor.resample!r} is not bilinear"
    for step in ("do_resize", "do_rescale", "do_normalize", "do_pad"):
        if not getattr(image_processor, step):
            return f"{step}=False"
    if not hasattr(image_processor, "rescale_and_normalize"):
        return f"{type(image_processor).__name__} takes no tensors"
    return None
