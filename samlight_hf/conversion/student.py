"""A student from a teacher. Every weight is accounted for: what is missing, left over or of another shape is an error that names it."""

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..loading import find_device, find_dtype, load_model
from ..modeling.configuration_sam_lightening import (
    PRESETS,
    SamLighteningConfig,
    SamLighteningVisionConfig,
    alternating_pattern,
)
from ..modeling.modeling_sam_lightening import SamLighteningModel, make_processor
from ..utils.processes import is_main_process
from .original import ORIGINAL_SUFFIXES, SamDecoder, convert_original_checkpoint, load_decoder


logger = logging.getLogger(__name__)

_LAYER = re.compile(r"vision_encoder\.layers\.(\d+)\.")
_RELATIVE_POSITIONS = re.compile(r"vision_encoder\.layers\.\d+\.attn\.rel_pos_[hw]")

# Beside the weights, what says which function they compute.
_PROMPT_ENCODER_FIELDS = ("mask_input_channels", "num_point_embeddings", "hidden_act", "layer_norm_eps")
_MASK_DECODER_FIELDS = (
    "hidden_act", "mlp_dim", "num_hidden_layers", "num_attention_heads", "attention_downsample_rate",
    "num_multimask_outputs", "iou_head_depth", "iou_head_hidden_dim", "layer_norm_eps",
)  # fmt: skip
_LAYER_FIELDS = ("hidden_size", "mlp_dim", "num_attention_heads", "qkv_bias", "hidden_act", "layer_norm_eps")


def create_student(
    teacher: PreTrainedModel | SamDecoder,
    preset: str | None = None,
    config: SamLighteningConfig | None = None,
    *,
    initialize_from_teacher_layers: bool = False,
    attn_implementation: str | None = None,
) -> SamLighteningModel:
    """A SAM-Lightening with the teacher's prompt encoder and mask decoder, float32, on the CPU, in eval mode.

    `teacher` is a SamModel, a SamLighteningModel or a `SamDecoder`, on any device and in any floating point type. The
    student's shape is `student_config(teacher, preset)` ("tiny" if nothing is said), or `config`. What is copied is
    compared after loading, bit by bit in float32.

    The image encoder is fresh, from torch's random generator; with `initialize_from_teacher_layers`, its layers are copies of
    evenly spaced ones of the teacher, and so are patch embedding, positions and neck. Relative positions, which
    SAM-Lightening has not, are the only weights left behind. The patch embedding of another patch size stays fresh, with a warning.

    Raises:
        ValueError: for a teacher that is no SAM, has another embedding size than `config` or another decoder, or holds
            NaN or infinite values; for an unknown preset; for an initialization from layers of another shape.
    """
    decoder = teacher if isinstance(teacher, SamDecoder) else SamDecoder.from_model(teacher)
    _check_finite(decoder.state_dict if teacher is decoder else teacher.state_dict())
    if config is None:
        config = student_config(teacher, "tiny" if preset is None else preset)
    elif preset is not None:
        raise ValueError(f"preset={preset!r} and a config are given. Give one of them.")
    elif getattr(config, "model_type", None) != SamLighteningConfig.model_type:
        raise ValueError(f"config is a {type(config).__name__}. Use a SamLighteningConfig, as student_config makes it.")
    _check_fit(config, decoder)
    weights, fresh = dict(decoder.state_dict), ("vision_encoder.",)
    if initialize_from_teacher_layers:
        layers, fresh = _initial_layers(teacher, config.vision_config)
        weights.update(layers)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    student = SamLighteningModel._from_config(copy.deepcopy(config), dtype=torch.float32, **options)
    _load_exactly(student, weights, fresh)
    return student.eval()


