"""Tests of the image processor: transformers' mask-generation pipeline runs in any floating point dtype."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samlight_hf.modeling.modeling_sam_lightening import make_processor
from transformers import AutoImageProcessor, SamConfig, SamImageProcessor, SamProcessor, pipeline

from samlight_hf import MaskGenerator, SamLighteningImageProcessor
from samlight_hf.loading import load_model


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "sam-lightening-tiny"
SETTINGS = {"points_per_crop": 4, "pred_iou_thresh": 0.25, "stability_score_thresh": 0.3, "crops_nms_thresh": 0.9}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def photograph():
    image = Image.open(ROOT / "examples" / "images" / "coffee.jpg").convert("RGB")
    image.thumbnail((160, 160))
    return image


def stock_pipeline(photograph, dtype=torch.float32, device="cpu", **parts) -> dict:
    generator = pipeline("mask-generation", model=str(CHECKPOINT), dtype=dtype, device=device, **parts)
    assert generator.model.dtype == dtype
    return generator(photograph, **SETTINGS, output_bboxes_mask=True)


@pytest.fixture(scope="module")
def in_float32(photograph):
    result = stock_pipeline(photograph)
    assert len(result["masks"]) > 10
    return result


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stock_pipeline_in_half_precision_gives_the_masks_of_float32(photograph, in_float32, dtype, device):
    result = stock_pipeline(photograph, dtype, device)
    assert result["scores"].dtype == torch.float32
    result["scores"] = result["scores"].cpu()
    masks, expected = torch.stack(result["masks"]).cpu(), torch.stack(in_float32["masks"])[:, None]
    iou = (masks & expected).sum((-1, -2)) / (masks | expected).sum((-1, -2))  # (in float32, found here)
    matched = iou.amax(1) > 0.95
    assert matched.float().mean() >= 0.9  # all but one
    assert (iou.amax(0) > 0.95).float().mean() >= 0.9
    assert torch.allclose(result["scores"][iou.argmax(1)][matched], in_float32["scores"][matched], atol=0.03)


def test_stock_pipeline_in_float32_is_what_it_is_with_sams_own_processor(photograph, in_float32):
    settings = AutoImageProcessor.from_pretrained(CHECKPOINT).to_dict()
    for name in ("image_processor_type", "auto_map"):
        settings.pop(name, None)
    expected = stock_pipeline(photograph, image_processor=SamImageProcessor(**settings))
    assert torch.equal(torch.stack(in_float32["masks"]), torch.stack(expected["masks"]))
    for name in ("scores", "bounding_boxes"):
        assert torch.equal(in_float32[name], expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("thresholds", [(0.4, 0.2, 0, 1), (0.0, 0.0, 0.25, 0.5), (1.0, 1.0, 0, 1)], ids=str)
def test_filter_masks_is_sams_of_the_same_values_in_float32(dtype, thresholds):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 3, 40, 50, generator=generator)
    masks = (torch.nn.functional.avg_pool2d(noise, 9, 1, 4) * 9).to(dtype)
    scores = torch.rand(6, 3, generator=generator).to(dtype)
    where = ((40, 50), torch.tensor([0.0, 0.0, 50.0, 40.0]))
    result = SamLighteningImageProcessor().filter_masks(masks, scores, *where, *thresholds)
    rles, kept_scores, boxes = SamImageProcessor().filter_masks(masks.float(), scores.float(), *where, *thresholds)
    assert bool(rles) == (thresholds[0] < 1)
    assert result[0] == rles
    assert result[1].dtype == torch.float32
    assert torch.equal(result[1], kept_scores)
    assert torch.equal(result[2], boxes)


def test_checkpoints_with_either_processor_load_and_give_the_same(model, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    results = []
    for kind in (SamLighteningImageProcessor, SamImageProcessor):
        folder = tmp_path / kind.__name__
        SamProcessor(kind(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})).save_pretrained(folder)
        model.save_pretrained(folder)
        loaded, processor = load_model(folder, "cpu")
        assert type(processor.image_processor) is kind
        keep_all = {"points_per_crop": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
        results.append(MaskGenerator(loaded, processor)(image, **keep_all))
    ours, stock = results
    assert len(ours) > 0
    assert ours.masks.to_coco() == stock.masks.to_coco()
    assert np.array_equal(ours.scores, stock.scores)


def test_an_original_sam_keeps_transformers_class():
    assert type(make_processor(SamConfig().vision_config).image_processor) is SamImageProcessor
