import copy

import pytest
import torch
from samlight_hf.modeling import dilated_attention, modeling_sam_lightening
from samlight_hf.modeling.dilated_attention import dilated_attention_reference
from transformers import SamConfig, SamModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from samlight_hf import SamLighteningModel, SamLighteningVisionModel
from tests.conftest import tiny_config


PATTERNS = {
    "full": {"segment_length": None, "dilation_rate": 1},
    "dilated": {},
    "per_head": {"dilation_offsets": "per_head"},
    "windowed": {
        "window_size": 3,  # does not divide the grid of 8: windows are padded
        "global_attn_indexes": (2,),
        "segment_length": (None, None, 32),
        "dilation_rate": (1, 3, 4),
    },
}


def sam_of_same_shape(model: SamLighteningModel) -> SamModel:
    """Make transformers' SAM without relative positions, with the same weights."""
    config = model.config.to_dict()
    config["vision_config"] = {**config["vision_config"], "model_type": "sam_vision_model"}
    sam = SamModel(
        SamConfig(**{k: config[k] for k in ("vision_config", "prompt_encoder_config", "mask_decoder_config")})
    )
    sam.load_state_dict(model.state_dict(), strict=True)
    return sam.eval()


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(2, 3, 2, 2, generator=generator) * 32
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0], [1.0, 1.0, 30.0, 30.0], [5.0, 8.0, 9.0, 30.0]]).repeat(2, 1, 1)
    return {
        "points": {"input_points": points},
        "labelled points": {"input_points": points, "input_labels": torch.tensor([[[1, 0], [1, -10], [0, 1]]] * 2)},
        "boxes": {"input_boxes": boxes},
        "boxes and points": {"input_boxes": boxes, "input_points": points},
        "mask": {"input_boxes": boxes[:, :1], "input_masks": torch.randn(2, 1, 32, 32, generator=generator)},
        "nothing": {},
    }


@pytest.mark.parametrize("windows", [{}, {"window_size": 3, "global_attn_indexes": (1,)}], ids=["global", "windowed"])
@pytest.mark.parametrize("attn_implementation", ["dilated_flash_attention", "sdpa", "eager"])
def test_undilated_model_is_transformers_sam(windows, attn_implementation, prompts, pixel_values):
    """With the same weights, w=N, r=1 and no relative positions, all outputs agree for every kind of prompt."""
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config(**PATTERNS["full"], **windows)).eval()
    model.set_attn_implementation(attn_implementation)
    sam = sam_of_same_shape(model)
    for name, prompt in prompts.items():
        for multimask_output in (True, False):
            with torch.no_grad():
                ours = model(pixel_values, multimask_output=multimask_output, output_hidden_states=True, **prompt)
                theirs = sam(pixel_values, multimask_output=multimask_output, output_hidden_states=True, **prompt)
            torch.testing.assert_close(ours.pred_masks, theirs.pred_masks, rtol=1e-4, atol=1e-5, msg=name)
            torch.testing.assert_close(ours.iou_scores, theirs.iou_scores, rtol=1e-4, atol=1e-5, msg=name)
            for our_state, their_state in zip(ours.vision_hidden_states, theirs.vision_hidden_states, strict=True):
                torch.testing.assert_close(our_state, their_state, rtol=1e-4, atol=1e-5)


