"""A model whose modules differ from its config keeps its outputs on every fast path: that part runs in the model."""

import copy
import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from torch import nn
from torch.nn.utils import parametrize
from transformers import SamConfig, SamModel, pipeline

from samlight_hf import MaskGenerator, Predictor, SamLighteningModel, modeling
from samlight_hf.engine.image_encoder import FastVisionEncoder, why_not_fast_encoder
from samlight_hf.engine.mask_decoder import FastMaskDecoder
from samlight_hf.engine.optimize import optimize
from samlight_hf.engine.plain_decoder import PlainMaskDecoder
from samlight_hf.engine.plain_modules import base_model, why_not_plain_decoder, why_not_plain_encoder
from samlight_hf.images.preprocessing import preprocess
from tests.conftest import tiny_config
from tests.inference.test_mask_generation import KEEP_ALL, assert_equal_to_stock, random_image, stock

from .test_optimize import assert_equal, make_inputs


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ENCODER, DECODER = "image encoder", "mask decoder"
SETTINGS = {**KEEP_ALL, "points_per_crop": 3}


def loud_model(config=None) -> SamLighteningModel:
    """Make a model with masks of some spots and scores around 0.5, see `tiny` in test_mask_generation."""
    torch.manual_seed(0)
    model = SamLighteningModel(config or tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.mask_decoder.iou_prediction_head.proj_out.bias.fill_(0.5)
        for mlp in model.mask_decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(1000)
            mlp.proj_out.bias.mul_(1000)
    return model


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def loud(device):
    return loud_model().to(device)


class Added(nn.Linear):
    """A linear layer plus another function, like the layers of LoRA."""

    @classmethod
    def of(cls, linear: nn.Linear) -> nn.Linear:
        other = copy.deepcopy(linear)
        other.__class__ = cls
        return other

    def forward(self, values):
        return super().forward(values) + 0.5 * torch.sin(5 * super().forward(values))


class OwnHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Linear(width, 4)

    def forward(self, token):
        return 0.5 + self.mix(token).tanh()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Wrapped(torch.Tensor):
    """A tensor subclass that changes the results of operations, like the quantized weights of torchao."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        doubled = function is nn.functional.linear and isinstance(args[1], Wrapped)
        return (2 * result).as_subclass(torch.Tensor) if doubled else result

    def __deepcopy__(self, memo):
        return self.detach().clone()


def lora(*targets: str):
    def alter(model):
        peft = pytest.importorskip("peft")
        torch.manual_seed(2)
        targets_ = targets[0] if targets == ("all-linear",) else list(targets)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets_, init_lora_weights=False)).eval()

    return alter


def quantized(model):
    quantization = pytest.importorskip("torch.ao.quantization")
    if model.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("dynamic quantization is the CPU's")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces a move to torchao
        return quantization.quantize_dynamic(model, {nn.Linear})


def in_place(change):
    def alter(model):
        change(model)
        return model

    return alter


def _last_attention(model):
    return model.mask_decoder.transformer.layers[1].cross_attn_token_to_image


def _first_layer(model):
    return model.vision_encoder.layers[0]


def _replace(model, get, name, new):
    setattr(get(model), name, new(getattr(get(model), name)))


def _own_head(model):
    torch.manual_seed(2)
    model.mask_decoder.iou_prediction_head = OwnHead(32).to(model.device, model.dtype)


def _wrap(model):
    attention = _last_attention(model)
    attention.v_proj.weight = nn.Parameter(attention.v_proj.weight.detach().as_subclass(Wrapped), requires_grad=False)


def _own_forward(model):
    linear = _last_attention(model).out_proj
    linear.forward = lambda values: 2 * nn.functional.linear(values, linear.weight, linear.bias)


def _own_embedding(model):
    encoder = model.prompt_encoder
    embed = encoder._embed_boxes
    encoder._embed_boxes = lambda boxes: 2 * embed(boxes)


def _double(module, args, output):
    return 2 * output


def _double_input(module, args):
    return tuple(2 * value for value in args)


BOTH = (ENCODER, DECODER)
# A change of a model, the parts that then run as in the model, and a word of the reason.
ALTERED = {
    "lora q and v": (lora("q_proj", "v_proj"), (DECODER,), "lora"),
    "lora k and out": (lora("k_proj", "out_proj"), (DECODER,), "lora"),
    "lora all-linear": (lora("all-linear"), BOTH, "lora"),
    "lora qkv": (lora("qkv"), (ENCODER,), "lora"),
    "quantized": (quantized, BOTH, "quantized"),
    "a layer like lora's": (
        in_place(lambda model: _replace(model, lambda m: _first_layer(m).attn, "qkv", Added.of)),
        (ENCODER,),
        "Added",
    ),
    "an own IoU head": (in_place(_own_head), (DECODER,), "OwnHead"),
    "another activation": (
        in_place(lambda model: _replace(model, lambda m: m.mask_decoder, "activation", lambda _: nn.SiLU())),
        (DECODER,),
        "SiLU",
    ),
    "a sigmoid": (
        in_place(lambda model: setattr(model.mask_decoder.iou_prediction_head, "sigmoid_output", True)),
        (DECODER,),
        "sigmoid_output=True",
    ),
    "a hook in the decoder": (
        in_place(lambda model: _last_attention(model).q_proj.register_forward_hook(_double)),
        (DECODER,),
        "hook",
    ),
    "a hook before the encoder's": (
        in_place(lambda model: _first_layer(model).attn.proj.register_forward_pre_hook(_double_input)),
        (ENCODER,),
        "hook",
    ),
    "a parametrization": (
        in_place(lambda m: parametrize.register_parametrization(_last_attention(m).v_proj, "weight", Doubled())),
        (DECODER,),
        "ParametrizedLinear",
    ),
    "a parametrization of the encoder": (
        in_place(lambda model: parametrize.register_parametrization(_first_layer(model).mlp.lin2, "weight", Doubled())),
        (ENCODER,),
        "ParametrizedLinear",
    ),
    "a tensor subclass": (in_place(_wrap), (DECODER,), "Wrapped"),
    "a forward of an instance": (in_place(_own_forward), (DECODER,), "forward of its own"),
    "another method of an instance": (in_place(_own_embedding), (DECODER,), "_embed_boxes of its own"),
}  # fmt: skip


@pytest.fixture(params=ALTERED.values(), ids=ALTERED)
def altered(request, loud):
    """The altered model, the parts that run as in it, and a word of the reason."""
    alter, parts, reason = request.param
    before = predict_by_hand(loud)
    model = alter(loud)
    after = predict_by_hand(model)
    changed = [not torch.allclose(one, other, rtol=1e-3) for one, other in zip(before, after)]
    assert any(changed)  # else the paths could not be told apart
    return model, parts, reason


IMAGE = random_image(50, 40)
BOX = (5, 6, 40, 30)


@torch.no_grad()
def predict_by_hand(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute scores and logits of the box by calling the model."""
    inputs = make_processor(base_model(model).config.vision_config)(
        IMAGE, input_boxes=[[[float(value) for value in BOX]]], return_tensors="pt"
    )
    inputs = inputs.to(base_model(model).device)
    pixel_values = preprocess_as_here(model)
    outputs = base_model(model)(pixel_values=pixel_values, input_boxes=inputs["input_boxes"])
    return outputs.iou_scores[0].float(), outputs.pred_masks[0].float()


def preprocess_as_here(model) -> torch.Tensor:
    base = base_model(model)
    processor = make_processor(base.config.vision_config).image_processor
    image = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1)
    return preprocess(processor, [image], base.device, base.dtype)


