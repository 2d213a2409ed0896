"""Conversion of original checkpoints, compared with an independent implementation of the original SAM."""

import argparse
import math
import os

import pytest
import torch

from samlight_hf.conversion import (
    convert_original_checkpoint,
    create_student,
    load_decoder,
    load_teacher,
    student_config,
)
from samlight_hf.loading import CheckpointError

from .original_sam import OriginalSam


POINTS = torch.tensor([[[5.0, 9.0], [30.0, 41.0]], [[20.0, 3.0], [11.5, 40.0]], [[47.0, 0.0], [24.0, 24.0]]])
LABELS = torch.tensor([[1, 0], [1, 1], [0, 1]])
BOXES = torch.tensor([[2.0, 4.0, 40.0, 44.0], [10.0, 0.0, 20.0, 47.0], [30.5, 20.0, 47.0, 30.0]])
MASK = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(2))
PIXELS = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(3))
PROMPTS = {
    "points": {"points": POINTS, "labels": LABELS},
    "boxes": {"boxes": BOXES},
    "points and boxes": {"points": POINTS, "labels": LABELS, "boxes": BOXES},
    "boxes and a mask": {"boxes": BOXES, "mask": MASK},
}


def double(prompts):
    return {name: value.double() if value.is_floating_point() else value for name, value in prompts.items()}


def assert_same(model, original, image, prompts, multimask_output=True):
    """Compare both models in float64, where rounding errors cannot hide a difference."""
    model, original, prompts = model.double(), original.double(), double(prompts)
    names = {"points": "input_points", "labels": "input_labels", "boxes": "input_boxes"}
    inputs = {names[name]: value[None] for name, value in prompts.items() if name in names}
    if "mask" in prompts:
        inputs["input_masks"] = prompts["mask"]
    with torch.no_grad():
        outputs = model(
            **inputs, **{name: value.double() for name, value in image.items()}, multimask_output=multimask_output
        )
    masks, scores = original(
        image["pixel_values"].double() if "pixel_values" in image else None,
        image["image_embeddings"].double() if "image_embeddings" in image else None,
        multimask_output, **prompts,
    )  # fmt: skip
    assert masks.std() > 1e-3
    torch.testing.assert_close(outputs.pred_masks[0], masks, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs.iou_scores[0], scores, rtol=1e-9, atol=1e-9)


@pytest.fixture
def original():
    return OriginalSam().eval()


@pytest.fixture
def save(tmp_path):
    def write(content, name="sam.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_a_converted_model_computes_what_the_original_does(original, save, prompts, multimask_output):
    model = convert_original_checkpoint(save(original.state_dict()))
    assert_same(model, original, {"pixel_values": PIXELS}, prompts, multimask_output)


def test_the_shape_is_deduced_from_the_weights(save):
    original = OriginalSam(decoder_depth=3, num_masks=4, iou_depth=5).eval()
    model = convert_original_checkpoint(save(original.state_dict()))
    vision, decoder = model.config.vision_config, model.config.mask_decoder_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.mlp_dim) == (32, 4, 2, 128)
    assert (vision.image_size, vision.patch_size, vision.window_size, vision.global_attn_indexes) == (48, 8, 4, (1, 3))
    assert (decoder.num_hidden_layers, decoder.num_multimask_outputs, decoder.iou_head_depth) == (3, 4, 5)
    assert model.dtype == torch.float32 and not model.training
    embedding = model.prompt_encoder.shared_embedding.positional_embedding
    assert embedding is model.shared_image_embedding.positional_embedding
    assert_same(model, original, {"pixel_values": PIXELS}, PROMPTS["points"])


