"""The image encoder in fewer kernels computes the same as the model's own."""

import pytest
import torch
from torch import nn

from samlight_hf import SamLighteningModel
from samlight_hf.engine import image_encoder as vision_encoder
from samlight_hf.engine.image_encoder import FastVisionEncoder, why_not_fast_encoder
from samlight_hf.kernels import linear as fused_linear
from tests.conftest import default_dtype, tiny_config
from tests.kernels.hopper.test_linear import needs_hopper


WIDE = {
    "hidden_size": 128,
    "mlp_dim": 512,
    "output_channels": 64,
    "num_pos_feats": 32,
    "image_size": 512,
    "patch_size": 16,
}
PATTERNS = {
    "bands and dilated": {"num_hidden_layers": 2, "segment_length": (16, None), "dilation_rate": (1, 2)},
    "per head": {
        "num_hidden_layers": 2,
        "segment_length": (None, 32),
        "dilation_rate": (4, 2),
        "dilation_offsets": "per_head",
    },
    "no positions": {"use_abs_pos": False},
}
# Shapes that the attention kernel for Hopper GPUs supports: heads of 64 features, groups of multiples of 128 tokens.
LONG = {"num_attention_heads": 2, "num_hidden_layers": 2, "segment_length": (256, None), "dilation_rate": (1, 2)}


def make_model(**vision) -> SamLighteningModel:
    torch.manual_seed(0)
    model = SamLighteningModel(tiny_config(**vision)).eval()
    for module in model.vision_encoder.modules():  # layer norms that change their input
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


@torch.no_grad()
def relative_error(model: SamLighteningModel, pixel_values: torch.Tensor, expected: torch.Tensor, encode) -> float:
    actual = encode(pixel_values.to(model.device, model.dtype))
    assert actual.shape == expected.shape
    return ((actual.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("vision", PATTERNS.values(), ids=PATTERNS)
def test_it_computes_what_the_model_does(vision):
    model = make_model(**vision)
    size = model.config.vision_config.image_size
    pixel_values = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.vision_encoder(pixel_values).last_hidden_state.double()
    assert relative_error(model, pixel_values, expected, FastVisionEncoder(model.vision_encoder)) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("vision", PATTERNS.values(), ids=PATTERNS)
def test_its_weights_are_copies_in_one_memory(vision, device):
    model = make_model(**vision).to(device)
    encoder, size = FastVisionEncoder(model.vision_encoder), model.config.vision_config.image_size
    assert len({tensor.untyped_storage().data_ptr() for tensor in encoder._weights()}) == 1
    pixel_values = torch.randn(2, 3, size, size, device=device)
    before = encoder(pixel_values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(encoder(pixel_values), before) and not encoder.is_copy_of(model)
    model.double().cpu()
    assert torch.equal(encoder(pixel_values), before)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torchs_default_dtype_changes_nothing(device, default):
    model = make_model(**WIDE | LONG).to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    pixel_values = torch.randn(2, 3, 512, 512).to(device, model.dtype)
    expected = FastVisionEncoder(model.vision_encoder)(pixel_values)
    with default_dtype(default):
        assert torch.equal(FastVisionEncoder(model.vision_encoder)(pixel_values), expected)


def test_other_layers_run_where_rows_come_without_statistics():
    """Rows that no fused layer has written come without statistics."""
    layer = fused_linear.FusedLinear(torch.randn(64, 64), None, nn.LayerNorm(64))
    values = torch.randn(128, 64)
    expected = nn.functional.layer_norm(values, (64,), eps=1e-5) @ layer.weight.T
    assert torch.allclose(layer(fused_linear.RowsWithStatistics(values)).values, expected, atol=1e-5)


def test_every_reason_why_it_is_not_used():
    model = make_model()
    assert "float32 on cpu" in why_not_fast_encoder(model)
    model.config.model_type = "sam"
    assert "another image encoder" in why_not_fast_encoder(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vision", PATTERNS.values(), ids=PATTERNS)
def test_on_a_gpu_it_is_as_close_to_float32_as_the_model_itself(vision, dtype, monkeypatch):
    model = make_model(**WIDE, **vision)
    pixel_values = torch.randn(2, 3, 512, 512)
    with torch.no_grad():
        expected = model.vision_encoder(pixel_values).last_hidden_state.double()
    model = model.to("cuda", dtype)
    plain = relative_error(model, pixel_values, expected, lambda x: model.vision_encoder(x).last_hidden_state)
    assert why_not_fast_encoder(model) is None
    FastVisionEncoder(model.vision_encoder)(pixel_values.to("cuda", dtype))  # kernels are tried, against the reference
    monkeypatch.delattr(fused_linear, "fused_linear_reference")  # every layer runs the kernel
    fast = relative_error(model, pixel_values, expected, FastVisionEncoder(model.vision_encoder))
    assert fast < 1.5 * plain + 1e-3


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dilation_offsets", ["all", "per_head"])
def test_on_hopper_it_runs_its_own_kernels_alone(dilation_offsets, dtype, monkeypatch):
    model = make_model(**WIDE | LONG, dilation_offsets=dilation_offsets)
    pixel_values = torch.randn(2, 3, 512, 512)
    with torch.no_grad():
        expected = model.vision_encoder(pixel_values).last_hidden_state.double()
    model = model.to("cuda", dtype)
    plain = relative_error(model, pixel_values, expected, lambda x: model.vision_encoder(x).last_hidden_state)
    encode = FastVisionEncoder(model.vision_encoder)
    encode(pixel_values.to("cuda", dtype))  # kernels are tried, against the reference
    for module, name in (
        (fused_linear, "launch_triton"),
        (fused_linear, "launch_patches"),
        (fused_linear, "fused_linear_reference"),
        (vision_encoder, "dilated_attention"),
    ):
        monkeypatch.delattr(module, name)
    assert relative_error(model, pixel_values, expected, encode) < 1.5 * plain + 1e-3