def made_with_warnings(make, parts, reason):
    """Call `make` and check that it warns of these parts, of each once and with the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make()
    told = [str(warning.message) for warning in caught if "runs as in the model" in str(warning.message)]
    assert sorted(message.split(" runs")[0] for message in told) == sorted(f"The {part}" for part in parts)
    assert all(reason in message for message in told)
    return made


def test_predictor(altered):
    model, parts, reason = altered
    processor = make_processor(base_model(model).config.vision_config)
    predictor = made_with_warnings(lambda: Predictor(model, processor, output="torch"), parts, reason)
    assert isinstance(predictor.decoder, PlainMaskDecoder if DECODER in parts else FastMaskDecoder)
    assert (predictor.encoder.copied is None) == (ENCODER in parts)
    actual = predictor.set_image(IMAGE).predict(boxes_xyxy=[BOX])
    scores, logits = predict_by_hand(model)
    tolerance = 1e-6 if DECODER in parts else 1e-4  # the model's own decoder, or one of fewer operations
    torch.testing.assert_close(actual.scores, scores, rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(actual.logits, logits, rtol=10 * tolerance, atol=tolerance * logits.abs().max().item())


@pytest.mark.parametrize("by_pipeline", [False, True])
def test_everything_mode_and_its_pipeline(altered, by_pipeline):
    model, parts, reason = altered
    processor = make_processor(base_model(model).config.vision_config)
    # As many points at once as in the stock pipeline: a quantized layer scales a batch as a whole.
    expected = stock(base_model(model), processor, IMAGE, **SETTINGS)
    if by_pipeline:
        task = made_with_warnings(
            lambda: pipeline("fast-mask-generation", model=model, image_processor=processor.image_processor),
            parts,
            reason,
        )
        generator = task.generator
        actual = task(IMAGE, points_per_batch=16, **SETTINGS)
        assert torch.allclose(actual["scores"], torch.as_tensor(expected["scores"]).cpu(), atol=1e-4)
        assert len(actual["masks"]) == len(expected["masks"]) > 0
    else:
        generator = made_with_warnings(lambda: MaskGenerator(model, processor, points_per_batch=16), parts, reason)
        assert_equal_to_stock(generator(IMAGE, **SETTINGS), expected)
    assert isinstance(generator.decoder, PlainMaskDecoder if DECODER in parts else FastMaskDecoder)
    assert (generator.encoder.copied is None) == (ENCODER in parts)


def test_optimize(altered):
    model, parts, reason = altered
    optimized = made_with_warnings(lambda: optimize(model, dtype=torch.float32), parts, reason)
    assert isinstance(optimized, type(model))
    assert optimized.report.decoder.startswith("plain: " if DECODER in parts else "fused")
    assert (reason in optimized.report.encoder) == (ENCODER in parts)
    for batch_size in (1, 2):
        inputs = make_inputs(base_model(model), batch_size)
        with torch.no_grad():
            assert_equal(optimized(**inputs), model(**inputs), 1e-6 if DECODER in parts else 1e-3)


def test_merged_adapters_are_fast_again(loud):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(loud, config).eval()
    scores, logits = predict_by_hand(adapted)
    merged = adapted.merge_and_unload()
    processor = make_processor(merged.config.vision_config)
    predictor = made_with_warnings(lambda: Predictor(merged, processor, output="torch"), (), "")
    assert isinstance(predictor.decoder, FastMaskDecoder) and predictor.encoder.copied is not None
    actual = predictor.set_image(IMAGE).predict(boxes_xyxy=[BOX])
    torch.testing.assert_close(actual.scores, scores, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actual.logits, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())


def test_an_adapter_that_is_switched_off_is_off(loud):
    adapted = lora("all-linear")(loud)
    predictor = Predictor(adapted, make_processor(loud.config.vision_config), output="torch")
    with adapted.disable_adapter():
        actual = predictor.set_image(IMAGE).predict(boxes_xyxy=[BOX])
        scores, _ = predict_by_hand(adapted)
    torch.testing.assert_close(actual.scores, scores)


def test_hooks_that_transformers_has_left_do_not_matter(loud):
    inputs = make_inputs(loud)
    loud(**inputs, output_hidden_states=True, output_attentions=True)
    hooks = sum(len(module._forward_hooks) for module in loud.modules())
    assert hooks > 0
    assert why_not_plain_encoder(loud) is None and why_not_plain_decoder(loud) is None
    optimized = made_with_warnings(lambda: optimize(loud, dtype=torch.float32), (), "")
    with torch.no_grad():
        assert_equal(optimized(**inputs), loud(**inputs), 1e-3)


def test_other_things_that_would_be_read_around(loud):
    """The altered models above lack these: methods of the model, hooks of all modules, and weights without values."""

    class Subclass(SamLighteningModel):
        def get_image_embeddings(self, pixel_values, **kwargs):
            return 2 * super().get_image_embeddings(pixel_values, **kwargs)

    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "for all modules" in why_not_plain_encoder(loud) and "for all modules" in why_not_plain_decoder(loud)
    finally:
        handle.remove()
    handle = loud.register_forward_hook(lambda *_: None)
    assert "the model has a forward hook" in why_not_plain_decoder(loud)
    handle.remove()
    loud.config.mask_decoder_config._attn_implementation_internal = "my_attention"
    assert "attention is 'my_attention'" in why_not_plain_decoder(loud)
    loud.config.mask_decoder_config._attn_implementation_internal = "sdpa"
    loud.__class__ = Subclass
    assert "get_image_embeddings of its own" in why_not_plain_encoder(loud)
    assert why_not_plain_decoder(loud) is None
    loud.__class__ = SamLighteningModel
    norm = loud.vision_encoder.layers[1].layer_norm1
    norm.weight = nn.Parameter(norm.weight.to("meta"))
    assert "layers.1.layer_norm1 has a weight without numbers" in why_not_plain_encoder(loud)
    norm.weight = nn.Parameter(torch.ones(32, dtype=torch.float64, device=loud.device))
    assert "layers.1.layer_norm1.weight is torch.float64" in why_not_plain_encoder(loud)
    loud.mask_decoder.iou_token.extra = nn.Identity()
    assert "iou_token.extra is one more" in why_not_plain_decoder(loud)


def test_the_code_of_a_checkpoint_is_known_where_it_is_the_same(monkeypatch):
    """trust_remote_code=True makes new classes, from files that may differ from ours."""
    folder = Path(modeling.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "code_of_a_checkpoint", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    code = importlib.import_module(f"{spec.name}.modeling_sam_lightening")
    model = code.SamLighteningModel(code.SamLighteningConfig(**tiny_config().to_dict())).eval()
    assert type(model) is not SamLighteningModel
    assert why_not_plain_encoder(model) is None and why_not_plain_decoder(model) is None
    monkeypatch.setattr(code.SamLighteningVisionAttention, "forward", lambda self, hidden_states: (hidden_states, None))
    assert "SamLighteningVisionAttention" in why_not_plain_encoder(model)


def test_asking_does_not_draw_random_numbers(loud):
    state = torch.get_rng_state()
    assert why_not_plain_encoder(loud) is None and why_not_plain_decoder(loud) is None
    assert torch.equal(state, torch.get_rng_state())


@torch.no_grad()
def load(model):
    torch.manual_seed(3)
    model.load_state_dict({name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()})


def write_to_data(model):
    """Write to `.data`: like a fused optimizer's step, this does not change torch's version counters."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))


