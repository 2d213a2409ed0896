"""Students created from a teacher."""

import argparse
import math

import pytest
import torch
from torch import nn
from transformers import SamConfig, SamModel

from samlight_hf import SamLighteningConfig, SamLighteningModel
from samlight_hf.conversion import (
    create_student,
    evenly_spaced_layers,
    initialize_positions,
    student_config,
)
from samlight_hf.loading import load_model
from tests.conftest import tiny_config


def sam_teacher(**vision_config):
    """Return a SAM of transformers with random weights: 8x8 tokens of 4x4 pixels, 6 layers, relative positions."""
    shape = tiny_config().vision_config
    vision_config = {
        "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": shape.image_size,
        "patch_size": shape.patch_size, "output_channels": 32, "num_pos_feats": 16, "window_size": 3,
        "global_attn_indexes": (2, 5), **vision_config,
    }  # fmt: skip
    config = SamConfig(
        vision_config=vision_config,
        prompt_encoder_config={"hidden_size": 32, "image_size": 32, "patch_size": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    )
    torch.manual_seed(0)
    model = SamModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def teacher():
    return sam_teacher()


def decoder_state(model):
    parts = ("shared_image_embedding.", "prompt_encoder.", "mask_decoder.")
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(parts)}


@pytest.mark.parametrize(("preset", "depth"), [("tiny", 6), ("small", 9)])
def test_a_student_has_the_preset_s_encoder_and_the_teacher_s_decoder(teacher, preset, depth, tmp_path):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = create_student(teacher, preset)
    vision = student.config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.output_channels) == (
        384,
        depth,
        32,
        32,
    )
    assert not student.training and all(parameter.requires_grad for parameter in student.parameters())
    copied, own = decoder_state(student), decoder_state(teacher)
    assert copied.keys() == own.keys() and len(own) > 100
    assert all(torch.equal(copied[name], own[name]) for name in own)
    embeddings = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(5))
    prompts = {"image_embeddings": embeddings, "input_boxes": torch.tensor([[[2.0, 3.0, 20.0, 30.0]]] * 2)}
    with torch.no_grad():
        assert torch.equal(student(**prompts).pred_masks, teacher(**prompts).pred_masks)
        assert student.get_image_embeddings(torch.randn(1, 3, 32, 32)).std() > 0.1

    with torch.no_grad():  # the student has copies of its own
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    if preset == "tiny":
        create_student(teacher).save_pretrained(tmp_path)
        loaded, _ = load_model(tmp_path, "cpu")
        assert all(torch.equal(tensor, own[name]) for name, tensor in decoder_state(loaded).items())


def test_a_student_is_float32_whatever_the_teacher_and_the_config_are(teacher):
    config = tiny_config()
    config.dtype = torch.bfloat16
    rounded = sam_teacher().bfloat16()
    student = create_student(rounded, config=config, attn_implementation="eager")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config.vision_config._attn_implementation == "eager"
    assert config.dtype == torch.bfloat16  # the caller's config is not changed
    own = decoder_state(rounded)
    assert all(torch.equal(tensor, own[name].float()) for name, tensor in decoder_state(student).items())


def test_the_fresh_encoder_follows_the_seed(teacher):
    students = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        students.append(create_student(teacher, config=tiny_config()).vision_encoder.layers[0].attn.qkv.weight)
    assert torch.equal(students[0], students[1])
    assert not torch.equal(students[0], students[2])


def test_layers_come_from_evenly_spaced_layers_of_the_teacher(teacher):
    student = create_student(teacher, config=tiny_config(), initialize_from_teacher_layers=True)
    own, copied = teacher.vision_encoder.state_dict(), student.vision_encoder.state_dict()
    chosen = {"0": "0", "1": "3", "2": "5"}  # 3 layers of 6: 0, 2.5 and 5
    for name, tensor in copied.items():
        part, _, rest = name.partition(".")
        if part == "layers":
            index, _, rest = rest.partition(".")
            name = f"layers.{chosen[index]}.{rest}"
        assert torch.equal(tensor, own[name]), name
    decoders = decoder_state(student), decoder_state(teacher)
    assert all(torch.equal(tensor, decoders[1][name]) for name, tensor in decoders[0].items())


