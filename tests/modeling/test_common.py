"""Tests of SamLighteningModel that follow transformers' common tests of SamModel, which are not installed with it."""

import copy
import inspect
import pickle

import pytest
import torch
from safetensors import safe_open
from transformers import AttentionInterface, AutoModel, AutoModelForMaskGeneration, PreTrainedModel

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
    """_init_weights initializes all weights that a checkpoint lacks, with the distribution of a fresh model."""
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
    """Prompt encoder and model share the coordinate embedding: one tensor, saved once, tied again on loading."""
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
def test_masks_return_to_the_size_of_the_image(model, tmp_path, size):
    from PIL import Image
    from transformers import AutoProcessor

    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", size[::-1], (120, 60, 200))
    inputs = processor(images=image, input_boxes=[[[0, 0, size[1], size[0]]]], return_tensors="pt")
    inputs["input_boxes"] = inputs["input_boxes"].float()
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    with torch.no_grad():
        outputs = model(**{k: inputs[k] for k in ("pixel_values", "input_boxes")})
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert masks[0].shape == (1, 3, *size)
    assert masks[0].dtype == torch.bool


def test_training_reaches_every_weight(config, pixel_values):
    """One step has points, boxes and masks."""
    model = SamLighteningModel(config).train()
    points = torch.rand(2, 1, 2, 2) * 32
    labels = torch.tensor([[[1, 0]]] * 2)
    outputs = model(pixel_values, input_points=points, input_labels=labels)
    loss = outputs.pred_masks.square().mean() + outputs.iou_scores.square().mean()
    outputs = model(pixel_values, input_boxes=BOXES, input_masks=torch.randn(2, 1, 32, 32), multimask_output=False)
    loss = loss + outputs.pred_masks.square().mean() + outputs.iou_scores.square().mean()
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


PARTS = ("", "vision_config", "prompt_encoder_config", "mask_decoder_config")
DEFAULT = ("dilated_flash_attention", "dilated_flash_attention", "sdpa", "sdpa")


def implementations(model_or_config) -> tuple[str | None, ...]:
    """Return the attention implementation of every part, in the order of PARTS."""
    config = getattr(model_or_config, "config", model_or_config)
    return tuple((getattr(config, part) if part else config)._attn_implementation for part in PARTS)


def eager_model(config) -> SamLighteningModel:
    config._attn_implementation = "eager"
    model = SamLighteningModel(config).eval()
    assert implementations(model) == ("eager",) * 4
    return model


def test_attention_set_by_a_string_is_set_in_every_part(config, caplog):
    model = eager_model(config)
    model.set_attn_implementation("sdpa")
    assert implementations(model) == ("sdpa",) * 4
    with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")
    assert implementations(model) == ("sdpa",) * 4
    model.set_attn_implementation("eager")
    assert implementations(model) == ("eager",) * 4
    assert not caplog.records


def test_attention_of_the_vision_model_is_set_by_a_string(config):
    model = SamLighteningVisionModel(config.vision_config)
    assert model.vision_encoder.config._attn_implementation == "dilated_flash_attention"
    for name in ("eager", "sdpa", "dilated_flash_attention"):
        model.set_attn_implementation(name)
        assert model.vision_encoder.config._attn_implementation == name
    with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")


def test_attention_set_by_a_dict_is_set_in_the_parts_it_names(config, caplog):
    model = eager_model(config)
    expected = ["eager"] * 4
    for index, part in enumerate(PARTS):
        model.set_attn_implementation({part: "sdpa"})
        expected[index] = "sdpa"
        assert implementations(model) == tuple(expected)
    model.set_attn_implementation({"vision_config": "dilated_flash_attention", "mask_decoder_config": "eager"})
    assert implementations(model) == ("sdpa", "dilated_flash_attention", "sdpa", "eager")
    assert not caplog.records


def test_attention_of_the_mask_decoder_stays_until_a_call_names_it(model):
    model.set_attn_implementation({"mask_decoder_config": "eager"})
    for other in (
        {"": "sdpa"},
        {"vision_config": "sdpa"},
        {"": "eager", "vision_config": "dilated_flash_attention"},
        {},
    ):
        model.set_attn_implementation(other)
        assert model.mask_decoder.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")  # names every part
    assert model.mask_decoder.config._attn_implementation == "sdpa"


