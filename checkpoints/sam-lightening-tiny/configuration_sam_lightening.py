# SPDX-License-Identifier: Apache-2.0
"""Configuration of SAM-Lightening (arXiv 2403.09195): SAM's, plus a dilation pattern for each image encoder layer."""

from typing import NamedTuple

from huggingface_hub.dataclasses import strict
from transformers.models.sam.configuration_sam import (
    SamConfig,
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from .dilated_attention import check_pattern


# hidden_size, num_hidden_layers, num_attention_heads of the image encoder; 1, 1.5 and 8 times tiny's layer weights.
PRESETS = {"tiny": (384, 6, 6), "small": (384, 9, 6), "base": (768, 12, 12)}


class LayerPattern(NamedTuple):
    """The attention pattern of one layer of the image encoder, as `dilated_attention.py` defines it.

    Attributes:
        segment_length: w, in tokens.
        dilation_rate: r.
        dilation_offsets: `"all"` or `"per_head"`.
        window_size: 0 if segments are runs of w tokens in raster order. Otherwise segments are SAM's windows of
            `window_size` x `window_size` tokens.
    """

    segment_length: int
    dilation_rate: int
    dilation_offsets: str
    window_size: int


def alternating_pattern(num_hidden_layers: int, segment_length: int = 512, dilation_rate: int = 2) -> dict[str, tuple]:
    """Return a pattern that alternates between local bands and the whole image; the last layer sees the whole image.

    Dilated layers keep the residue classes of a segment apart; the undilated bands in between mix them.

    Args:
        num_hidden_layers: number of layers.
        segment_length: w of the bands, in tokens; their dilation rate is 1.
        dilation_rate: r of the layers that see the whole image (w = N).

    Returns:
        Keyword arguments for [`SamLighteningVisionConfig`].
    """
    whole_image = [(num_hidden_layers - 1 - layer) % 2 == 0 for layer in range(num_hidden_layers)]
    return {
        "segment_length": tuple(None if whole else segment_length for whole in whole_image),
        "dilation_rate": tuple(dilation_rate if whole else 1 for whole in whole_image),
    }


@strict
class SamLighteningVisionConfig(SamVisionConfig):
    r"""
    Configuration of the SAM-Lightening image encoder. The defaults are the "tiny" shape: hidden size 384, 6 layers,
    6 heads, 1024 px, 17.3M parameters with the decoder. Arguments that are not listed are those of [`SamVisionConfig`].

    An image has N = (`image_size` / `patch_size`)² tokens in raster order. Token n attends to the tokens of its own
    segment (n // w) and residue class ((n mod w) mod r).

    Args:
        segment_length (`int`, `None`, or a tuple with one of these per layer):
            w, in tokens; `None` is the whole image (w = N). Must divide N. In a windowed layer the segment is the
            window.
        dilation_rate (`int`, or a tuple with one per layer):
            r; 1 is dense attention within the segment. Must divide w. An attention layer costs N·w/r instead of N².
        dilation_offsets (`str`, or a tuple with one per layer, defaults to `"all"`):
            `"all"`: every head attends in every residue class. `"per_head"` (LongNet): head h attends in class h mod r
            alone, and is zero elsewhere; cost N·w/r². r must divide the number of heads.
        window_size (`int`, defaults to 0):
            Side of SAM's square windows, in tokens, for layers that are not in `global_attn_indexes`; 0: no windows.
        initializer_range (`float`, defaults to 0.02):
            [`SamVisionConfig`]'s 1e-10 makes a fresh encoder that outputs nothing.
        scale (`float`, defaults to 1.0):
            Standard deviation of the random Fourier features that encode point and box coordinates in a fresh model.
            Published SAM used 1.0; [`SamVisionConfig`] computes `hidden_size // 2`, with which prompts do not train.

    Raises:
        ValueError: for an impossible combination; the message has both numbers and the fix.
    """

    model_type = "sam_lightening_vision_model"
    _auto_class = "AutoConfig"

    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    image_size: int = 1024
    patch_size: int = 16
    initializer_range: float = 0.02
    mlp_ratio: float | int = 4.0
    use_rel_pos: bool = False
    window_size: int = 0
    global_attn_indexes: list[int] | tuple[int, ...] = ()
    scale: float | int = 1.0
    segment_length: int | list[int | None] | tuple[int | None, ...] | None = (512, None, 512, None, 512, None)
    dilation_rate: int | list[int] | tuple[int, ...] = (1, 2, 1, 2, 1, 2)
    dilation_offsets: str | list[str] | tuple[str, ...] = "all"

    def __post_init__(self, **kwargs):
        scale = self.scale
        super().__post_init__(**kwargs)
        self.scale = scale  # SamVisionConfig overwrites it with hidden_size // 2
        for name in ("segment_length", "dilation_rate", "dilation_offsets", "global_attn_indexes"):
            if isinstance(getattr(self, name), list):  # as read from JSON
                setattr(self, name, tuple(getattr(self, name)))
        self.layer_patterns()

    @property
    def num_image_tokens(self) -> int:
        """Number N of tokens of one image."""
        return (self.image_size // self.patch_size) ** 2

    def layer_patterns(self) -> list[LayerPattern]:
        """Check the configuration and return the pattern of every layer.

        The model calls it too, because the config does not check fields that are assigned after construction.

        Raises:
            ValueError: for an impossible combination.
        """
        for name in (
            "image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "output_channels",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be at least 0 and below 1.")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}."
            )
        if self.use_rel_pos:
            raise ValueError(
                "use_rel_pos=True is not possible in SAM-Lightening: flash attention kernels take no position bias. "
                "Use use_rel_pos=False (absolute positions, use_abs_pos=True, remain)."
            )
        return [self._layer_pattern(layer, window) for layer, window in enumerate(self._layer_windows())]

    def _layer_windows(self) -> list[int]:
        """Return each layer's window size, 0 for layers whose segments are runs of tokens in raster order."""
        if isinstance(self.window_size, bool) or self.window_size < 0:
            raise ValueError(f"window_size={self.window_size!r} must be 0 (no windows) or a positive number of tokens.")
        if self.window_size == 0:
            return [0] * self.num_hidden_layers
        for index in self.global_attn_indexes:
            if not 0 <= index < self.num_hidden_layers:
                raise ValueError(
                    f"global_attn_indexes contains {index}, but num_hidden_layers={self.num_hidden_layers}: "
                    f"use indexes from 0 to {self.num_hidden_layers - 1}."
                )
        return [0 if layer in self.global_attn_indexes else self.window_size for layer in range(self.num_hidden_layers)]

    def _layer_pattern(self, layer: int, window_size: int) -> LayerPattern:
        segment_length = self._of_layer("segment_length", layer)
        dilation_rate = self._of_layer("dilation_rate", layer)
        dilation_offsets = self._of_layer("dilation_offsets", layer)

        num_tokens = window_size**2 if window_size else self.num_image_tokens
        if segment_length is None:
            segment_length = num_tokens
        if window_size and segment_length != num_tokens:
            raise ValueError(
                f"segment_length={segment_length} in layer {layer}: that layer attends in windows, and its segment is "
                f"the window of {window_size}x{window_size}={num_tokens} tokens. Use segment_length=None there, "
                f"window_size=0, or put {layer} into global_attn_indexes."
            )
        where = f" in layer {layer} of image_size={self.image_size} and patch_size={self.patch_size}"
        check_pattern(num_tokens, self.num_attention_heads, segment_length, dilation_rate, dilation_offsets, where)
        return LayerPattern(segment_length, dilation_rate, dilation_offsets, window_size)

    def _of_layer(self, name: str, layer: int):
        value = getattr(self, name)
        if not isinstance(value, (tuple, list)):
            return value
        if len(value) != self.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(value)} entries for num_hidden_layers={self.num_hidden_layers}. Give one value for "
                "all layers, or one per layer (alternating_pattern(num_hidden_layers) makes the alternating ones)."
            )
        return value[layer]


