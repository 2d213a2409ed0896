"""Models of another image size: positions are interpolated, and the attention pattern follows a stated rule.

A model of 512 px has a quarter of the image tokens of one of 1024 px. Each layer keeps its kind:

- A layer that sees the whole image (`segment_length=None`) goes on to do so.
- A layer of bands gets bands of whole rows of tokens. With `bands="image"` a band keeps its share of the image's
  height, so that it shows the same part of a photograph. With `bands="tokens"` it keeps its number of rows. The number
  of rows that divides the new grid and is nearest in ratio is taken, the smaller one of two.
- A segment that is no whole number of rows keeps its share of the tokens ("image") or its length ("tokens"), rounded
  in the same way to a divisor of the number of tokens.
- SAM's square windows keep their side in tokens.
- The dilation rate stays, or becomes its largest divisor that divides the new segment.
"""

import copy
import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..engine.plain_modules import why_not_plain_decoder, why_not_plain_encoder
from ..modeling.configuration_sam_lightening import SamLighteningVisionConfig


BANDS = ("image", "tokens")
# Rows of patches; 4096 px with patches of 16 px. The positions of more would take gigabytes.
MAX_ROWS = 256


def resize_model(model: PreTrainedModel, image_size: int, bands: str = "image") -> PreTrainedModel:
    """Return a copy of the model for another image size.

    The absolute positions are interpolated (bicubic), and the attention pattern is adapted by the rule at the top of
    `samlight_hf/conversion/resizing.py`. All other weights are copied. The copy works at once, best near the size that
    the model was trained at; a short training at the new size improves it.

    Args:
        model: SamLighteningModel, or SamModel without relative positions.
        image_size: The new size in pixels, to which the longest side of an image is resized: a multiple of the patch
            size, of at most 256 patches (4096 px with patches of 16 px).
        bands: "image": bands keep their share of the image's height. "tokens": they keep their rows of tokens.

    Returns:
        The copy, of the same class, dtype, device and mode.

    Raises:
        ValueError: For a size that cannot be, for another kind of model, for an image encoder with relative positions,
            whose number depends on the size, and for a model with hooks, adapters or modules of one's own.

    Example:
        >>> small = resize_model(model, 512)
        >>> small.save_pretrained("tiny-512")  # with config, code and a processor for 512 px
    """
    _check_model(model)
    config = copy.deepcopy(model.config)
    vision, prompt = config.vision_config, config.prompt_encoder_config
    rows = _check_size(image_size, vision.patch_size)
    if bands not in BANDS:
        raise ValueError(f"bands={bands!r} must be one of {', '.join(BANDS)}.")
    if hasattr(vision, "layer_patterns"):
        _resize_pattern(vision, rows, bands)
    vision.image_size = prompt.image_size = image_size
    prompt.image_embedding_size = rows
    resized = type(model)(config)
    weights = model.state_dict()
    if vision.use_abs_pos:
        positions = weights["vision_encoder.pos_embed"]
        weights["vision_encoder.pos_embed"] = _interpolated(positions, rows)
    resized.load_state_dict(weights)
    return resized.to(model.device, model.dtype).train(model.training)


