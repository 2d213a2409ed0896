# SPDX-License-Identifier: Apache-2.0
"""SAM-Lightening (arXiv 2403.09195) in transformers: SAM with a small image encoder and dilated flash attention.

Every class extends its counterpart in transformers' SAM; prompt encoder and mask decoder are SAM's own. The parents'
`__init__` is skipped where it would build SAM's image encoder.
"""

import os

import torch
from torch import nn
from transformers import SamImageProcessor, SamProcessor
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamMLPBlock,
    SamModel,
    SamPatchEmbeddings,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionAttention,
    SamVisionEncoder,
    SamVisionLayer,
    SamVisionModel,
    SamVisionNeck,
    eager_attention_forward,
)

from .configuration_sam_lightening import LayerPattern, SamLighteningConfig, SamLighteningVisionConfig
from .dilated_attention import DILATED_FLASH_ATTENTION, dilated_attention_forward
from .image_processing_sam_lightening import SamLighteningImageProcessor


SAM_PARTS = ("prompt_encoder_config", "mask_decoder_config")  # configs of the parts that are SAM's own


def make_processor(config: SamVisionConfig) -> SamProcessor:
    """Make SAM's processor for an image encoder: it resizes the longest side of an image to `config.image_size`."""
    image_size, mask_size = config.image_size, 4 * (config.image_size // config.patch_size)
    # An original SAM keeps transformers' class, so that its folder needs no remote code.
    original = config.model_type == SamVisionConfig.model_type
    image_processor_class = SamImageProcessor if original else SamLighteningImageProcessor
    return SamProcessor(
        image_processor_class(
            size={"longest_edge": image_size},
            pad_size={"height": image_size, "width": image_size},
            mask_size={"longest_edge": mask_size},
            mask_pad_size={"height": mask_size, "width": mask_size},
        )
    )


def _sam_attn_implementation(key: str, name: str | None, is_named: bool) -> str:
    """Choose the attention implementation of a part that is SAM's own; these parts support no flash or flex attention.

    Args:
        key: the part, one of `SAM_PARTS`.
        name: the requested implementation; None and the image encoder's default mean "sdpa" here.
        is_named: whether the request names this part. Otherwise it is for all parts, and this one falls back to "sdpa".

    Raises:
        ValueError: for an unknown name, or an implementation that is requested for this part by name and cannot run.
    """
    if name in (None, DILATED_FLASH_ATTENTION):
        return "sdpa"
    if name == "eager":
        return name
    if not any(kind in name for kind in ("flash", "flex", "paged")):
        if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
            return name
    elif not is_named:
        return "sdpa"
    raise ValueError(
        f'Specified `attn_implementation="{name}"` is not supported for {key}. Use "sdpa" or "eager" there, or '
        "a function of your own that is registered with AttentionInterface."
    )


class SamLighteningPatchProjection(nn.Conv2d):
    """Convolution of the patch embedding, whose stride equals its kernel size, as one matrix product."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}: rescale and normalize them, as SamImageProcessor does."
            )
        batch_size, num_channels, height, width = pixel_values.shape
        patch_height, patch_width = self.kernel_size
        rows, columns = height // patch_height, width // patch_width
        # (B, C, H, W) -> (B, rows, columns, C * patch_height * patch_width)
        patches = pixel_values.to(self.weight.dtype).view(
            batch_size, num_channels, rows, patch_height, columns, patch_width
        )
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, rows, columns, -1)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class SamLighteningPatchEmbeddings(SamPatchEmbeddings):
    def __init__(self, config: SamLighteningVisionConfig):
        super().__init__(config)
        self.projection = SamLighteningPatchProjection(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )


class SamLighteningVisionAttention(SamVisionAttention):
    """Multi-head attention within the groups of a dilation pattern, with any function of AttentionInterface."""

    def __init__(self, config: SamLighteningVisionConfig, pattern: LayerPattern):
        super().__init__(config, window_size=pattern.window_size)
        self.config = config
        self.segment_length = pattern.segment_length
        self.dilation_rate = pattern.dilation_rate
        self.dilation_offsets = pattern.dilation_offsets
        self.is_causal = False

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, height, width, _ = hidden_states.shape
        # (B, h, w, 3C) -> 3 x (B, H, N, D), N = h * w
        query, key, value = (
            self.qkv(hidden_states)
            .view(batch_size, height * width, 3, self.num_attention_heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        implementation = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        arguments = {"scaling": self.scale, "dropout": self.dropout if self.training else 0.0}
        if implementation == DILATED_FLASH_ATTENTION:
            attn_output, attn_weights = attention(self, query, key, value, **arguments)
        else:  # a dense function, which does not know the pattern
            attn_output, attn_weights = dilated_attention_forward(attention, self, query, key, value, **arguments)
        return self.proj(attn_output.reshape(batch_size, height, width, -1)), attn_weights


class SamLighteningVisionLayer(SamVisionLayer):
    def __init__(self, config: SamLighteningVisionConfig, pattern: LayerPattern):
        GradientCheckpointingLayer.__init__(self)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamLighteningVisionAttention(config, pattern)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamMLPBlock(config)
        self.window_size = pattern.window_size


class SamLighteningPreTrainedModel(SamPreTrainedModel):
    config: SamLighteningConfig
    _no_split_modules = ["SamLighteningVisionLayer"]
    _supports_flash_attn = True
    _auto_map: dict[str, str] | None = None  # auto_map of config.json, for trust_remote_code=True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SamLighteningVisionEncoder) and module.pos_embed is not None:
            init.normal_(module.pos_embed, std=self.config.initializer_range)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        # transformers looks for a flash-attn package wherever "flash" is in the name; ours runs without one.
        if attn_implementation in (None, DILATED_FLASH_ATTENTION):
            return DILATED_FLASH_ATTENTION
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        """Save a complete folder: weights, config and this code, as in transformers, and a processor.

        An existing processor is kept if it makes images of this model's size.

        Args:
            save_directory: the folder.
            is_main_process: whether this process saves the processor.
        """
        if auto_map := type(self).__dict__.get("_auto_map"):  # a subclass must set its own
            self.config.auto_map = dict(auto_map)
        if is_main_process and not os.path.isfile(save_directory):
            self._save_processor(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _save_processor(self, save_directory: str | os.PathLike):
        config: SamVisionConfig = getattr(self.config, "vision_config", self.config)
        names = ("processor_config.json", "preprocessor_config.json")
        if any(os.path.isfile(os.path.join(save_directory, name)) for name in names):
            # transformers' own class reads the size of any processor without running code from the folder.
            existing = SamImageProcessor.from_pretrained(save_directory)
            padded = existing.pad_size or {}
            if existing.size["longest_edge"] == padded.get("height") == padded.get("width") == config.image_size:
                return
        make_processor(config).save_pretrained(save_directory)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        # save_pretrained(push_to_hub=True) uploads files newer than its list, which already has the new processor.
        for name in ("processor_config.json", "image_processing_sam_lightening.py"):
            files_timestamps.pop(name, None)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)


class SamLighteningVisionEncoder(SamLighteningPreTrainedModel, SamVisionEncoder):
    config: SamLighteningVisionConfig

    def __init__(self, config: SamLighteningVisionConfig):
        SamPreTrainedModel.__init__(self, config)
        self.image_size = config.image_size
        self.patch_embed = SamLighteningPatchEmbeddings(config)
        grid_size = config.image_size // config.patch_size
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, grid_size, grid_size, config.hidden_size)) if config.use_abs_pos else None
        )
        self.layers = nn.ModuleList(SamLighteningVisionLayer(config, pattern) for pattern in config.layer_patterns())
        self.neck = SamVisionNeck(config)
        self.gradient_checkpointing = False
        self.post_init()


class SamLighteningVisionModel(SamLighteningPreTrainedModel, SamVisionModel):
    """Image encoder without the rest: (B, 3, S, S) -> `last_hidden_state` (B, 256, S/16, S/16), S = `image_size`."""

    config: SamLighteningVisionConfig
    _auto_class = "AutoModel"
    _auto_map = {
        "AutoConfig": "configuration_sam_lightening.SamLighteningVisionConfig",
        "AutoModel": "modeling_sam_lightening.SamLighteningVisionModel",
    }
    # The checkpoint of a whole model loads too.
    _keys_to_ignore_on_load_unexpected = [r"^prompt_encoder\.", r"^mask_decoder\.", r"^shared_image_embedding\."]

    def __init__(self, config: SamLighteningVisionConfig):
        SamPreTrainedModel.__init__(self, config)
        self.vision_encoder = SamLighteningVisionEncoder(config)
        self.post_init()


class SamLighteningModel(SamLighteningPreTrainedModel, SamModel):
    """SAM with the SAM-Lightening image encoder; inputs and outputs are those of [`SamModel`].

    The inputs are `pixel_values` (B, 3, S, S) or `image_embeddings` (B, 256, S/16, S/16), where S = `image_size`, with
    points, boxes and masks in the frame of the resized image, as [`SamProcessor`] makes them. The outputs are
    `pred_masks` (B, prompts, masks, S/4, S/4), logits that `processor.post_process_masks` resizes to the image, and
    `iou_scores` (B, prompts, masks).

    `attn_implementation` changes how attention is computed, not its result: "dilated_flash_attention" (default, the
    fastest kernel that can run), "sdpa", "eager", or "flash_attention_2", "_3", "_4". As in transformers, a string
    applies to every part, and a dict to the parts it names: `{"": ...}` to the model itself alone,
    `{"vision_config": ...}` to the image encoder, `{"mask_decoder_config": ...}` to the mask decoder. The mask decoder
    attends from a few tokens to the image, in heads of 16 channels, and has no flash attention: if a string requests
    it, the mask decoder runs "sdpa".
    """

    config: SamLighteningConfig
    _auto_class = "AutoModel"
    _auto_map = {
        "AutoConfig": "configuration_sam_lightening.SamLighteningConfig",
        "AutoModel": "modeling_sam_lightening.SamLighteningModel",
        "AutoModelForMaskGeneration": "modeling_sam_lightening.SamLighteningModel",
    }

    def __init__(self, config: SamLighteningConfig):
        config.check_agreement()
        requested = config._attn_implementation  # before transformers replaces it with an installed one
        SamPreTrainedModel.__init__(self, config)
        for key in SAM_PARTS:
            part = getattr(config, key)
            is_named = part._attn_implementation != requested
            part._attn_implementation = _sam_attn_implementation(key, part._attn_implementation, is_named)
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = SamLighteningVisionEncoder(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.post_init()

    def set_attn_implementation(self, attn_implementation: str | dict[str, str] | None, *args, **kwargs):
        """Change how attention is computed.

        Args:
            attn_implementation: a name for all parts, or a dict of names by part, as the class's docstring describes.
                `None` is the default.

        Raises:
            ValueError, ImportError: for a name that is unknown, cannot run here, or is requested for a part that cannot
                run it. Nothing is changed then.
        """
        by_part = attn_implementation if isinstance(attn_implementation, dict) else None
        names = {}
        for key in ("", *self.config.sub_configs):
            part = getattr(self.config, key) if key else self.config
            name = attn_implementation if by_part is None else by_part.get(key, part._attn_implementation)
            if isinstance(name, dict):  # for parts of a part, which SAM's parts do not have
                name = name.get("", part._attn_implementation)
            if name is None or name != part._attn_implementation:
                if key in SAM_PARTS:
                    name = _sam_attn_implementation(key, name, is_named=by_part is not None)
                else:
                    name = self._check_and_adjust_attn_implementation(name, False, *args, **kwargs)
            names[key] = name
        for key in SAM_PARTS:  # these are no models: transformers would warn that it cannot check them
            getattr(self.config, key)._attn_implementation = names[key]
        super().set_attn_implementation(names, *args, **kwargs)


__all__ = ["SamLighteningModel", "SamLighteningPreTrainedModel", "SamLighteningVisionModel"]