def test_windows_and_heads_are_asked_for_where_no_relative_positions_tell(original, save):
    state = original.state_dict()
    for name in [name for name in state if "rel_pos" in name]:
        state.pop(name).zero_()
    path = save(state)
    with pytest.raises(CheckpointError, match="no relative positions.*Give window_size"):
        convert_original_checkpoint(path)
    with pytest.raises(CheckpointError, match="hidden_size=32.*Give num_attention_heads"):
        convert_original_checkpoint(path, window_size=4, global_attn_indexes=(1, 3))
    model = convert_original_checkpoint(path, num_attention_heads=2, window_size=4, global_attn_indexes=(1, 3))
    assert_same(model, original, {"pixel_values": PIXELS}, PROMPTS["points"])


@pytest.mark.parametrize("kind", ["model", "state_dict", "module.", "trainer", "legacy", "float16"])
def test_checkpoints_are_found_as_people_save_them(original, save, kind):
    state, options = original.state_dict(), {}
    if kind == "float16":
        state = {name: tensor.half() for name, tensor in state.items()}
    content = dict(state)
    if kind in ("model", "state_dict"):
        content = {kind: state, "epoch": 3}
    elif kind == "module.":
        content = {f"module.{name}": tensor for name, tensor in state.items()}
    elif kind == "trainer":
        content = {"state_dict": {f"model.sam.{name}": tensor for name, tensor in state.items()}, "lr": [1e-4]}
    elif kind == "legacy":
        options = {"_use_new_zipfile_serialization": False}
    path = save(content, **options)
    model = convert_original_checkpoint(path)
    with open(path, "r+b") as file:  # the weights must be copies, not memory-mapped
        file.write(bytes(path.stat().st_size))
    weight = model.vision_encoder.layers[2].attn.qkv.weight
    assert torch.equal(weight, state["image_encoder.blocks.2.attn.qkv.weight"].float())


class CallsTheShell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_is_refused_and_not_run(original, save, tmp_path):
    with pytest.raises(CheckpointError, match=r"sam.pth: needs the pickled object argparse.Namespace.*refused"):
        convert_original_checkpoint(save({"model": original.state_dict(), "args": argparse.Namespace(lr=1)}))
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        path = save({"model": original.state_dict(), "x": CallsTheShell(tmp_path / "ran")}, **options)
        for read in (convert_original_checkpoint, load_decoder, load_teacher):
            with pytest.raises(CheckpointError, match="can run code when read and is refused"):
                read(path)
    assert not (tmp_path / "ran").exists()


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


def _with(name, value):
    return lambda state: state | {name: value}


def endless():
    content = {}
    content["model"] = content
    return content


BROKEN = {
    "a missing weight": (
        lambda s: _without(s, "mask_decoder.iou_token.weight") | {"mask_decoder.iou_token.weights": 0},
        "holds no original SAM",
    ),
    "a missing block weight": (
        lambda s: _without(s, "image_encoder.blocks.2.norm1.bias"),
        "1 weights are missing, first vision_encoder.layers.2.layer_norm1.bias",
    ),
    "a missing size": (
        lambda s: _without(s, "image_encoder.neck.0.weight"),
        "has no image_encoder.neck.0.weight",
    ),
    "an unknown weight": (_with("image_encoder.extra", torch.ones(1)), "image_encoder.extra does not belong"),
    "an unknown sequence weight": (
        _with("image_encoder.neck.4.weight", torch.ones(1)),
        "image_encoder.neck.4.weight does not belong",
    ),
    "a stray weight": (
        lambda s: {f"module.{k}": v for k, v in s.items()} | {"head.weight": torch.ones(1)},
        "head.weight does not belong",
    ),
    "a wrong shape": (
        _with("mask_decoder.output_upscaling.0.bias", torch.ones(9)),
        r"output_upscaling.0.bias is \(9,\).*\(8,\)",
    ),
    "a wrong number of dimensions": (
        _with("image_encoder.pos_embed", torch.ones(1, 36, 32)),
        r"pos_embed is \(1, 36, 32\), not of 4",
    ),
    "NaN": (
        _with("image_encoder.pos_embed", torch.full((1, 6, 6, 32), math.nan)),
        "NaN or infinite values in image_encoder.pos_embed",
    ),
    "integers": (
        _with("image_encoder.pos_embed", torch.ones(1, 6, 6, 32, dtype=torch.int8)),
        "pos_embed is torch.int8",
    ),
    "two sizes of windows": (
        _with("image_encoder.blocks.0.attn.rel_pos_h", torch.ones(5, 16)),
        "windows of 3 and 4 tokens in an image of 6x6",
    ),
    "a width that 8 heads cannot share": (
        _with("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", torch.ones(10, 32)),
        "no SAM has these shapes",
    ),
    "an endless nesting": (lambda s: endless(), "holds no original SAM checkpoint"),
    "no mapping": (lambda s: [torch.ones(1)], "holds no original SAM checkpoint"),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused(original, save, breaks, message):
    with pytest.raises(CheckpointError, match=message):
        convert_original_checkpoint(save(breaks(original.state_dict())))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "folder"])
