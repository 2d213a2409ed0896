"""The decoder's image side in blocks: against the plain operations, and that users' calls take it."""

import numpy as np
import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from torch import nn

from samlight_hf import MaskGenerator, Predictor, SamLighteningConfig, SamLighteningModel
from samlight_hf.engine.mask_decoder import FastMaskDecoder
from samlight_hf.kernels import cpu_blocks, image_attention, mask_head, upscaled_masks
from samlight_hf.kernels.layer_norm import add_layer_norm_reference
from samlight_hf.masks.upscaling import upscale_logits, visible_part
from tests.conftest import tiny_config


BLOCKS = ("seen", "update", "update_shared", "run_head", "upscale")
PROMPTS, HEADS, TOKENS, CHANNELS, GRID = 3, 4, 7, 32, (40, 50)  # 2,000 image tokens: two blocks, one not full


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def norm_of(width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("images", [1, PROMPTS])
@torch.no_grad()
def test_attention_is_that_of_the_plain_operations(images):
    num_image_tokens = GRID[0] * GRID[1]
    image_tokens, positions = numbers(images, num_image_tokens, CHANNELS), numbers(num_image_tokens, CHANNELS)
    rows = numbers(PROMPTS, HEADS * TOKENS, CHANNELS)
    assert cpu_blocks.why_not(image_tokens) is None
    found = cpu_blocks.seen(rows, image_tokens, positions)
    assert error(found, image_attention.seen_reference(rows, image_tokens, positions)) < 1e-5
    arguments = image_tokens, positions, rows, numbers(PROMPTS, HEADS * TOKENS), 0.1 * rows, norm_of(CHANNELS), HEADS
    expected = image_attention.update_reference(*arguments, add_layer_norm_reference)
    assert error(cpu_blocks.update(*arguments), expected) < 1e-5
    if images > 1:
        assert cpu_blocks.update(*arguments, in_place=True) is image_tokens
        assert error(image_tokens, expected) < 1e-5


@torch.no_grad()
def test_shared_image_tokens_attend_to_each_prompt():
    image_tokens, dim, norm = numbers(1, GRID[0] * GRID[1], CHANNELS), 8, norm_of(CHANNELS)
    queries, keys = numbers(image_tokens.shape[1], HEADS, dim), numbers(PROMPTS, TOKENS, HEADS, dim)
    values = numbers(PROMPTS, HEADS * TOKENS, CHANNELS)
    scores = torch.einsum("nhd,pthd->phtn", queries, keys)
    seen = torch.einsum("phtn,phtc->pnc", scores.softmax(dim=2), values.unflatten(1, (HEADS, TOKENS)))
    found = cpu_blocks.update_shared(image_tokens, queries, keys, values, norm)
    assert error(found, norm(image_tokens + seen)) < 1e-5


@pytest.mark.parametrize("visible", [None, (160, 200), (101, 200), (160, 62), (3, 5)])
@torch.no_grad()
def test_the_head_of_some_prompts_and_of_a_part_of_the_image(visible):
    image_tokens, hyper = numbers(PROMPTS, GRID[0] * GRID[1], CHANNELS), numbers(2, 3, CHANNELS // 8)
    weights = mask_head.HeadWeights(
        numbers(CHANNELS, CHANNELS), numbers(CHANNELS), norm_of(CHANNELS // 4),
        numbers(CHANNELS // 2, CHANNELS // 4), numbers(CHANNELS // 2),
    )  # fmt: skip
    found = cpu_blocks.run_head(image_tokens, [2, 0], hyper, GRID, weights, visible)
    expected = mask_head.run_head(image_tokens[[2, 0]], hyper, GRID, weights, add_layer_norm_reference)
    assert found.shape == expected.shape == (2, 3, 160, 200)
    rows, columns = visible or (160, 200)
    assert error(found[..., :rows, :columns], expected[..., :rows, :columns]) < 1e-5
    rows, columns = -(-rows // 4) * 4, -(-columns // 4) * 4
    assert not found[..., rows:, :].any() and not found[..., columns:].any()


@pytest.mark.parametrize("resized", [(683, 1024), (1024, 683), (1024, 1024), (1, 1024)])
def test_what_is_not_visible_does_not_change_a_mask(resized):
    logits, size = numbers(2, 256, 256), (resized[0] // 2 + 1, resized[1] // 2 + 1)
    rows, columns = visible_part((256, 256), (1024, 1024), resized)
    covered = torch.zeros_like(logits)
    covered[:, :rows, :columns] = logits[:, :rows, :columns]
    frame = (1024, 1024), resized, size
    assert torch.equal(upscale_logits(covered, *frame), upscale_logits(logits, *frame))
    assert visible_part((100, 100), (1024, 1024), resized) == (100, 100)  # no whole number of pixels: all is needed


@pytest.mark.parametrize("original", [(683, 1024), (1024, 683), (40, 60), (300, 1), (1, 2000), (1500, 900)], ids=str)
@pytest.mark.parametrize("low", [(256, 256), (60, 100)], ids=str)
def test_both_resizes_at_once_give_the_logits_of_one_after_the_other(low, original):
    logits, frame = numbers(2, *low), ((1024, 1024), (683, 1024), original)
    torch.testing.assert_close(cpu_blocks.upscale(logits, *frame), upscale_logits(logits, *frame), atol=2e-6, rtol=0)
    assert cpu_blocks.upscale(logits[:0], *frame).shape == (0, *original)


def test_reasons_against_the_blocks():
    with torch.no_grad():
        assert "cuda" in cpu_blocks.why_not(type("OnCuda", (), {"is_cpu": False, "device": "cuda:0"})())
    assert "gradients" in cpu_blocks.why_not(numbers(1, 2, 3))


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """The number of calls of each function, of the blocks and of the plain operations."""
    counts: dict[str, int] = {}
    attention = ((image_attention, name) for name in ("seen_reference", "update_reference"))
    plain = (*attention, (mask_head, "run_head"), (upscaled_masks, "upscale_logits"))
    blocks = [(cpu_blocks, name) for name in BLOCKS]
    for module, name in (*plain, *blocks):
        key, function = f"{module.__name__.rpartition('.')[2]}.{name}", getattr(module, name)

        def call(*arguments, key=key, function=function, **options):
            counts[key] = counts.get(key, 0) + 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)
    return counts


@pytest.fixture(scope="module")
def model() -> SamLighteningModel:
    torch.manual_seed(0)
    return SamLighteningModel(tiny_config()).eval()


def test_everything_mode_and_prompts_take_the_blocks(model, counted, monkeypatch):
    """Users' calls take the blocks, and get the masks of the plain operations."""
    processor = make_processor(SamLighteningConfig(**tiny_config().to_dict()).vision_config)
    image = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    settings = {"points_per_crop": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "crops_nms_thresh": 1.0}
    results, used = [], []
    for reason in (None, "not in this test."):
        monkeypatch.setattr(cpu_blocks, "why_not", lambda image_tokens, reason=reason: reason)
        counted.clear()
        everything = MaskGenerator(model, processor)(image, **settings)
        prediction = Predictor(model, processor).set_image(image).predict(points_xy=[[(5, 6)], [(20, 9)]])
        results.append((everything, prediction))
        used.append({name for name, count in counted.items() if count})
    assert used[0] == {f"cpu_blocks.{name}" for name in BLOCKS}
    attention = {"image_attention.seen_reference", "image_attention.update_reference"}
    assert used[1] == {*attention, "mask_head.run_head", "upscaled_masks.upscale_logits"}
    (everything, prediction), (plain, plain_prediction) = results
    assert len(everything.masks) == len(plain.masks) > 10
    assert np.abs(everything.scores - plain.scores).max() < 1e-5
    assert np.mean([np.mean(own == other) for own, other in zip(everything.masks, plain.masks)]) > 0.999
    assert np.abs(prediction.logits - plain_prediction.logits).max() < 1e-4 * np.abs(prediction.logits).max()


def test_the_decoder_leaves_out_what_is_not_visible(model):
    decoder = FastMaskDecoder(model)
    side = model.config.prompt_encoder_config.image_embedding_size
    image = decoder.prepare(numbers(1, model.config.vision_config.output_channels, side, side))
    points, labels = 4 * numbers(5, 1, 2).sigmoid(), torch.ones(5, 1, dtype=torch.int64)
    whole = decoder.decode(image, points, labels, repeated=True)
    part = decoder.decode(image, points, labels, repeated=True, visible=(4, 4 * side))
    assert torch.equal(part.iou, whole.iou)
    assert error(part.logits[:, :4], whole.logits[:, :4]) < 1e-5 and not part.logits[:, 4:].any()
    assert whole.logits[:, 4:].any()