@strict
class SamLighteningConfig(SamConfig):
    r"""
    Configuration of [`SamLighteningModel`]: a [`SamLighteningVisionConfig`] with SAM's prompt encoder and mask decoder.

    Image size, patch size and embedding width must agree in all three parts. Where the other two do not set them, they
    are taken from `vision_config`; a contradiction raises ValueError. The defaults are the "tiny" shape.

    Example:
        ```python
        >>> config = SamLighteningConfig(vision_config={"image_size": 512, "segment_length": None, "dilation_rate": 4})
        >>> config.prompt_encoder_config.image_size
        512
        >>> SamLighteningConfig.from_preset("base").vision_config.num_hidden_layers
        12
        ```
    """

    model_type = "sam_lightening"
    _auto_class = "AutoConfig"
    sub_configs = {
        "prompt_encoder_config": SamPromptEncoderConfig,
        "mask_decoder_config": SamMaskDecoderConfig,
        "vision_config": SamLighteningVisionConfig,
    }
    sub_configs_defaults = sub_configs  # the name that newer releases of transformers read

    def __post_init__(self, **kwargs):
        vision = self.vision_config
        if not hasattr(vision, "layer_patterns"):  # None, a dict, or a plain SAM's config
            fields = vision.to_dict() if isinstance(vision, SamVisionConfig) else dict(vision or {})
            fields.pop("model_type", None)
            if isinstance(vision, SamVisionConfig):
                # SAM's defaults of these suit pretrained weights, not weights that are to be trained.
                for name, default in (("scale", vision.hidden_size // 2), ("initializer_range", 1e-10)):
                    if fields[name] == default:
                        del fields[name]
            vision = self.vision_config = SamLighteningVisionConfig(**fields)
        if self.prompt_encoder_config is None or isinstance(self.prompt_encoder_config, dict):
            agreed = {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "hidden_size": vision.output_channels,
            }
            fields = dict(self.prompt_encoder_config or {})
            fields.pop("image_embedding_size", None)  # derived, and stale if image_size was overridden
            self.prompt_encoder_config = SamPromptEncoderConfig(**{**agreed, **fields})
        if self.mask_decoder_config is None or isinstance(self.mask_decoder_config, dict):
            agreed = {"hidden_size": vision.output_channels}
            self.mask_decoder_config = SamMaskDecoderConfig(**{**agreed, **(self.mask_decoder_config or {})})
        super().__post_init__(**kwargs)
        self.check_agreement()

    @classmethod
    def from_preset(cls, preset: str, **vision_config) -> "SamLighteningConfig":
        """Make the configuration of a named shape, with the alternating pattern.

        Args:
            preset: "tiny" (hidden size 384, 6 layers), "small" (384, 9 layers) or "base" (768, 12 layers).
            vision_config: fields of `vision_config` that override the preset's.

        Raises:
            ValueError: for an unknown preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is not known. Use one of {', '.join(PRESETS)}.")
        hidden_size, num_hidden_layers, num_attention_heads = PRESETS[preset]
        shape = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            **alternating_pattern(num_hidden_layers),
        }
        return cls(vision_config={**shape, **vision_config})

    def check_agreement(self):
        """Check that image encoder, prompt encoder and mask decoder fit together.

        The model calls it too, because the config does not check fields that are assigned after construction.

        Raises:
            ValueError: for a contradiction between the parts.
        """
        vision, prompt, decoder = self.vision_config, self.prompt_encoder_config, self.mask_decoder_config
        grid_size, embedding_size = vision.image_size // vision.patch_size, prompt.image_embedding_size
        channels, num_pos_feats = vision.output_channels, 2 * vision.num_pos_feats
        for name, value, other_name, other_value in (
            ("prompt_encoder_config.image_size", prompt.image_size, "vision_config.image_size", vision.image_size),
            ("prompt_encoder_config.patch_size", prompt.patch_size, "vision_config.patch_size", vision.patch_size),
            ("prompt_encoder_config.image_embedding_size", embedding_size, "image_size // patch_size", grid_size),
            ("prompt_encoder_config.hidden_size", prompt.hidden_size, "vision_config.output_channels", channels),
            ("prompt_encoder_config.hidden_size", prompt.hidden_size, "2 * vision_config.num_pos_feats", num_pos_feats),
            ("mask_decoder_config.hidden_size", decoder.hidden_size, "vision_config.output_channels", channels),
        ):  # fmt: skip
            if value != other_value:
                raise ValueError(f"{name}={value} must equal {other_name}={other_value}. Change one of them to agree.")


__all__ = ["SamLighteningConfig", "SamLighteningVisionConfig"]