def test_all_layers_of_a_sam_lightening_are_the_teacher_again(model, config, pixel_values):
    student = create_student(model, config=config, initialize_from_teacher_layers=True)
    boxes = torch.tensor([[[2.0, 3.0, 20.0, 30.0]]] * 2)
    with torch.no_grad():
        outputs = [m(pixel_values, input_boxes=boxes).pred_masks for m in (student, model)]
    assert torch.equal(*outputs)


def test_a_patch_embedding_of_another_size_stays_fresh_and_says_so(teacher, caplog):
    config = tiny_config(image_size=64, patch_size=8)  # 8x8 tokens too
    student = create_student(teacher, config=config, initialize_from_teacher_layers=True)
    assert "patch_size=8 is not the teacher's 4: its patch embedding stays fresh" in caplog.text
    assert torch.equal(student.vision_encoder.pos_embed, teacher.vision_encoder.pos_embed)
    assert student.vision_encoder.patch_embed.projection.bias.abs().max() == 0  # as it is initialized


@pytest.mark.parametrize(
    ("teacher_layers", "student_layers", "expected"),
    [
        (12, 6, (0, 2, 4, 7, 9, 11)),
        (32, 6, (0, 6, 12, 19, 25, 31)),
        (5, 5, (0, 1, 2, 3, 4)),
        (7, 1, (6,)),
        (2, 2, (0, 1)),
    ],
)
def test_evenly_spaced_layers(teacher_layers, student_layers, expected):
    assert evenly_spaced_layers(teacher_layers, student_layers) == expected
    with pytest.raises(ValueError, match=f"student of {teacher_layers + 1} layers.*teacher of {teacher_layers}"):
        evenly_spaced_layers(teacher_layers, teacher_layers + 1)


@pytest.mark.parametrize(
    ("num_rows", "segment_length", "dilation_rate"),
    [(64, 512, 2), (32, 4 * 32, 2), (8, 8, 2), (14, 2 * 14, 2), (7, 7, 1), (63, 7 * 63, 1), (48, 6 * 48, 2)],
)
def test_a_preset_s_bands_are_an_eighth_of_any_image(teacher, num_rows, segment_length, dilation_rate):
    sized = argparse.Namespace(
        prompt_encoder=teacher.prompt_encoder, mask_decoder=teacher.mask_decoder, state_dict=dict,
        config=SamConfig(
            prompt_encoder_config={"hidden_size": 32, "image_size": 16 * num_rows},
            mask_decoder_config={"hidden_size": 32},
        ),
    )  # fmt: skip
    config = student_config(sized, "tiny", layer_norm_eps=1e-5)
    patterns = config.vision_config.layer_patterns()
    assert [(p.segment_length, p.dilation_rate) for p in patterns[:2]] == [
        (segment_length, 1),
        (num_rows**2, dilation_rate),
    ]
    assert config.vision_config.layer_norm_eps == 1e-5
    if num_rows == 64:
        published = SamLighteningConfig.from_preset("tiny").vision_config
        assert patterns == published.layer_patterns()


def poisoned(value):
    model = sam_teacher()
    with torch.no_grad():
        model.vision_encoder.layers[4].mlp.lin2.bias[3] = value
    return model


def with_decoder(layer_norm_eps):
    config = tiny_config()
    config.mask_decoder_config.layer_norm_eps = layer_norm_eps
    return config