def test_default_attention_may_be_asked_for_by_name(config, caplog):
    assert implementations(SamLighteningModel(copy.deepcopy(config))) == DEFAULT
    model = eager_model(config)
    model.set_attn_implementation("dilated_flash_attention")
    assert implementations(model) == (*DEFAULT[:2], "sdpa", "sdpa")
    model.set_attn_implementation("eager")
    model.set_attn_implementation(None)
    assert implementations(model) == DEFAULT
    assert not caplog.records


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ({"": "foo"}, "foo"),
        ({"": "sdpa", "vision_config": "foo"}, "foo"),
        ({"": "sdpa", "vision_config": "sdpa", "mask_decoder_config": "foo"}, "foo.*mask_decoder_config"),
        ({"": "sdpa", "prompt_encoder_config": "foo"}, "foo.*prompt_encoder_config"),
        ({"mask_decoder_config": "flash_attention_2"}, 'flash_attention_2.*mask_decoder_config.*"sdpa" or "eager"'),
        ({"mask_decoder_config": "flex_attention"}, "flex_attention.*mask_decoder_config"),
    ],
)
def test_attention_that_a_part_cannot_run_is_refused_and_nothing_changes(config, asked, part, tmp_path):
    model = eager_model(config)
    with pytest.raises(ValueError, match=part):
        model.set_attn_implementation(asked)
    assert implementations(model) == ("eager",) * 4
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=part):
        SamLighteningModel.from_pretrained(tmp_path, attn_implementation=asked)


@pytest.mark.parametrize("chosen", ["flash_attention_2", "sdpa"])
def test_flash_attention_asked_of_every_part_leaves_the_mask_decoder_its_sdpa(config, monkeypatch, chosen):
    """The package need not be installed: `chosen` is the implementation that transformers takes for it."""

    def check(self, name, *args, **kwargs):
        return chosen if name == "flash_attention_2" else name

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", check)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    config._attn_implementation = "flash_attention_2"
    model = SamLighteningModel(config)
    assert implementations(model) == (chosen, chosen, "sdpa", "sdpa")
    model.set_attn_implementation("eager")
    model.set_attn_implementation("flash_attention_2")
    assert implementations(model) == (chosen, chosen, "sdpa", "sdpa")


