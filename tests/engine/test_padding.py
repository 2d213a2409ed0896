"""Rows of padding that are not computed: the result is that of the slow sibling, which computes all rows."""

import pickle

import numpy as np
import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from torch.utils.flop_counter import FlopCounterMode

from samlight_hf import MaskGenerator, Predictor, SamLighteningConfig, SamLighteningModel, optimize
from samlight_hf.engine.image_encoder import CopiedEncoder
from samlight_hf.engine.padding import SkippingEncoder, rows_with_image, why_not_skip_padding
from tests.conftest import tiny_config
from tests.conversion.test_student import sam_teacher


def random_model(config) -> SamLighteningModel:
    torch.manual_seed(0)
    model = SamLighteningModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.inference_mode()
def slow_embeddings(model, pixel_values: torch.Tensor, rows: int) -> torch.Tensor:
    """Compute all rows, and overwrite those of padding before each layer and the neck with those of a blank image."""
    encoder, blank = model.vision_encoder, []
    modules = [*encoder.layers, encoder.neck]

    def remember(module, args, kwargs):
        blank.append((args[0] if args else kwargs["hidden_states"]).clone())

    def overwrite(module, args, kwargs):
        states = (args[0] if args else kwargs["hidden_states"]).clone()
        states[:, rows:] = blank[modules.index(module)][:, rows:]
        return (states, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

    for hook, inputs in ((remember, torch.zeros_like(pixel_values[:1])), (overwrite, pixel_values)):
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
        embeddings = encoder(inputs).last_hidden_state
        for handle in handles:
            handle.remove()
    return embeddings


def skipping(model) -> SkippingEncoder:
    return SkippingEncoder(model.vision_encoder, CopiedEncoder(model))


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "pattern",
    [{}, {"segment_length": (16, None, 32)}, {"segment_length": 4, "dilation_rate": 2}, {"use_abs_pos": False}],
    ids=str,
)
def test_the_result_is_that_of_the_slow_sibling(rows, pattern):
    model = random_model(tiny_config(**pattern))
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pixel_values[:, :, 4 * rows :] = 0
    encoder = skipping(model)
    expected = slow_embeddings(model, pixel_values, rows if rows < 7 else 8)
    torch.testing.assert_close(encoder(pixel_values), expected, atol=1e-4, rtol=1e-4)
    assert encoder.last_rows == (max(1, rows) if rows < 7 else 8)
    torch.testing.assert_close(encoder(pixel_values[:1]), expected[:1], atol=1e-4, rtol=1e-4)


def test_rows_with_image():
    pixel_values = torch.zeros(2, 3, 32, 32)
    assert rows_with_image(pixel_values, 4) == 0
    pixel_values[1, 2, 8, 31] = 1
    assert rows_with_image(pixel_values, 4) == 3
    pixel_values[0, 0, 31, 0] = -1
    assert rows_with_image(pixel_values, 4) == 8


def test_two_thirds_of_the_image_take_two_thirds_of_the_work():
    """1024x683 has 43 of 64 rows: floating point operations of two layers at a quarter of the size."""
    torch.manual_seed(0)
    shape = {"image_size": 256, "patch_size": 4, "num_hidden_layers": 2, "segment_length": (512, None),
             "dilation_rate": (1, 2), "hidden_size": 96, "num_attention_heads": 2}  # fmt: skip
    model = SamLighteningModel(SamLighteningConfig(vision_config=shape)).eval()
    pixel_values = torch.randn(1, 3, 256, 256)
    encoder, work = skipping(model), []
    for rows in (64, 43, 43):
        pixel_values[:, :, 4 * rows :] = 0
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            encoder(pixel_values)
        work.append(counter.get_total_flops())
    assert work[1] > work[2]  # the first call computes the blank image too
    assert 0.6 < work[2] / work[0] < 0.7


def test_predictor_and_generator_run_it(tmp_path):
    model, image = random_model(tiny_config()), np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    processor = make_processor(model.config.vision_config)
    predictor = Predictor(model, processor, skip_padding=True)
    for copy in (predictor, pickle.loads(pickle.dumps(predictor))):
        encoded = copy.encode(image)
        assert isinstance(copy.encoder.copied, SkippingEncoder)
        assert copy.encoder.copied.last_rows == 4  # 16 of 32 pixels
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    expected = slow_embeddings(model, pixel_values, 4)
    prompt = {"input_points": torch.tensor([[[[10.0, 10.0]]]])}
    with torch.inference_mode():
        slow = model(image_embeddings=expected, **prompt)
    fast = predictor.predict([[(12.5, 12.5)]], image=encoded, full_size=False)
    torch.testing.assert_close(torch.from_numpy(fast.logits), slow.pred_masks[0], atol=1e-3, rtol=1e-3)
    predictor.encode(image.transpose(1, 0, 2))  # a portrait is padded at the right: all rows hold image
    assert predictor.encoder.copied.last_rows == 8
    generator = MaskGenerator(model, processor, skip_padding=True)
    generator(image, points_per_crop=2, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    assert generator.encoder.copied.last_rows == 4


def test_an_optimized_model_runs_it():
    model = random_model(tiny_config())
    pixel_values = torch.randn(1, 3, 32, 32)
    pixel_values[:, :, 16:] = 0
    optimized = optimize(model, skip_padding=True)
    embeddings = optimized.vision_encoder(pixel_values).last_hidden_state
    torch.testing.assert_close(embeddings, slow_embeddings(model, pixel_values, 4), atol=1e-4, rtol=1e-4)
    assert optimized._paths.encode.function.__wrapped__.last_rows == 4
    plain = optimize(model).vision_encoder(pixel_values).last_hidden_state
    assert not torch.allclose(embeddings, plain, atol=1e-4)  # something else, which is why one asks for it


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sam_teacher(), "model_type='sam' has another image encoder"),
        (
            lambda: SamLighteningModel(tiny_config(window_size=4, segment_length=None, dilation_rate=1)),
            "attends in windows of 4x4",
        ),
        (
            lambda: SamLighteningModel(tiny_config(segment_length=None, dilation_rate=4, dilation_offsets="per_head")),
            "has dilation_offsets='per_head', and it needs 'all'",
        ),
        (
            lambda: SamLighteningModel(tiny_config(image_size=40, segment_length=None, dilation_rate=4)),
            "dilation_rate=4 of layer 0 does not divide rows of 10 tokens",
        ),
    ],
)  # fmt: skip
def test_where_it_is_not_possible(make, message):
    model = make()
    assert message in why_not_skip_padding(model)
    with pytest.raises(ValueError, match=f"skip_padding=True is not possible: .*{message}"):
        Predictor(model, make_processor(model.config.vision_config), skip_padding=True)