def resize_processor(processor: ProcessorMixin, image_size: int, patch_size: int) -> ProcessorMixin:
    """Return a copy of a SAM's processor for another image size; it keeps its means, deviations and resampling.

    Args:
        processor: The model's processor.
        image_size: As in `resize_model`.
        patch_size: Of the model's config.
    """
    processor = copy.deepcopy(processor)
    inner = getattr(processor, "image_processor", processor)
    mask_size = 4 * (image_size // patch_size)
    for name, value in (("size", image_size), ("mask_size", mask_size)):
        setattr(inner, name, type(getattr(inner, name))(longest_edge=value))
    for name, value in (("pad_size", image_size), ("mask_pad_size", mask_size)):
        setattr(inner, name, type(getattr(inner, name))(height=value, width=value))
    if hasattr(processor, "target_size"):
        processor.target_size = image_size
    return processor


def describe_pattern(config) -> list[str]:
    """Return the attention pattern of a vision config, a sentence for each layer; an empty list for a plain SAM."""
    if not hasattr(config, "layer_patterns"):
        return []
    rows, lines = config.image_size // config.patch_size, []
    for length, rate, offsets, window in config.layer_patterns():
        if window:
            what = f"windows of {window}x{window} tokens"
        elif length == rows * rows:
            what = f"the whole image, {rows} rows of tokens"
        elif length % rows == 0:
            what = f"bands of {length // rows} of {rows} rows of tokens"
        else:
            what = f"segments of {length} of {rows * rows} tokens"
        lines.append(f"{what}, dilation rate {rate}" + (f" ({offsets})" if offsets != "all" else ""))
    return lines


def _check_model(model: PreTrainedModel):
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ("sam", "sam_lightening") or not hasattr(model, "vision_encoder"):
        raise ValueError(f"model is a {type(model).__name__} and must be a SamLighteningModel or a SamModel.")
    if hasattr(type(model), "optimized_from"):
        raise ValueError("this model is optimized: resize the model that it was made from, and optimize the result.")
    if model.config.vision_config.use_rel_pos:
        raise ValueError(
            "an image encoder with use_rel_pos=True cannot change its size, on which its relative positions depend."
        )
    reason = why_not_plain_decoder(model)
    if model_type == "sam_lightening":
        reason = reason or why_not_plain_encoder(model)
    if reason:  # hooks, adapters and modules of one's own would be lost
        raise ValueError(
            f"a model of another size is made from config and weights, and this one has more: {reason} Remove hooks, "
            "and merge adapters (merge_and_unload of peft)."
        )


def _check_size(image_size: int, patch_size: int) -> int:
    """Return the number of rows of patches. Raises ValueError for a size that cannot be."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size={image_size!r} must be a positive multiple of patch_size={patch_size}.")
    if image_size % patch_size:
        below = image_size // patch_size * patch_size
        nearest = " or ".join(str(size) for size in (below, below + patch_size) if size)
        raise ValueError(f"patch_size={patch_size} must divide image_size={image_size}: use {nearest}.")
    if image_size > MAX_ROWS * patch_size:
        raise ValueError(
            f"image_size={image_size} is more than {MAX_ROWS} patches of {patch_size} px: use at most "
            f"{MAX_ROWS * patch_size}, and tiles for larger images (samlight segment --tile)."
        )
    return image_size // patch_size


def _resize_pattern(vision: SamLighteningVisionConfig, rows: int, bands: str):
    """Change the pattern in the config in place; a single value for all layers stays one where it can."""
    old_rows = vision.image_size // vision.patch_size
    lengths: list[int | None] = []
    rates: list[int] = []
    for layer, (length, rate, _, window) in enumerate(vision.layer_patterns()):
        stated = vision.segment_length
        stated = stated[layer] if isinstance(stated, tuple) else stated
        if window:
            num_tokens = window * window
        else:
            stated = None if stated is None else _resized_segment(length, old_rows, rows, bands)
            num_tokens = rows * rows if stated is None else stated
        lengths.append(stated)
        rates.append(max(divisor for divisor in _divisors(rate) if num_tokens % divisor == 0))
    vision.segment_length = _like(vision.segment_length, lengths)
    vision.dilation_rate = _like(vision.dilation_rate, rates)


def _resized_segment(length: int, old_rows: int, rows: int, bands: str) -> int:
    if length % old_rows == 0:  # whole rows
        band = length // old_rows
        return rows * _nearest_divisor(rows, band * rows / old_rows if bands == "image" else band)
    return _nearest_divisor(rows * rows, length * (rows / old_rows) ** 2 if bands == "image" else length)


def _nearest_divisor(number: int, target: float) -> int:
    return min(_divisors(number), key=lambda divisor: (abs(math.log(divisor / target)), divisor))


def _divisors(number: int) -> Iterable[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _like(before, values: list):
    """Return one value where there was one and all are equal, else a tuple."""
    return tuple(values) if isinstance(before, (tuple, list)) or len(set(values)) > 1 else values[0]


def _interpolated(positions: torch.Tensor, rows: int) -> torch.Tensor:
    """Interpolate positions (1, h, w, C) to (1, rows, rows, C)."""
    planes = positions.permute(0, 3, 1, 2).float()
    planes = torch.nn.functional.interpolate(planes, (rows, rows), mode="bicubic", antialias=True)
    return planes.permute(0, 2, 3, 1).to(positions.dtype)


def change_image_size(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """Call `resize_model`; this is its earlier name."""
    return resize_model(model, image_size)