def step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    outputs = model(**make_inputs(model))
    (outputs.pred_masks.float().mean() + outputs.iou_scores.float().sum()).backward()
    optimizer.step()
    model.requires_grad_(True).zero_grad()


CHANGES = {"load_state_dict": load, "data": write_to_data, "a fused optimizer": step}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_do_not_reach_what_was_made_before(loud, change):
    processor, inputs = make_processor(loud.config.vision_config), make_inputs(loud)
    predictor, generator = Predictor(loud, processor, output="torch"), MaskGenerator(loud, processor)
    optimized = optimize(loud, dtype=torch.float32)
    scores, logits = predict_by_hand(loud)
    with torch.no_grad():
        outputs, masks = loud(**inputs), generator(IMAGE, **SETTINGS).masks.to_coco()
    change(loud)
    assert not torch.allclose(predict_by_hand(loud)[0], scores, rtol=1e-2)
    actual = predictor.set_image(IMAGE).predict(boxes_xyxy=[BOX])
    torch.testing.assert_close(actual.scores, scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(actual.logits, logits, rtol=1e-3, atol=1e-4 * logits.abs().max().item())
    assert generator(IMAGE, **SETTINGS).masks.to_coco() == masks
    assert_equal(optimized(**inputs), outputs, 1e-3)
    with torch.no_grad():
        assert_equal(optimized(**inputs, output_hidden_states=True), outputs, 1e-3)  # the slow path


def own_head(model):
    _own_head(model)
    return model


def original_sam(device) -> SamModel:
    vision = {
        "hidden_size": 32, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
        "num_pos_feats": 16, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [0],
    }  # fmt: skip
    parts = {"hidden_size": 32, "image_size": 64, "image_embedding_size": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32}
    torch.manual_seed(0)
    config = SamConfig(vision_config=vision, prompt_encoder_config=parts, mask_decoder_config=decoder)
    return SamModel(config).eval().to(device)


MIXED = {
    "decoder as in the model": lambda device: own_head(loud_model().to(device)),
    "encoder as in the model": lambda device: ALTERED["lora qkv"][0](loud_model().to(device)),
    "both as in the model": lambda device: ALTERED["lora all-linear"][0](loud_model().to(device)),
    "original SAM": original_sam,
}


@pytest.mark.filterwarnings("ignore:The .* runs as in the model")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", MIXED.values(), ids=MIXED)
def test_a_copied_part_does_not_meet_a_changed_one(device, make, change):
    model = make(device)
    processor = make_processor(base_model(model).config.vision_config)
    predictor, generator = Predictor(model, processor, output="torch"), MaskGenerator(model, processor)
    predictor.set_image(IMAGE).predict(boxes_xyxy=[BOX])
    generator(IMAGE, **SETTINGS)
    change(model.requires_grad_(True))
    if isinstance(predictor.decoder, PlainMaskDecoder):
        with pytest.raises(ValueError, match="the model has changed"):
            predictor.predict(boxes_xyxy=[BOX])
    with pytest.raises(ValueError, match="the model has changed"):
        predictor.set_image(IMAGE)
    with pytest.raises(ValueError, match="the model has changed"):
        generator(IMAGE, **SETTINGS)
    Predictor(model, processor).set_image(IMAGE)


def test_a_method_that_computes_nothing_may_be_replaced(loud):
    """As in frozen models, whose `train` does nothing."""
    loud.train = loud.vision_encoder.train = loud.mask_decoder.train = lambda mode=True: loud
    assert why_not_plain_encoder(loud) is None and why_not_plain_decoder(loud) is None


@pytest.mark.parametrize("kind", [Predictor, MaskGenerator])
def test_what_is_stored_is_not_a_changed_model(loud, kind):
    """Copies would be made of other weights than those that encoded the images of a predictor."""
    made = kind(loud, make_processor(loud.config.vision_config))
    copy.deepcopy(made)
    write_to_data(loud)
    with pytest.raises(ValueError, match="the model has changed"):
        copy.deepcopy(made)


def test_a_part_in_the_model_does_not_run_in_training_mode(device):
    model = original_sam(device)
    predictor = Predictor(model, make_processor(model.config.vision_config))
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        predictor.set_image(IMAGE)
    model.eval()
    predictor.set_image(IMAGE)


def test_an_adapter_that_comes_later_is_noticed(device):
    model = original_sam(device)
    predictor = Predictor(model, make_processor(model.config.vision_config)).set_image(IMAGE)
    lora("all-linear")(model)
    with pytest.raises(ValueError, match="the model has changed"):
        predictor.set_image(IMAGE)


def test_a_model_that_accelerate_runs_is_not_optimized(loud, device):
    """Its `to` is a function that is bound to the model, also in a copy: the model itself would be changed."""
    dispatched = dispatch_model(loud, {"": device}, force_hooks=True)
    with pytest.raises(ValueError, match="accelerate runs this model"):
        optimize(dispatched)


def test_an_optimized_model_keeps_its_weights(loud):
    optimized, inputs = optimize(loud, dtype=torch.float32), make_inputs(loud)
    for module in (optimized, optimized.vision_encoder, optimized.mask_decoder.iou_prediction_head):
        with pytest.raises(RuntimeError, match="load them into the model itself"):
            module.load_state_dict(module.state_dict())
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    with torch.no_grad():
        optimized.mask_decoder.iou_token.weight.add_(1)
    with pytest.raises(RuntimeError, match="have been changed"), torch.no_grad():
        optimized(**inputs, output_hidden_states=True)
    loud.load_state_dict(loud.state_dict())  # loading into the original still works


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lora qkv", "a hook before the encoder's", "a parametrization of the encoder"])
def test_on_a_gpu_the_fused_encoder_does_not_run_then(name):
    alter, _, reason = ALTERED[name]
    wide = {"hidden_size": 128, "mlp_dim": 512, "output_channels": 64, "num_pos_feats": 32, "image_size": 512}
    model = SamLighteningModel(tiny_config(**wide, patch_size=16)).eval().to("cuda", torch.bfloat16)
    assert why_not_fast_encoder(model) is None
    assert isinstance(Predictor(model, make_processor(model.config.vision_config)).encoder.copied, FastVisionEncoder)
    assert optimize(model).report.encoder == "fused"
    model = alter(model).to(torch.bfloat16)  # PEFT makes adapters in float32, and `optimize` makes all of it bfloat16
    assert reason in why_not_fast_encoder(model)
    optimized, inputs = (
        optimize(model, image_batch_sizes=(1,), prompt_counts=(1,)),
        make_inputs(base_model(model), 1, 1),
    )
    assert reason in optimized.report.encoder and not optimized._paths.encode.enabled
    pixel_values = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        expected = model.vision_encoder(pixel_values).last_hidden_state
    assert torch.equal(optimized.vision_encoder(pixel_values).last_hidden_state, expected)


@pytest.mark.gpu
def test_on_a_gpu_a_fused_encoder_notices_changed_weights():
    """Its weights are folded copies: the comparison folds the model's weights again."""
    wide = {"hidden_size": 128, "mlp_dim": 512, "output_channels": 64, "num_pos_feats": 32, "image_size": 512}
    model = SamLighteningModel(tiny_config(**wide, patch_size=16)).eval().to("cuda", torch.bfloat16)
    encoder = FastVisionEncoder(model.vision_encoder)
    assert encoder.is_copy_of(model)
    model.vision_encoder.layers[1].mlp.lin1.weight.data[3, 4] += 1
    assert not encoder.is_copy_of(model)
