"""Images to pixel values on the model's device, bit for bit as transformers' image processor makes them on a CPU."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import SamImageProcessor
from transformers.image_utils import PILImageResampling

from ..kernels.resize import resize_into
from .levels import stretch, tell, to_rgb
from .reading import open_image


ImageInput = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor


def image_tensor(image: ImageInput) -> torch.Tensor:
    """Read one image as uint8 (3, H, W), by the same rule in whatever form it comes.

    Levels that are not uint8, integers or floats, are stretched between robust percentiles, and a line is logged: see
    `levels.stretch`. A file or a PIL image is turned upright, and its transparency laid on white.

    Args:
        image: a path, a PIL image, an array (H, W) or (H, W, 3), or a tensor (H, W) or (3, H, W), grey or RGB. A tensor
            stays on its device.

    Raises:
        ValueError: for another type or shape and for an empty image; ImageError, a ValueError, for a file that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = open_image(image)
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image, "the image", upright=True))
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
    image = _to_uint8(image)
    if is_array:  # torch takes neither negative strides nor memory that must not be written to without a word
        image = torch.from_numpy(np.array(image.transpose(2, 0, 1) if len(shape) == 3 else image))
    return image if len(shape) == 3 else image.expand(3, -1, -1)


def _to_uint8(levels: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Stretch levels of an array or a tensor that are not uint8. Raises ValueError for what is neither integer nor float."""
    if levels.dtype in (np.uint8, torch.uint8):
        return levels
    is_array = isinstance(levels, np.ndarray)
    if levels.dtype.kind not in "iuf" if is_array else levels.dtype == torch.bool or levels.is_complex():
        raise ValueError(f"an image's levels are {levels.dtype}, and must be integers or floats.")
    array = levels
    if not is_array:
        array = (levels.float() if levels.dtype == torch.bfloat16 else levels).detach().cpu().numpy()
    array, note = stretch(array)
    tell("the image", [note] if note else [])
    return array if is_array else torch.from_numpy(array).to(levels.device)


def check_size(image_processor: SamImageProcessor, height: int, width: int):
    """Raises ValueError for an image whose short side would vanish when its long side is resized for the model."""
    longest_edge = image_processor.size["longest_edge"]
    if min(height, width) * longest_edge / max(height, width) < 0.5:
        raise ValueError(
            f"an image of {width}x{height} pixels is too thin: resized to {longest_edge} pixels it would be 0 pixels "
            f"thick. Cut it to a ratio below {2 * longest_edge}:1."
        )


def resized_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) within the model's input, rounded as the image processor does."""
    scale = longest_edge / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def preprocess(
    image_processor: SamImageProcessor,
    images: Sequence[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    empty: Callable[..., torch.Tensor] = torch.empty,
) -> torch.Tensor:
    """Images, uint8 (3, H, W) of any sizes and on any device, to pixel values (B, 3, S, S), in `dtype` and on `device`.

    Resized to the image processor's longest edge, normalised, and padded with zeros at the right and at the bottom: in
    float32, rounded to `dtype`. `empty`, called as `torch.empty`, gives the tensor that kernels write them to; on the CPU,
    and where the image processor does it itself, it is not asked. Raises ValueError for an image processor that resizes to
    more than it pads to.
    """
    if device.type == "cpu" or why_not_on_device(image_processor):
        inputs = image_processor(list(images), return_tensors="pt", device=device if device.type != "cpu" else None)
        return inputs["pixel_values"].to(dtype)
    height, width = image_processor.pad_size["height"], image_processor.pad_size["width"]
    levels = normalised_levels(image_processor, dtype, device)
    pixel_values = empty(len(images), 3, height, width, dtype=dtype, device=device)
    for place, image in zip(pixel_values, images):
        size = resized_size(*image.shape[-2:], image_processor.size["longest_edge"])
        resize_into(place, image.to(device, non_blocking=True), size, levels)
    return pixel_values


def normalised_levels(image_processor: SamImageProcessor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each of uint8's levels becomes, (3, 256), as the image processor itself normalises them on a CPU."""
    mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
    return _normalised_levels(image_processor, image_processor.rescale_factor, mean, std, dtype, device)


@lru_cache(maxsize=16)  # with all that the levels depend on, since an image processor can be changed
def _normalised_levels(image_processor, rescale_factor, mean, std, dtype, device) -> torch.Tensor:
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256).contiguous()
    levels = image_processor.rescale_and_normalize(levels, True, rescale_factor, True, mean, std)
    return levels[:, 0].to(device, dtype)


def why_not_on_device(image_processor: SamImageProcessor) -> str | None:
    """Why this processor's images are not resized by `resize_into`: a sentence, or None where they are."""
    if image_processor.resample not in (PILImageResampling.BILINEAR, int(PILImageResampling.BILINEAR)):
        return f"resample={image_processor.resample!r} is not bilinear"
    for step in ("do_resize", "do_rescale", "do_normalize", "do_pad"):
        if not getattr(image_processor, step):
            return f"{step}=False"
    if not hasattr(image_processor, "rescale_and_normalize"):
        return f"{type(image_processor).__name__} takes no tensors"
    return None
