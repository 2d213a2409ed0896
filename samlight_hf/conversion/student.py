"""Students created from a teacher.

Every weight is accounted for: a missing, unexpected or misshapen weight raises an error that names it.
"""

import copy
import logging
import re
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..loading import check_finite, find_device, find_dtype, load_model
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

# Config fields that, together with the weights, define the function that is computed.
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
    """Create a SAM-Lightening with the teacher's prompt encoder and mask decoder.

    Copied weights are compared bit by bit, in float32, after loading.

    Args:
        teacher: SamModel, SamLighteningModel or `SamDecoder`, on any device and in any floating point type.
        preset: Name of the student's shape, for `student_config(teacher, preset)`. Default: "tiny".
        config: Config of the student, instead of a preset.
        initialize_from_teacher_layers: Copy the image encoder's layers from evenly spaced layers of the teacher, and
            its patch embedding, positions and neck. Relative positions, which SAM-Lightening does not have, are
            dropped. A patch embedding for another patch size or number of channels stays random, with a warning. By
            default the whole image encoder is random.
        attn_implementation: As in `from_pretrained`.

    Returns:
        The student in float32, on the CPU, in eval mode.

    Raises:
        ValueError: For a teacher that is not a SAM, that has another embedding size than `config` or another decoder,
            or that holds NaN or infinite values; for an unknown preset; for an initialization from layers of another
            shape.
    """
    decoder = teacher if isinstance(teacher, SamDecoder) else SamDecoder.from_model(teacher)
    check_finite(teacher.state_dict if isinstance(teacher, SamDecoder) else teacher.state_dict(), "the teacher")
    if config is None:
        config = student_config(teacher, "tiny" if preset is None else preset)
    elif preset is not None:
        raise ValueError(f"preset={preset!r} and a config are given. Give one of them.")
    elif getattr(config, "model_type", None) != SamLighteningConfig.model_type:
        raise ValueError(f"config is a {type(config).__name__}. Use a SamLighteningConfig, as student_config makes it.")
    _check_fit(config, decoder)
    weights = dict(decoder.state_dict)
    fresh: tuple[str, ...] = ("vision_encoder.",)
    if initialize_from_teacher_layers:
        layers, fresh = _initial_layers(teacher, config.vision_config)
        weights.update(layers)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    student = SamLighteningModel._from_config(copy.deepcopy(config), dtype=torch.float32, **options)
    _load_exactly(student, weights, fresh)
    return student.eval()


def student_config(teacher: PreTrainedModel | SamDecoder, preset: str = "tiny", **vision_config) -> SamLighteningConfig:
    """Return a config with a preset's width, depth and heads, and the teacher's image, patch, embedding and decoder.

    Layers alternate between bands and the whole image, as published. A band is an eighth of the rows of tokens (8 of
    64, w=512 of N=4096) or, where 8 does not divide their number, the nearest number of rows that divides it. The whole
    image has r=2, or r=1 (full attention) where the number of rows is odd.

    Args:
        teacher: As in `create_student`.
        preset: Name of a preset ("tiny", ...).
        **vision_config: Fields of the vision config; they override all others.

    Raises:
        ValueError: For an unknown preset or a teacher that is not a SAM.
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
    """Initialize prompt encoder and mask decoder in place with torch's defaults, as the original SAM does.

    transformers initializes them with a standard deviation of 0.02, meant to be overwritten by a checkpoint. Trained
    from scratch, the embeddings of a box's two corners would start nearly equal, and so would the mask tokens: prompts
    would have no effect for many steps.
    """
    for part in (model.prompt_encoder, model.mask_decoder):
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


def initialize_positions(model: PreTrainedModel):
    """Initialize the image encoder's absolute positions in place with 2D sine-cosine embeddings, instead of zeros.

    Half of the channels encode the row, half the column, with wavelengths from 2 pi to 20,000 pi patches (He et al.,
    Masked Autoencoders, arXiv 2111.06377). They stay trainable. A model without absolute positions is left alone.

    Raises:
        ValueError: For a hidden size that is not divisible by 4.
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


def evenly_spaced_layers(num_teacher_layers: int, num_student_layers: int) -> tuple[int, ...]:
    """Return the teacher layer for each student layer: the first, the last, and evenly spaced ones between.

    A single student layer is matched to the teacher's last layer.

    Raises:
        ValueError: Where the student is deeper than its teacher.
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
    """Load a teacher and its processor. `save_pretrained` of both writes a folder that loads like any other.

    Args:
        path_or_repo: Folder, Hub name ("org/name"), or original `.pth` file.
        device: Name of a torch device, or "auto": CUDA where available, otherwise the CPU.
        dtype: "float32", "bfloat16" or "float16".

    Returns:
        The model in eval mode, and its processor.

    Raises:
        CheckpointError: As in `loading.load_model` and `convert_original_checkpoint`.
        ValueError: For a device or a dtype that cannot be used here.
    """
    path = Path(path_or_repo).expanduser()
    if path.suffix not in ORIGINAL_SUFFIXES or path.is_dir():
        return load_model(path_or_repo, device, dtype)
    torch_device, torch_dtype = find_device(device), find_dtype(dtype)
    model = convert_original_checkpoint(path)
    return model.to(torch_device, torch_dtype), make_processor(model.config.vision_config)


def _check_fit(config: SamLighteningConfig, decoder: SamDecoder):
    """Raise ValueError where the teacher's decoder would compute something else with the student's config."""
    vision, prompt = config.vision_config, decoder.prompt_encoder_config
    for name, value, teacher_value in (
        ("vision_config.output_channels", vision.output_channels, prompt.hidden_size),
        ("image_size // patch_size", vision.image_size // vision.patch_size, prompt.image_size // prompt.patch_size),
    ):
        if value != teacher_value:
            raise ValueError(
                f"the student's {name}={value} must equal the teacher's {teacher_value}, so that their image "
                "embeddings have the same size. Change the config, or use student_config(teacher, preset)."
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
    """Return evenly spaced teacher layers under the student's names, and prefixes of the weights that stay random."""
    if isinstance(teacher, SamDecoder):
        raise ValueError(
            "the teacher is a SamDecoder, which has no image encoder. Use initialize_from_teacher_layers=False."
        )
    teacher_config = teacher.config.vision_config
    for field in _LAYER_FIELDS:
        value, teacher_value = getattr(config, field), getattr(teacher_config, field)
        if value != teacher_value:
            raise ValueError(
                f"the student's {field}={value!r} and the teacher's {teacher_value!r} must agree to initialize its "
                "image encoder from the teacher's layers. Change the config, or use "
                "initialize_from_teacher_layers=False."
            )
    fresh: tuple[str, ...] = ()
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
    """Load the weights, compare them, and raise ValueError where any is missing, unexpected or misshapen.

    `weights` must hold every weight of the student except those whose names begin with one of `fresh`. Nothing is
    resized.
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
    "convert_original_checkpoint",
    "create_student",
    "evenly_spaced_layers",
    "initialize_decoder",
    "initialize_positions",
    "load_decoder",
    "load_teacher",
    "student_config",
]