def student_config(teacher: PreTrainedModel | SamDecoder, preset: str = "tiny", **vision_config) -> SamLighteningConfig:
    """The shape of a student: width, depth and heads of the preset; image, patch, embedding and decoder of the teacher.

    Keyword arguments go to the vision config and win. The layers alternate between bands and the whole image, as published:
    a band is an eighth of the image's rows (8 rows of 64, w=512 of N=4096), or where 8 does not divide the rows, the
    nearest number of rows that does; the whole image has r=2, or r=1 (full attention) where N is odd.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not known. Use one of {', '.join(PRESETS)}.")
    decoder = teacher if isinstance(teacher, SamDecoder) else SamDecoder.from_model(teacher)
    prompt = decoder.prompt_encoder_config
    num_rows = prompt.image_size // prompt.patch_size
    band = min((n for n in range(1, num_rows + 1) if num_rows % n == 0), key=lambda n: (abs(8 * n - num_rows), n))
    hidden_size, num_hidden_layers, num_attention_heads = PRESETS[preset]
    shape = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "image_size": prompt.image_size,
        "patch_size": prompt.patch_size,
        "output_channels": prompt.hidden_size,
        "num_pos_feats": prompt.hidden_size // 2,
        **alternating_pattern(num_hidden_layers, band * num_rows, dilation_rate=2 if num_rows % 2 == 0 else 1),
    }
    return SamLighteningConfig(
        vision_config={**shape, **vision_config},
        prompt_encoder_config=prompt.to_dict(),
        mask_decoder_config=decoder.mask_decoder_config.to_dict(),
    )


def initialize_decoder(model: PreTrainedModel):
    """Fresh weights for prompt encoder and mask decoder, in place, as the original SAM draws them: torch's own.

    transformers draws them with a deviation of 0.02, which is meant to be loaded over. Trained from scratch, the embeddings of
    a box's two corners are then all but the same, and so are the mask tokens: it takes many steps until prompts mean anything.
    """
    for part in (model.prompt_encoder, model.mask_decoder):
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


def initialize_positions(model: PreTrainedModel):
    """Fixed waves for the image encoder's absolute positions, in place, which are zeros when they are fresh.

    Half of the channels tell the row and half the column, as sines and cosines of wavelengths from 2 pi to 20,000 pi patches (He et al.,
    Masked Autoencoders, arXiv 2111.06377). They are trained on from there.
    """
    positions = model.vision_encoder.pos_embed
    if positions is None:
        return
    _, height, width, channels = positions.shape
    if channels % 4:
        raise ValueError(f"hidden_size={channels} must be divisible by 4 for positions that are sines and cosines.")
    frequencies = 10000.0 ** -(torch.arange(channels // 4) / (channels // 4))
    angles = torch.arange(max(height, width))[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:height, None].expand(-1, width, -1), waves[None, :width].expand(height, -1, -1)
    with torch.no_grad():
        positions.copy_(torch.cat([rows, columns], dim=2))


def change_image_size(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """A copy for images of another size: the same weights, with the absolute positions interpolated (bicubic).

    The model still has to be trained on that size: its tokens see another part of the image. `segment_length`s keep their
    share of the image.

    Raises:
        ValueError: for a size that the patches do not divide, and for an encoder with relative positions, whose number
            depends on the size.
    """
    config = copy.deepcopy(model.config)
    vision, prompt = config.vision_config, config.prompt_encoder_config
    if image_size % vision.patch_size:
        raise ValueError(f"patch_size={vision.patch_size} must divide image_size={image_size}.")
    if vision.use_rel_pos:
        raise ValueError(
            "an image encoder with use_rel_pos=True cannot change its size: its relative positions are of one."
        )
    share = (image_size / vision.image_size) ** 2
    if isinstance(vision, SamLighteningVisionConfig) and vision.segment_length is not None:
        scale = lambda length: length and round(length * share)  # noqa: E731
        lengths = vision.segment_length
        vision.segment_length = tuple(map(scale, lengths)) if isinstance(lengths, tuple) else scale(lengths)
    vision.image_size = prompt.image_size = image_size
    grid_size = prompt.image_embedding_size = image_size // vision.patch_size
    changed = type(model)(config)
    weights = model.state_dict()
    if vision.use_abs_pos:
        positions = weights["vision_encoder.pos_embed"].permute(0, 3, 1, 2)  # (1, h, w, C) -> (1, C, h, w)
        positions = torch.nn.functional.interpolate(
            positions.float(), (grid_size, grid_size), mode="bicubic", antialias=True
        )
        weights["vision_encoder.pos_embed"] = positions.permute(0, 2, 3, 1)
    changed.load_state_dict(weights)
    return changed.train(model.training)


def evenly_spaced_layers(num_teacher_layers: int, num_student_layers: int) -> tuple[int, ...]:
    """Indexes of the teacher's layers that the student's are matched to: the first, the last, and evenly between.

    A single student layer takes the last. Raises ValueError where the student is deeper than its teacher.
    """
    if not 1 <= num_student_layers <= num_teacher_layers:
        raise ValueError(
            f"a student of {num_student_layers} layers cannot take distinct ones of a teacher of {num_teacher_layers}. "
            f"Use a student of 1 to {num_teacher_layers} layers."
        )
    if num_student_layers == 1:
        return (num_teacher_layers - 1,)
    last_teacher, last_student = num_teacher_layers - 1, num_student_layers - 1
    return tuple((2 * i * last_teacher + last_student) // (2 * last_student) for i in range(num_student_layers))


def load_teacher(
    path_or_repo: str | Path, device: str = "auto", dtype: str | torch.dtype = "float32"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A teacher, in eval mode on `device`, and its processor, from a folder, a Hub name ("org/name"), or an original `.pth` file.

    `save_pretrained` of both writes a folder in safetensors that loads as any other. Errors are those of
    `loading.load_model` and `convert_original_checkpoint`.
    """
    path = Path(path_or_repo).expanduser()
    if path.suffix not in ORIGINAL_SUFFIXES or path.is_dir():
        return load_model(path_or_repo, device, dtype)
    device, dtype = find_device(device), find_dtype(dtype)
    model = convert_original_checkpoint(path)
    return model.to(device, dtype), make_processor(model.config.vision_config)


