"""Conversion of original SAM checkpoints (`.pth`) to transformers' layout.

Every weight is accounted for: a missing, unexpected or misshapen weight raises an error that names it.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, SamConfig, SamModel
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from ..loading import LOADING_ERRORS, CheckpointError
from ..utils.messages import one_line


ORIGINAL_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
DECODER_PARTS = ("shared_image_embedding.", "prompt_encoder.", "mask_decoder.")

# Original names -> names in transformers' SamModel. The originals number the modules of these sequences, activations
# (None) included.
_SEQUENCES = {
    "image_encoder.neck": ("conv1", "layer_norm1", "conv2", "layer_norm2"),
    "prompt_encoder.mask_downscaling": ("conv1", "layer_norm1", None, "conv2", "layer_norm2", None, "conv3"),
    "mask_decoder.output_upscaling": ("upscale_conv1", "upscale_layer_norm", None, "upscale_conv2"),
}
_RENAMES = {  # applied one after the other
    r"^image_encoder\.blocks\.(\d+)\.norm([12])\.": r"image_encoder.layers.\1.layer_norm\2.",
    r"^image_encoder\.blocks\.": "image_encoder.layers.",
    r"^image_encoder\.patch_embed\.proj\.": "image_encoder.patch_embed.projection.",
    r"^image_encoder\.": "vision_encoder.",
    r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$": "shared_image_embedding.positional_embedding",
    r"^prompt_encoder\.point_embeddings\.": "prompt_encoder.point_embed.",
    r"^prompt_encoder\.mask_downscaling\.": "prompt_encoder.mask_embed.",
    r"^mask_decoder\.transformer\.(.*)norm(\d|_final_attn)\.": r"mask_decoder.transformer.\1layer_norm\2.",
    r"^mask_decoder\.output_upscaling\.": "mask_decoder.",
}
_SEQUENCE = re.compile(rf"^({'|'.join(map(re.escape, _SEQUENCES))})\.(\d+)\.")
# The originals number the linear layers of an MLP; transformers names them proj_in, layers.N and proj_out.
_PERCEPTRON = re.compile(r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.(\d+)\.")
_ANCHOR = "mask_decoder.iou_token.weight"  # in every original checkpoint; used to find the prefix of all names
_NESTED, _MAX_NESTING = ("model", "state_dict", "model_state_dict"), 4
_NUM_ATTENTION_HEADS = {768: 12, 1024: 16, 1280: 16}  # hidden size of ViT-B, ViT-L and ViT-H -> heads


@dataclass(frozen=True)
class SamDecoder:
    """Prompt encoder and mask decoder of a SAM, without its image encoder: the part that a student copies.

    Attributes:
        prompt_encoder_config: Config of the prompt encoder.
        mask_decoder_config: Config of the mask decoder.
        state_dict: Weights under transformers' names: shared_image_embedding.*, prompt_encoder.* and mask_decoder.*.
    """

    prompt_encoder_config: SamPromptEncoderConfig
    mask_decoder_config: SamMaskDecoderConfig
    state_dict: dict[str, torch.Tensor]

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "SamDecoder":
        """Take the two parts from any model that has transformers' SAM prompt encoder and mask decoder.

        Raises:
            ValueError: For a model without them.
        """
        parts = (getattr(model, "prompt_encoder", None), getattr(model, "mask_decoder", None))
        if not isinstance(parts[0], SamPromptEncoder) or not isinstance(parts[1], SamMaskDecoder):
            raise ValueError(
                f"the teacher is a {type(model).__name__}, without SAM's prompt encoder and mask decoder. "
                "Use a SamModel, a SamLighteningModel, or what load_teacher or load_decoder return."
            )
        state_dict = {name: value for name, value in model.state_dict().items() if name.startswith(DECODER_PARTS)}
        return cls(model.config.prompt_encoder_config, model.config.mask_decoder_config, state_dict)


def convert_original_checkpoint(
    path: str | Path,
    num_attention_heads: int | None = None,
    window_size: int | None = None,
    global_attn_indexes: tuple[int, ...] | None = None,
) -> SamModel:
    """Convert a checkpoint of Meta's original SAM to transformers' SamModel.

    The architecture is deduced from the shapes of the weights; arguments override it. They are needed where the image
    encoder has no relative positions, because these tell windowed layers from global ones. The mask decoder is assumed
    to have 8 heads, as in every SAM. The file is memory-mapped where possible, and pickled objects are never loaded.

    Args:
        path: File such as `sam_vit_b_01ec64.pth`, of any width, depth and image size.
        num_attention_heads: Heads of the image encoder. Without relative positions, only needed for other widths than
            those of ViT-B, ViT-L and ViT-H.
        window_size: Side of the attention windows in tokens; 0 for none.
        global_attn_indexes: Layers that attend globally.

    Returns:
        The model in float32, on the CPU, in eval mode.

    Raises:
        CheckpointError: For a file that holds no such checkpoint or needs pickled objects, for missing, unexpected,
            misshapen, NaN or infinite weights, and for an image encoder that is not SAM's ViT (MobileSAM; use
            `load_decoder`).
    """
    original = _Original.read(path)
    if "image_encoder.patch_embed.proj.weight" not in original.tensors:
        raise CheckpointError(
            f"{path}: its image encoder is not SAM's ViT (MobileSAM, for one, has a TinyViT), and transformers' SAM "
            "has no other. load_decoder takes its prompt encoder and mask decoder, from which create_student makes a "
            "student."
        )
    vision = _vision_config(original, num_attention_heads, window_size, global_attn_indexes)
    prompt, mask_decoder = _decoder_configs(original, vision.image_size, vision.patch_size)
    model = _without_weights(original.source, vision, prompt, mask_decoder)
    weights = _converted(original, model.state_dict())
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def load_decoder(path: str | Path, image_size: int = 1024, patch_size: int = 16) -> SamDecoder:
    """Load the prompt encoder and mask decoder of an original checkpoint with any image encoder, such as MobileSAM's.

    The image encoder's weights are ignored.

    Args:
        path: File such as `mobile_sam.pt`.
        image_size: Longest side of the model's input in pixels: the frame of the prompts. Ignored, like `patch_size`,
            where the image encoder is SAM's ViT, whose weights define both.
        patch_size: Pixels per side of an image token; the image embedding has `image_size // patch_size` rows.

    Raises:
        CheckpointError: As in `convert_original_checkpoint`.
    """
    original = _Original.read(path)
    if "image_encoder.pos_embed" in original.tensors:
        patch_size = original.shape("image_encoder.patch_embed.proj.weight", 4)[2]
        image_size = original.shape("image_encoder.pos_embed", 4)[1] * patch_size
    prompt, mask_decoder = _decoder_configs(original, image_size, patch_size)
    hidden_size = prompt.hidden_size
    vision = SamVisionConfig(
        num_hidden_layers=1, image_size=image_size, patch_size=patch_size, output_channels=hidden_size,
        num_pos_feats=hidden_size // 2,
    )  # fmt: skip
    expected = SamDecoder.from_model(_without_weights(original.source, vision, prompt, mask_decoder)).state_dict
    tensors = {name: value for name, value in original.tensors.items() if not name.startswith("image_encoder.")}
    return SamDecoder(prompt, mask_decoder, _converted(_Original(original.source, tensors), expected))


@dataclass(frozen=True)
class _Original:
    """Tensors of an original checkpoint under their original names, and the path of the file."""

    source: str
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, path: str | Path) -> "_Original":
        """Read the file without unpickling objects, and find SAM's weights in it under any prefix."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file. Give the path of a checkpoint file.")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (*LOADING_ERRORS, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: {_why_unreadable(error)}") from error
        for _ in range(_MAX_NESTING):
            if not isinstance(content, Mapping):
                break
            prefix = next((k[: -len(_ANCHOR)] for k in content if isinstance(k, str) and k.endswith(_ANCHOR)), None)
            if prefix is not None:  # "", "module.", "model." ...
                return cls(str(path), {str(name).removeprefix(prefix): value for name, value in content.items()})
            content = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        raise CheckpointError(
            f"{path}: holds no original SAM checkpoint: no weight is named {_ANCHOR}. "
            "A checkpoint of transformers is given by its folder."
        )

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """Return the shape of a tensor; raise CheckpointError unless it is there with `num_dims` dimensions."""
        shape = tuple(getattr(self.tensors.get(name), "shape", ()))
        if len(shape) != num_dims or 0 in shape:
            fault = f"{name} is {shape}, not of {num_dims} dimensions" if name in self.tensors else f"has no {name}"
            raise CheckpointError(f"{self.source}: {fault}. It is not in the layout of an original SAM.")
        return shape

    def count(self, prefix: str) -> int:
        """Count the layers of the list with this prefix."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({match[1] for match in map(pattern.match, self.tensors) if match})


def _why_unreadable(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        needs = f"the pickled object {name[1]}" if name else "more than tensors"
        return (
            f"needs {needs}, which can run code when read and is refused. Where you trust the file, load it yourself "
            "and save its state_dict alone with torch.save."
        )
    return f"truncated, damaged, or no file of torch.save ({one_line(error, 120)}). Copy or download it again."


def _vision_config(
    original: _Original,
    num_attention_heads: int | None,
    window_size: int | None,
    global_attn_indexes: tuple[int, ...] | None,
) -> SamVisionConfig:
    hidden_size, num_channels, patch_size, _ = original.shape("image_encoder.patch_embed.proj.weight", 4)
    grid_size = original.shape("image_encoder.pos_embed", 4)[1]
    num_layers = original.count("image_encoder.blocks")
    mlp_dim = original.shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0]
    use_rel_pos = "image_encoder.blocks.0.attn.rel_pos_h" in original.tensors
    if use_rel_pos:  # (2 * side - 1, head_dim), where side is that of the window or of the whole token grid
        rel_pos = [original.shape(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2) for i in range(num_layers)]
        sides = [(length + 1) // 2 for length, _ in rel_pos]
        windows = sorted({side for side in sides if side != grid_size})
        if len(windows) > 1:
            raise CheckpointError(
                f"{original.source}: relative positions for windows of {' and '.join(map(str, windows))} tokens in an "
                f"image of {grid_size}x{grid_size}; transformers' SAM has windows of one size."
            )
        if window_size is None:
            window_size = windows[0] if windows else 0
        if global_attn_indexes is None:
            global_attn_indexes = tuple(i for i, side in enumerate(sides) if side == grid_size)
        num_attention_heads = num_attention_heads or max(1, hidden_size // rel_pos[0][1])
    elif window_size is None or (window_size and global_attn_indexes is None):
        raise CheckpointError(
            f"{original.source}: its image encoder has no relative positions, which tell windowed from global layers. "
            "Give window_size (0: no windows) and global_attn_indexes."
        )
    num_attention_heads = num_attention_heads or _NUM_ATTENTION_HEADS.get(hidden_size)
    if num_attention_heads is None or hidden_size % num_attention_heads:
        raise CheckpointError(
            f"{original.source}: num_attention_heads={num_attention_heads} does not fit hidden_size={hidden_size}. "
            "Give num_attention_heads, a divisor."
        )
    return SamVisionConfig(
        hidden_size=hidden_size,
        output_channels=original.shape("image_encoder.neck.0.weight", 4)[0],
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_channels=num_channels,
        image_size=grid_size * patch_size,
        patch_size=patch_size,
        qkv_bias="image_encoder.blocks.0.attn.qkv.bias" in original.tensors,
        mlp_ratio=mlp_dim / hidden_size,
        mlp_dim=mlp_dim,
        use_rel_pos=use_rel_pos,
        window_size=window_size,
        global_attn_indexes=tuple(global_attn_indexes or ()),
        num_pos_feats=original.shape("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", 2)[1],
    )


def _decoder_configs(
    original: _Original, image_size: int, patch_size: int
) -> tuple[SamPromptEncoderConfig, SamMaskDecoderConfig]:
    hidden_size = original.shape("prompt_encoder.no_mask_embed.weight", 2)[1]
    inner_size = original.shape("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", 2)[0]
    prompt = SamPromptEncoderConfig(
        hidden_size=hidden_size,
        image_size=image_size,
        patch_size=patch_size,
        mask_input_channels=original.shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        num_point_embeddings=original.count("prompt_encoder.point_embeddings"),
    )
    mask_decoder = SamMaskDecoderConfig(
        hidden_size=hidden_size,
        mlp_dim=original.shape("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        num_hidden_layers=original.count("mask_decoder.transformer.layers"),
        attention_downsample_rate=max(1, hidden_size // inner_size),
        num_multimask_outputs=original.shape("mask_decoder.mask_tokens.weight", 2)[0] - 1,
        iou_head_depth=original.count("mask_decoder.iou_prediction_head.layers"),
        iou_head_hidden_dim=original.shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
        layer_norm_eps=1e-5,  # as in the original's transformer blocks; transformers' default is 1e-6
    )
    return prompt, mask_decoder


def _without_weights(
    source: str, vision: SamVisionConfig, prompt: SamPromptEncoderConfig, mask_decoder: SamMaskDecoderConfig
) -> SamModel:
    """Create the model on the meta device, without spending time and memory on random weights."""
    try:
        with torch.device("meta"):
            return SamModel(
                SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask_decoder)
            )
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{source}: no SAM has these shapes ({one_line(error, 120)}).") from error


def _converted(original: _Original, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return float32 copies under transformers' names; raise CheckpointError unless all of them are expected."""
    num_perceptron_layers = original.count("mask_decoder.iou_prediction_head.layers")
    weights = {}
    for name, tensor in original.tensors.items():
        new_name = _new_name(name, num_perceptron_layers)
        if new_name not in expected:
            raise CheckpointError(f"{original.source}: {name} does not belong to an original SAM.")
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise CheckpointError(f"{original.source}: {name} is {kind}, not a floating point tensor.")
        if tensor.shape != expected[new_name].shape:
            raise CheckpointError(
                f"{original.source}: {name} is {tuple(tensor.shape)}, but the other weights and the arguments make "
                f"it {tuple(expected[new_name].shape)}."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{original.source}: NaN or infinite values in {name}. Use another checkpoint.")
        weights[new_name] = tensor.to(torch.float32, copy=True)
    if (shared := weights.get("shared_image_embedding.positional_embedding")) is not None:
        weights["prompt_encoder.shared_embedding.positional_embedding"] = shared
    if missing := sorted(expected.keys() - weights.keys()):
        raise CheckpointError(f"{original.source}: {len(missing)} weights are missing, first {missing[0]} of SamModel.")
    return weights


def _new_name(name: str, num_iou_head_layers: int) -> str:
    if match := _SEQUENCE.match(name):
        members, index = _SEQUENCES[match[1]], int(match[2])
        if index < len(members) and members[index]:
            name = f"{match[1]}.{members[index]}.{name[match.end() :]}"
    elif match := _PERCEPTRON.match(name):
        last = (num_iou_head_layers if match[1].endswith("iou_prediction_head") else 3) - 1
        index = int(match[2])
        layer = {0: "proj_in", last: "proj_out"}.get(index, f"layers.{index - 1}")
        name = f"{match[1]}.{layer}.{name[match.end() :]}"
    for pattern, replacement in _RENAMES.items():
        name = re.sub(pattern, replacement, name)
    return name