def test_patch_embedding_is_the_convolution(model, pixel_values):
    projection = model.vision_encoder.patch_embed.projection
    expected = torch.nn.functional.conv2d(pixel_values, projection.weight, projection.bias, stride=projection.stride)
    torch.testing.assert_close(projection(pixel_values), expected)
    channels_last = pixel_values.to(memory_format=torch.channels_last)
    torch.testing.assert_close(projection(channels_last), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_implementations_equal_the_reference(pattern, pixel_values, monkeypatch):
    """Every attn_implementation that runs on a CPU equals a model whose attention is the slow reference."""
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config(**PATTERNS[pattern])).eval()

    def reference(module, query, key, value, scaling, **kwargs):
        tokens = (heads_first.transpose(1, 2) for heads_first in (query, key, value))
        where = (module.segment_length, module.dilation_rate, module.dilation_offsets)
        return dilated_attention_reference(*tokens, *where, scaling=scaling)

    with monkeypatch.context() as patched:
        calls = []
        patched.setitem(
            modeling_sam_lightening.ALL_ATTENTION_FUNCTIONS,
            "dilated_flash_attention",
            lambda *args, **kwargs: calls.append(1) or reference(*args, **kwargs),
        )
        expected = model.get_image_embeddings(pixel_values)
        assert len(calls) == 3
    for attn_implementation in ("dilated_flash_attention", "sdpa", "eager"):
        model.set_attn_implementation(attn_implementation)
        torch.testing.assert_close(model.get_image_embeddings(pixel_values), expected, rtol=1e-4, atol=1e-5)


def test_which_attention_function_runs(model, pixel_values, monkeypatch):
    """The default runs our dispatcher; a name runs that dense function on the groups: (B*N/w, r*H, w/r, D)."""
    ran = []
    dense_attention = dilated_attention.dense_attention
    monkeypatch.setattr(
        dilated_attention, "dense_attention", lambda q, *a, **k: ran.append(q.shape) or dense_attention(q, *a, **k)
    )
    model.get_image_embeddings(pixel_values)
    assert ran == [(2, 32, 8, 8), (8, 16, 4, 8), (2, 16, 16, 8)]

    functions = modeling_sam_lightening.ALL_ATTENTION_FUNCTIONS
    sdpa = functions["sdpa"]
    shapes = []
    monkeypatch.setitem(functions, "sdpa", lambda m, q, *a, **k: shapes.append(q.shape) or sdpa(m, q, *a, **k))
    model.set_attn_implementation("sdpa")
    model.get_image_embeddings(pixel_values)
    assert shapes == [(2, 8, 32, 8), (8, 4, 16, 8), (2, 16, 16, 8)]
    assert len(ran) == 3


@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attention_that_is_not_installed_is_refused_with_the_reason(config, model, version, tmp_path):
    from transformers.utils import import_utils

    if getattr(import_utils, f"is_flash_attn_{version}_available")():
        pytest.skip(f"flash_attention_{version} is installed here")
    name = f"flash_attention_{version}"
    with pytest.raises((ImportError, ValueError), match=f"(?i)flash.?attention.?{version}"):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises((ImportError, ValueError), match=f"(?i)flash.?attention.?{version}"):
        SamLighteningModel.from_pretrained(tmp_path, attn_implementation=name)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_image_never_changes_another(pattern, pixel_values):
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config(**PATTERNS[pattern])).eval()
    together = model.get_image_embeddings(pixel_values)
    for image in range(2):
        alone = model.get_image_embeddings(pixel_values[image : image + 1])
        torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-4, atol=1e-5)