def _check_finite(state_dict: Mapping[str, torch.Tensor]):
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"the teacher has NaN or infinite values in {name}. Use another checkpoint.")


def _check_fit(config: SamLighteningConfig, decoder: SamDecoder):
    """Raises ValueError where the teacher's prompt encoder and mask decoder would not do the same in the student."""
    vision, prompt = config.vision_config, decoder.prompt_encoder_config
    for name, value, teacher_value in (
        ("vision_config.output_channels", vision.output_channels, prompt.hidden_size),
        ("image_size // patch_size", vision.image_size // vision.patch_size, prompt.image_size // prompt.patch_size),
    ):
        if value != teacher_value:
            raise ValueError(
                f"the student's {name}={value} must equal the teacher's {teacher_value}, so that their image embeddings are of one "
                "size. Change the config, or use student_config(teacher, preset)."
            )
    for part, fields in (
        ("prompt_encoder_config", _PROMPT_ENCODER_FIELDS),
        ("mask_decoder_config", _MASK_DECODER_FIELDS),
    ):
        for field in fields:
            value, teacher_value = getattr(getattr(config, part), field), getattr(getattr(decoder, part), field)
            if value != teacher_value:
                raise ValueError(
                    f"the student's {part}.{field}={value!r} must equal the teacher's {teacher_value!r}. "
                    f"Give the config the teacher's {part}, or use student_config(teacher, preset)."
                )


def _initial_layers(
    teacher: PreTrainedModel | SamDecoder, config: SamLighteningVisionConfig
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The teacher's image encoder thinned to the student's layers, under the student's names; and what stays fresh."""
    if isinstance(teacher, SamDecoder):
        raise ValueError(
            "the teacher is a SamDecoder, which has no image encoder. Use initialize_from_teacher_layers=False."
        )
    teacher_config = teacher.config.vision_config
    for field in _LAYER_FIELDS:
        value, teacher_value = getattr(config, field), getattr(teacher_config, field)
        if value != teacher_value:
            raise ValueError(
                f"the student's {field}={value!r} and the teacher's {teacher_value!r} must agree to initialize its image encoder "
                "from the teacher's layers. Change the config to agree, or use initialize_from_teacher_layers=False."
            )
    fresh = ()
    for field in ("patch_size", "num_channels"):
        value, teacher_value = getattr(config, field), getattr(teacher_config, field)
        if value != teacher_value:
            fresh = ("vision_encoder.patch_embed.",)
            level = logging.WARNING if is_main_process() else logging.DEBUG
            logger.log(
                level,
                "The student's %s=%s is not the teacher's %s: its patch embedding stays fresh.",
                field,
                value,
                teacher_value,
            )
    chosen = evenly_spaced_layers(teacher_config.num_hidden_layers, config.num_hidden_layers)
    layers = {}
    for name, tensor in teacher.vision_encoder.state_dict(prefix="vision_encoder.").items():
        if match := _LAYER.match(name):
            index = int(match[1])
            if index not in chosen:
                continue
            name = f"vision_encoder.layers.{chosen.index(index)}.{name[match.end() :]}"
        if not name.startswith(fresh):
            layers[name] = tensor
    return layers, fresh


def _load_exactly(student: SamLighteningModel, weights: dict[str, torch.Tensor], fresh: tuple[str, ...]):
    """Loads the weights and compares them; raises where others are missing or left over than must be.

    `fresh` are the beginnings of the names that the weights must not have. Nothing is resized: positions that were
    interpolated would be another model's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    for name, tensor in weights.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)} in the teacher, and {shapes[name]} in the student.")
    missing, unexpected = student.load_state_dict(weights, strict=False)
    if wrong := sorted(set(missing) ^ {name for name in shapes if name.startswith(fresh)}):
        raise ValueError(f"the teacher lacks {len(wrong)} weights that the student needs, first {wrong[0]}.")
    if wrong := sorted(name for name in unexpected if not _RELATIVE_POSITIONS.fullmatch(name)):
        raise ValueError(f"the teacher has {len(wrong)} weights that the student has no place for, first {wrong[0]}.")
    loaded = student.state_dict()
    for name in weights.keys() & loaded.keys():
        if not torch.equal(loaded[name], weights[name].to(loaded[name])):
            raise ValueError(
                f"{name} is not the teacher's after loading. If the teacher's shared_image_embedding and "
                "prompt_encoder.shared_embedding differ, which are one in SAM, call its tie_weights()."
            )


__all__ = [
    "SamDecoder",
    "change_image_size",
    "convert_original_checkpoint",
    "create_student",
    "evenly_spaced_layers",
    "initialize_decoder",
    "initialize_positions",
    "load_decoder",
    "load_teacher",
    "student_config",
]