def test_a_file_that_cannot_be_read_is_refused(original, save, damage):
    path = save(original.state_dict())
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello world " * 20}[damage]
        )
    message = "no such file" if damage in ("missing", "folder") else "truncated, damaged, or no file of torch.save"
    with pytest.raises(CheckpointError, match=message):
        convert_original_checkpoint(path)


def test_a_teacher_is_a_file_or_a_folder_in_safetensors(original, save, tmp_path):
    from_file, processor = load_teacher(save(original.state_dict()), device="cpu")
    from_file.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model.safetensors").is_file()
    from_folder, processor = load_teacher(tmp_path / "teacher", device="cpu")
    assert processor.image_processor.pad_size["height"] == 48
    assert_same(from_folder, original, {"pixel_values": PIXELS}, PROMPTS["boxes"])
    assert load_teacher(tmp_path / "sam.pth", "cpu", "bfloat16")[0].dtype == torch.bfloat16
    for missing in (tmp_path / "none.pth", "none.pth"):
        with pytest.raises(CheckpointError, match="none.pth: no such file"):
            load_teacher(missing)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_teacher(tmp_path / "none")


def mobile_sam_state(original):
    """Return weights in MobileSAM's layout: another image encoder, with the integers of batch norm."""
    decoder = {k: v for k, v in original.state_dict().items() if not k.startswith("image_encoder.")}
    return {
        "image_encoder.patch_embed.seq.0.c.weight": torch.ones(4, 3, 3, 3),
        "image_encoder.patch_embed.seq.0.bn.num_batches_tracked": torch.tensor(0),
        "image_encoder.neck.0.weight": torch.ones(32, 16, 1, 1),
        **decoder,
    }


def test_a_student_of_mobile_sam_decodes_as_it_does(original, save):
    path = save(mobile_sam_state(original), "mobile_sam.pt")
    for read in (convert_original_checkpoint, load_teacher):
        with pytest.raises(CheckpointError, match="TinyViT.*load_decoder"):
            read(path)
    teacher = load_decoder(path, image_size=48, patch_size=8)
    student = create_student(teacher, config=student_config(teacher, hidden_size=48, num_hidden_layers=6))
    embedding = torch.randn(1, 32, 6, 6, generator=torch.Generator().manual_seed(4))
    for prompts in PROMPTS.values():
        assert_same(student, original, {"image_embeddings": embedding}, prompts)
    with pytest.raises(ValueError, match="SamDecoder, which has no image encoder"):
        create_student(teacher, initialize_from_teacher_layers=True)


def test_a_decoder_knows_its_frame(original, save):
    config = load_decoder(save(original.state_dict())).prompt_encoder_config
    assert (config.image_size, config.patch_size, config.image_embedding_size) == (48, 8, 6)
    config = load_decoder(save(mobile_sam_state(original))).prompt_encoder_config
    assert (config.image_size, config.patch_size, config.image_embedding_size) == (1024, 16, 64)
    with pytest.raises(CheckpointError, match="mask_decoder.hq does not belong"):
        load_decoder(save(mobile_sam_state(original) | {"mask_decoder.hq": torch.ones(1)}))
