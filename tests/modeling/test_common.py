"""What transformers' own common tests ask of SamModel, asked of ours (transformers does not install those tests)."""

import copy
import inspect

import pytest
import torch
from safetensors import safe_open

from samlight_hf import SamLighteningConfig, SamLighteningModel, SamLighteningVisionModel
from tests.conftest import tiny_config


BOXES = torch.tensor([[[2.0, 3.0, 20.0, 25.0]]] * 2)


@pytest.fixture(params=[SamLighteningModel, SamLighteningVisionModel])
def any_model(request, config):
    torch.manual_seed(0)
    return request.param(config if request.param is SamLighteningModel else config.vision_config).eval()


def test_forward_signature(any_model):
    assert next(iter(inspect.signature(any_model.forward).parameters)) == "pixel_values"


def test_determinism(any_model, pixel_values):
    first, second = any_model(pixel_values), any_model(pixel_values)
    for name in first:
        assert torch.equal(first[name], second[name])


def test_save_and_load_change_no_output(any_model, pixel_values, tmp_path):
    any_model.save_pretrained(tmp_path)
    loaded = type(any_model).from_pretrained(tmp_path)
    expected, outputs = any_model(pixel_values), loaded(pixel_values)
    for name in expected:
        assert torch.equal(outputs[name], expected[name])


def test_save_and_load_in_a_subfolder(model, tmp_path):
    model.save_pretrained(tmp_path / "sub")
    loaded = SamLighteningConfig.from_pretrained(tmp_path, subfolder="sub")
    assert loaded.vision_config.layer_patterns() == model.config.vision_config.layer_patterns()
    loaded = SamLighteningModel.from_pretrained(tmp_path, subfolder="sub")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_every_weight_has_an_initialisation(any_model):
    """Weights that a checkpoint lacks are made by _init_weights: the same ones as a fresh model's, none left empty."""
    torch.manual_seed(3)
    fresh = type(any_model)(copy.deepcopy(any_model.config))
    torch.manual_seed(3)
    loaded = type(any_model).from_pretrained(None, config=copy.deepcopy(any_model.config), state_dict={})
    for name, weight in fresh.named_parameters():
        other = loaded.get_parameter(name)
        assert other.isfinite().all(), name
        # The order of random draws differs, so their spread is compared.
        if weight.numel() > 64 and weight.std() > 0:
            assert 0.7 < (other.std() / weight.std()).item() < 1.4, name
        elif weight.std() == 0:
            assert torch.equal(other, weight), name


@pytest.mark.parametrize("from_config", [True, False])
def test_hidden_states(any_model, pixel_values, from_config):
    kwargs = {}
    if from_config:
        any_model.config.output_hidden_states = True
        if hasattr(any_model.config, "vision_config"):
            any_model.config.vision_config.output_hidden_states = True
    else:
        kwargs["output_hidden_states"] = True
    outputs = any_model(pixel_values, **kwargs)
    hidden_states = outputs.get("vision_hidden_states", outputs.get("hidden_states"))
    assert [state.shape for state in hidden_states] == [(2, 8, 8, 32)] * 4


def test_attentions_of_the_vision_model(config, pixel_values):
    model = SamLighteningVisionModel(config.vision_config).eval()
    model.set_attn_implementation("eager")
    outputs = model(pixel_values, output_attentions=True)
    assert len(outputs.attentions) == 3
    assert outputs.hidden_states is None


def test_gradients_of_hidden_states_and_attentions(config, pixel_values):
    model = SamLighteningModel(config)
    model.set_attn_implementation("eager")
    outputs = model(pixel_values, input_boxes=BOXES, output_hidden_states=True, output_attentions=True)
    captured = [*outputs.vision_hidden_states[:-1], *outputs.vision_attentions]
    for tensor in captured:
        tensor.retain_grad()
    outputs.pred_masks.flatten()[0].backward()
    assert all(tensor.grad is not None for tensor in captured)


def test_tuple_output_is_the_dictionary_output(any_model, pixel_values):
    as_tuple = any_model(pixel_values, return_dict=False)
    as_dict = any_model(pixel_values)
    assert len(as_tuple) == len(as_dict.to_tuple())
    for ours, theirs in zip(as_tuple, as_dict.to_tuple()):
        assert torch.equal(ours, theirs)


def test_input_embeddings(any_model):
    assert isinstance(any_model.get_input_embeddings(), torch.nn.Module)


def test_tied_weights(model, tmp_path):
    """The prompt encoder's coordinate embedding is the model's: one tensor, saved once, tied again on loading."""
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "shared_image_embedding.positional_embedding" in file.keys()  # noqa: SIM118
        assert "prompt_encoder.shared_embedding.positional_embedding" not in file.keys()  # noqa: SIM118
    for loaded in (model, SamLighteningModel.from_pretrained(tmp_path)):
        shared = loaded.shared_image_embedding.positional_embedding
        assert loaded.prompt_encoder.shared_embedding.positional_embedding is shared


def test_mismatched_shapes_are_refused_unless_asked(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = tiny_config(hidden_size=64)
    with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes|mismatched"):
        SamLighteningModel.from_pretrained(tmp_path, config=other)
    loaded = SamLighteningModel.from_pretrained(tmp_path, config=other, ignore_mismatched_sizes=True)
    assert loaded.vision_encoder.pos_embed.shape == (1, 8, 8, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"])
def test_load_in_another_dtype(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = SamLighteningModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32 if dtype == "auto" else dtype}


@pytest.mark.parametrize("size", [(20, 30), (57, 32), (1, 1), (9, 200)])
def test_masks_return_to_the_size_of_the_picture(model, tmp_path, size):
    from PIL import Image
    from transformers import AutoProcessor

    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    picture = Image.new("RGB", size[::-1], (120, 60, 200))
    inputs = processor(images=picture, input_boxes=[[[0, 0, size[1], size[0]]]], return_tensors="pt")
    inputs["input_boxes"] = inputs["input_boxes"].float()
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    with torch.no_grad():
        outputs = model(**{k: inputs[k] for k in ("pixel_values", "input_boxes")})
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert masks[0].shape == (1, 3, *size)
    assert masks[0].dtype == torch.bool


def test_training_reaches_every_weight(config, pixel_values):
    """With points, boxes and masks in one step."""
    model = SamLighteningModel(config).train()
    points = torch.rand(2, 1, 2, 2) * 32
    labels = torch.tensor([[[1, 0]]] * 2)
    outputs = model(pixel_values, input_points=points, input_labels=labels)
    loss = outputs.pred_masks.square().mean() + outputs.iou_scores.square().mean()
    outputs = model(pixel_values, input_boxes=BOXES, input_masks=torch.randn(2, 1, 32, 32), multimask_output=False)
    loss = loss + outputs.pred_masks.square().mean() + outputs.iou_scores.square().mean()
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