def test_receptive_field_of_the_pattern(pixel_values):
    """Without the neck's 3x3 convolution, a patch moves its own group's tokens and no other, through one layer."""
    torch.manual_seed(0)
    vision_config = {"num_hidden_layers": 1, "segment_length": 32, "dilation_rate": 4, "initializer_range": 0.2}
    encoder = SamLighteningModel(tiny_config(**vision_config)).eval().vision_encoder

    def tokens(pixels):
        with torch.no_grad():
            return encoder(pixels, output_hidden_states=True).hidden_states[-1].flatten(1, 2)[0]

    before = tokens(pixel_values[:1])
    for patch in (0, 5, 33, 63):
        changed = pixel_values[:1].clone()
        row, column = divmod(patch, 8)
        changed[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 1.0
        moved = ((tokens(changed) - before).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()
        assert moved == [n for n in range(64) if n // 32 == patch // 32 and n % 4 == patch % 4]


def test_attention_weights_are_those_of_the_reference(model, pixel_values):
    model.set_attn_implementation("eager")
    outputs = model(pixel_values, input_points=torch.rand(2, 1, 1, 2) * 32, output_attentions=True)
    assert [weights.shape for weights in outputs.vision_attentions] == [(2, 8, 32, 32), (8, 4, 16, 16), (2, 16, 16, 16)]
    for weights in outputs.vision_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert len(outputs.mask_decoder_attentions) == 2

    # Layer 0 has w=N and r=2: row (rho * H + h) of the weights is the dense map at [rho::2, rho::2] of head h.
    attention = model.vision_encoder.layers[0].attn
    hidden_states = model.vision_encoder.layers[0].layer_norm1(
        model.vision_encoder.patch_embed(pixel_values) + model.vision_encoder.pos_embed
    )
    query, key, value = attention.qkv(hidden_states).view(2, 64, 3, 4, 8).unbind(2)
    _, dense = dilated_attention_reference(query, key, value, 64, 2)
    for residue_class in range(2):
        ours = outputs.vision_attentions[0][:, residue_class * 4 : residue_class * 4 + 4]
        torch.testing.assert_close(ours, dense[:, :, residue_class::2, residue_class::2], rtol=1e-4, atol=1e-6)


def test_image_embeddings_may_be_given(model, pixel_values, prompts):
    with torch.no_grad():
        embeddings = model.get_image_embeddings(pixel_values)
        direct = model(pixel_values, **prompts["boxes"])
        from_embeddings = model(image_embeddings=embeddings, **prompts["boxes"])
    torch.testing.assert_close(direct.pred_masks, from_embeddings.pred_masks)
    assert embeddings.shape == (2, 32, 8, 8)


def test_image_of_another_size_is_refused(model):
    with pytest.raises(ValueError, match=r"16\*16.*32\*32"):
        model(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_pixels_that_are_not_normalized_are_refused(model, dtype):
    with pytest.raises(ValueError, match="rescale and normalize"):
        model(torch.zeros(1, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, pixel_values, prompts, dtype):
    """Inputs are float32; outputs have the model's dtype and are close to those of float32."""
    with torch.no_grad():
        expected = model(pixel_values, **prompts["boxes and points"])
        half = copy.deepcopy(model).to(dtype)
        outputs = half(pixel_values, **prompts["boxes and points"])
    assert outputs.pred_masks.dtype == outputs.iou_scores.dtype == dtype
    error = (outputs.pred_masks - expected.pred_masks).norm() / expected.pred_masks.norm()
    assert error < 0.1


def test_autocast_trains_in_bfloat16(model, pixel_values):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.vision_encoder(pixel_values).last_hidden_state.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.vision_encoder.parameters())


def test_gradient_checkpointing_changes_no_gradient(config, pixel_values):
    torch.manual_seed(0)
    model = SamLighteningModel(config).train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.vision_encoder.layers)
        model(
            pixel_values, input_boxes=torch.tensor([[[2.0, 3.0, 20.0, 25.0]]] * 2)
        ).pred_masks.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_attention_dropout_is_for_training_only(pixel_values):
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config(attention_dropout=0.5)).eval()
    for attn_implementation in ("dilated_flash_attention", "sdpa", "eager"):
        model.set_attn_implementation(attn_implementation)
        assert torch.equal(model.eval().get_image_embeddings(pixel_values), model.get_image_embeddings(pixel_values))
        model.train()
        assert not torch.equal(model.get_image_embeddings(pixel_values), model.get_image_embeddings(pixel_values))


def test_fresh_model_has_a_signal_and_learns(config, pixel_values):
    """With the parents' initializer_range the layers would add nothing, and prompts would be noise."""
    torch.manual_seed(0)
    model = SamLighteningModel(config)
    assert model.vision_encoder.layers[0].attn.qkv.weight.std() > 0.01
    assert model.vision_encoder.pos_embed.std() > 0.01
    assert 0.5 < model.shared_image_embedding.positional_embedding.std() < 2.0
    target = torch.zeros(2, 32, 32)
    target[:, 4:20, 6:22] = 1.0
    box = torch.tensor([[[6.0, 4.0, 22.0, 20.0]]] * 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        logits = model(pixel_values, input_boxes=box, multimask_output=False).pred_masks[:, 0, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("attn_implementation", ["dilated_flash_attention", "sdpa", "eager"])
@pytest.mark.parametrize("pattern", ["dilated", "per_head", "windowed"])
def test_compiles_in_one_graph(pattern, attn_implementation, pixel_values, prompts):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = SamLighteningModel(tiny_config(**PATTERNS[pattern])).eval()
    model.set_attn_implementation(attn_implementation)
    with torch.no_grad():
        expected = model(pixel_values, **prompts["boxes"])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        outputs = compiled(pixel_values, **prompts["boxes"])
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-5)


def test_inductor_computes_the_same(model, pixel_values, prompts):
    torch.compiler.reset()
    maybe_install_capturing_hooks(model)
    with torch.no_grad():
        expected = model(pixel_values, output_hidden_states=True, **prompts["points"])
        compiled = torch.compile(model, fullgraph=True)
        outputs = compiled(pixel_values, output_hidden_states=True, **prompts["points"])
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-5)
    assert len(outputs.vision_hidden_states) == 4


def test_exports(model, pixel_values, prompts):
    class Segmenter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values, input_boxes):
            outputs = self.model(pixel_values=pixel_values, input_boxes=input_boxes, multimask_output=False)
            return outputs.pred_masks, outputs.iou_scores

    arguments = (pixel_values, prompts["boxes"]["input_boxes"])
    dynamic = ({0: torch.export.Dim("batch", min=1, max=16)}, {0: torch.export.Dim("batch", min=1, max=16)})
    with torch.no_grad():
        program = torch.export.export(Segmenter(), arguments, dynamic_shapes=dynamic).module()
        for batch_size in (1, 2):
            part = [argument[:batch_size] for argument in arguments]
            for ours, theirs in zip(program(*part), Segmenter()(*part)):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_vision_model(config, model, pixel_values, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    vision_model = SamLighteningVisionModel.from_pretrained(tmp_path)
    assert torch.equal(vision_model(pixel_values).last_hidden_state, model.get_image_embeddings(pixel_values))
    assert not caplog.records
    outputs = vision_model(pixel_values, output_hidden_states=True)
    assert [state.shape for state in outputs.hidden_states] == [(2, 8, 8, 32)] * 4


def test_prompt_encoder_and_mask_decoder_of_a_plain_sam_load(config, model, tmp_path):
    torch.manual_seed(5)
    sam = sam_of_same_shape(model)
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter)
    parts = ("prompt_encoder", "mask_decoder", "shared_image_embedding")
    for part in parts:
        getattr(model, part).load_state_dict(getattr(sam, part).state_dict(), strict=True)
        for name, parameter in getattr(model, part).named_parameters():
            assert torch.equal(parameter, getattr(sam, part).get_parameter(name))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(model, pixel_values, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    loaded = SamLighteningModel.from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(loaded.get_image_embeddings(pixel_values), model.get_image_embeddings(pixel_values))


def test_device_map_with_offloading(model, pixel_values, tmp_path):
    """Weights stay on disk until their module runs, so no weight may be used outside its module's forward."""
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "shared_image_embedding": "cpu",
        "prompt_encoder": "cpu",
        "mask_decoder": "cpu",
        "vision_encoder": "disk",
    }
    loaded = SamLighteningModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.vision_encoder.layers[0].attn.qkv.weight.device.type == "meta"
    torch.testing.assert_close(loaded.get_image_embeddings(pixel_values), model.get_image_embeddings(pixel_values))