def test_attention_function_of_ones_own_runs_in_every_part(model, pixel_values):
    ran = []

    def own(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
        ran.append(type(module).__name__)
        weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("own_attention", own)
    try:
        with torch.no_grad():
            expected = model(pixel_values, input_boxes=BOXES).pred_masks
            model.set_attn_implementation("own_attention")
            masks = model(pixel_values, input_boxes=BOXES).pred_masks
    finally:
        del AttentionInterface._global_mapping["own_attention"]
    assert ran.count("SamLighteningVisionAttention") == 3
    assert ran.count("SamAttention") == 7  # three in each of two layers, and the last one
    torch.testing.assert_close(masks, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", [SamLighteningModel, AutoModel, AutoModelForMaskGeneration])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, DEFAULT),
        ("dilated_flash_attention", DEFAULT),
        ("sdpa", ("sdpa",) * 4),
        ("eager", ("eager",) * 4),
        ({"": "eager", "mask_decoder_config": "sdpa"}, ("eager", *DEFAULT[1:])),
        ({"": "eager"}, ("eager", *DEFAULT[1:])),
        ({"vision_config": "eager", "mask_decoder_config": "sdpa"}, (DEFAULT[0], "eager", "sdpa", "sdpa")),
        ({"mask_decoder_config": "eager"}, (*DEFAULT[:3], "eager")),
    ],
)
def test_attention_asked_for_while_loading(model, pixel_values, tmp_path, load, asked, expected):
    """The implementation of the saved model does not matter: it is not part of a checkpoint."""
    model.set_attn_implementation("eager" if asked != "eager" else "sdpa")
    model.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path, **({} if asked is None else {"attn_implementation": asked}))
    assert implementations(loaded) == expected
    with torch.no_grad():
        outputs, expected_outputs = (m(pixel_values, input_boxes=BOXES) for m in (loaded, model))
    torch.testing.assert_close(outputs.pred_masks, expected_outputs.pred_masks, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_modules_take_the_attention_of_their_part(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    loaded = SamLighteningModel.from_pretrained(tmp_path, attn_implementation=name)
    attentions = [module for module in loaded.modules() if type(module).__name__.endswith("Attention")]
    assert len(attentions) == 3 + 7
    assert {module.config._attn_implementation for module in attentions} == {name}


def test_attention_of_a_config(config):
    values = config.to_dict()
    made = SamLighteningConfig(**values, attn_implementation="eager")
    assert implementations(made) == ("eager",) * 4
    made._attn_implementation = "sdpa"
    assert implementations(made) == ("sdpa",) * 4
    made._attn_implementation = {"": "eager", "vision_config": "dilated_flash_attention"}
    assert implementations(made) == implementations(SamLighteningModel(made))
    assert implementations(made) == ("eager", "dilated_flash_attention", "sdpa", "sdpa")
    assert implementations(SamLighteningModel._from_config(config, attn_implementation="sdpa")) == ("sdpa",) * 4


def test_parts_share_the_configs_of_the_whole(model):
    assert model.vision_encoder.config is model.config.vision_config
    assert model.mask_decoder.config is model.config.mask_decoder_config
    for module in model.modules():
        if type(module).__name__ == "SamAttention":
            assert module.config is model.config.mask_decoder_config


def test_attentions_asked_for_by_the_config(config, pixel_values):
    """As in SamModel, for the whole model and the image encoder; a config needs "eager" before a model is made."""
    config.output_attentions = config.vision_config.output_attentions = True
    model = SamLighteningModel(config).eval()
    assert implementations(model) == ("eager",) * 4
    outputs = model(pixel_values, input_boxes=BOXES)
    assert (len(outputs.vision_attentions), len(outputs.mask_decoder_attentions)) == (3, 2)
    without = model(pixel_values, input_boxes=BOXES, output_attentions=False)
    assert without.vision_attentions is None
    assert without.mask_decoder_attentions is None


def test_main_input_and_prefix(any_model):
    assert any_model.main_input_name == "pixel_values"
    assert any_model.base_model is any_model
    assert all(isinstance(tensor, torch.Tensor) for tensor in any_model.state_dict().values())


def test_every_tensor_is_a_parameter_or_a_buffer(any_model, pixel_values):
    """Other tensors would stay behind when the model moves to another device."""
    for module in any_model.modules():
        stray = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not stray, f"{type(module).__name__}: {stray}"


def test_pickle_and_copy_change_no_output(any_model, pixel_values, tmp_path):
    torch.save(any_model.state_dict(), tmp_path / "weights.pt")
    loaded = type(any_model)(copy.deepcopy(any_model.config)).eval()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        expected = any_model(pixel_values)
        for other in (loaded, copy.deepcopy(any_model), pickle.loads(pickle.dumps(any_model))):
            outputs = other(pixel_values)
            assert all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_weights_that_a_checkpoint_lacks_are_named(model, tmp_path):
    weights = model.state_dict()
    lacking = {"mask_decoder.iou_token.weight", "vision_encoder.neck.conv1.weight"}
    model.save_pretrained(tmp_path, state_dict={name: value for name, value in weights.items() if name not in lacking})
    _, info = SamLighteningModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lacking
    model.save_pretrained(tmp_path)
    _, info = SamLighteningModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_weights_that_are_not_contiguous_are_saved(model, tmp_path):
    weight = model.vision_encoder.layers[0].mlp.lin1.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    model.save_pretrained(tmp_path)
    loaded = SamLighteningModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.vision_encoder.layers[0].mlp.lin1.weight, weight)


def test_it_can_be_made_on_meta_and_loaded_there(model, tmp_path):
    with torch.device("meta"):
        empty = SamLighteningModel(copy.deepcopy(model.config))
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    model.save_pretrained(tmp_path)
    with torch.device("cpu"):
        loaded = SamLighteningModel.from_pretrained(tmp_path)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}


def test_buffers_have_an_initialisation(any_model):
    """A checkpoint may lack buffers, which then come from the "meta" device, without values."""
    loaded = type(any_model).from_pretrained(None, config=copy.deepcopy(any_model.config), state_dict={})
    for name, buffer in any_model.named_buffers():
        other = loaded.get_buffer(name)
        assert other.isfinite().all(), name
        assert 0.5 < (other.std() / buffer.std()).item() < 2.0, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_with_either_kind_of_checkpointing(config, pixel_values, use_reentrant):
    model = SamLighteningModel(config).train()
    model.enable_input_require_grads()  # like PEFT: reentrant checkpointing needs an input with a gradient
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(pixel_values, input_boxes=BOXES).pred_masks.square().mean().backward()
    encoder = dict(model.vision_encoder.named_parameters())
    assert not [name for name, parameter in encoder.items() if parameter.grad is None]
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model.vision_encoder.layers)
    model.disable_input_require_grads()


def test_frozen_encoder_lets_gradients_through_to_its_input(model, pixel_values):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    patches = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: patches.append(output))
    assert model(pixel_values, input_boxes=BOXES).pred_masks.requires_grad
    handle.remove()
    assert patches[0].requires_grad


def test_a_part_of_the_checkpoint_loads_as_its_config(config, tmp_path):
    """The parts' configs load from the folder of the whole model, as transformers' ConfigTester requires."""
    config.save_pretrained(tmp_path)
    for part in PARTS[1:]:
        expected = getattr(config, part)
        loaded = type(expected).from_pretrained(tmp_path)
        assert loaded.to_dict() == expected.to_dict()
    assert SamLighteningConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert SamLighteningConfig.from_json_file(tmp_path / "config.json").to_json_string() == config.to_json_string()