FROM_LAYERS = {"initialize_from_teacher_layers": True}
REFUSED = {
    "no SAM": (lambda t: {"teacher": nn.Linear(2, 2)}, "the teacher is a Linear, without SAM's prompt encoder"),
    "a vision model alone": (lambda t: {"teacher": t.vision_encoder}, "is a SamVisionEncoder, without SAM's"),
    "unknown preset": (lambda t: {"preset": "huge"}, "preset='huge' is not known. Use one of tiny, small, base"),
    "preset and config": (lambda t: {"preset": "tiny", "config": tiny_config()}, "Give one of them"),
    "another config": (lambda t: {"config": t.config}, "config is a SamConfig. Use a SamLighteningConfig"),
    "NaN": (
        lambda t: {"teacher": poisoned(math.nan)},
        "NaN or infinite values in vision_encoder.layers.4.mlp.lin2.bias",
    ),
    "inf": (lambda t: {"teacher": poisoned(-math.inf)}, "NaN or infinite values in vision_encoder.layers.4"),
    "embedding channels": (
        lambda t: {"config": tiny_config(output_channels=64, num_pos_feats=32)},
        "output_channels=64 must equal the teacher's 32",
    ),
    "embedding grid": (
        lambda t: {"config": tiny_config(image_size=64)},
        "image_size // patch_size=16 must equal the teacher's 8",
    ),
    "decoder arithmetic": (
        lambda t: {"config": with_decoder(layer_norm_eps=1e-3)},
        "mask_decoder_config.layer_norm_eps=0.001 must equal the teacher's 1e-06",
    ),
    "widths": (
        lambda t: {"preset": "tiny", **FROM_LAYERS},
        "hidden_size=384 and the teacher's 32 must agree",
    ),
    "mlp widths": (
        lambda t: {"config": tiny_config(mlp_dim=64), **FROM_LAYERS},
        "mlp_dim=64 and the teacher's 128 must agree",
    ),
    "depths": (
        lambda t: {"config": tiny_config(num_hidden_layers=7, segment_length=None, dilation_rate=2), **FROM_LAYERS},
        "student of 7 layers.*teacher of 6",
    ),
    "no positions": (
        lambda t: {"config": tiny_config(use_abs_pos=False), **FROM_LAYERS},
        "the student has no place for, first vision_encoder.pos_embed",
    ),
    "positions missing": (
        lambda t: {"teacher": sam_teacher(use_abs_pos=False), "config": tiny_config(), **FROM_LAYERS},
        "lacks 1 weights.*vision_encoder.pos_embed",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_student_is_refused(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_student(**{"teacher": teacher, **arguments(teacher)})


def test_what_a_teacher_s_decoder_has_more_or_less_is_refused():
    more = sam_teacher()
    more.mask_decoder.hq_token = nn.Embedding(1, 32)
    with pytest.raises(ValueError, match=r"no place for, first mask_decoder.hq_token.weight"):
        create_student(more, config=tiny_config())
    less = sam_teacher()
    del less.mask_decoder.iou_token
    with pytest.raises(
        ValueError, match=r"lacks 1 weights that the student needs, first mask_decoder.iou_token.weight"
    ):
        create_student(less, config=tiny_config())


def test_two_positional_embeddings_where_sam_has_one_are_refused():
    torn = sam_teacher()
    shared = torn.shared_image_embedding.positional_embedding
    torn.prompt_encoder.shared_embedding.positional_embedding = nn.Parameter(shared.detach() + 1)
    with pytest.raises(ValueError, match="is not the teacher's after loading.*tie_weights"):
        create_student(torn, config=tiny_config())
    torn.tie_weights()
    assert isinstance(create_student(torn, config=tiny_config()), SamLighteningModel)


def test_positions_begin_as_waves_that_tell_every_place(model):
    initialize_positions(model)
    positions = model.vision_encoder.pos_embed.detach()[0].flatten(0, 1)  # (N, C)
    distances = torch.cdist(positions, positions) + torch.eye(len(positions)) * 1e3
    assert distances.min() > 0.5
    quarter = positions.shape[1] // 4
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)
    row, column = 3, 5
    expected = torch.cat([wave(n * frequencies) for n in (row, column) for wave in (torch.sin, torch.cos)])
    torch.testing.assert_close(positions[row * 8 + column], expected)
