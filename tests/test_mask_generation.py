"""Prompts in pixels of the original picture give masks of its size; the bundled checkpoint finds what is there."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MaskGenerationPipeline

from samlight_hf import SamLighteningModel
from samlight_hf.loading import load_model
from samlight_hf.mask_generation import MaskResult, check_prompts, segment_everything, segment_prompts
from samlight_hf.segment_command import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES

from .conftest import tiny_config


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    SamLighteningModel(tiny_config()).save_pretrained(folder)
    return load_model(folder, "cpu", request.param)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))


def well_formed(result: MaskResult, picture, count=None):
    count = len(result) if count is None else count
    assert (result.masks.shape, result.masks.dtype) == ((count, picture.height, picture.width), bool)
    assert (result.scores.shape, result.scores.dtype) == ((count,), np.float32)
    assert (result.boxes_xyxy.shape, result.boxes_xyxy.dtype) == ((count, 4), np.float32)
    for mask, (x1, y1, x2, y2) in zip(result.masks, result.boxes_xyxy.astype(int)):
        outside = mask.copy()
        outside[y1:y2, x1:x2] = False
        assert not outside.any()
        assert not mask.any() or (mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any())


def test_one_mask_for_each_prompt(tiny, picture):
    boxes, points = [(0, 0, 50, 30), (3.5, 4, 20, 25)], [(0, 0), (49.9, 29), (10, 10)]
    result = segment_prompts(*tiny, picture, boxes, points)
    well_formed(result, picture, count=5)
    well_formed(result[:2], picture, count=2)
    # Each prompt is for itself: alone it gives what it gives beside others, but for the rounding of another batch size.
    for part, alone in (
        (result[1:2], segment_prompts(*tiny, picture, boxes[1:])),
        (result[4:], segment_prompts(*tiny, picture, points_xy=points[2:])),
    ):
        assert np.allclose(alone.scores, part.scores, atol=2e-2)
        assert (alone.masks != part.masks).mean() < 0.05
    well_formed(segment_prompts(*tiny, picture), picture, count=0)


def test_prompts_are_scaled_as_the_processor_scales_them(tiny, picture):
    model, processor = tiny
    box, point = [3.0, 4.0, 20.0, 25.0], [17.0, 8.0]
    inputs = processor(images=picture, input_boxes=[[box]], input_points=[[[point]]], return_tensors="pt")
    seen = {}
    hook = model.prompt_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update({k: v for k, v in kwargs.items() if v is not None}), with_kwargs=True
    )
    segment_prompts(model, processor, picture, [box], [point])
    hook.remove()
    assert torch.allclose(seen["input_boxes"].float(), inputs["input_boxes"].float(), atol=0.1)
    assert torch.allclose(seen["input_points"].float(), inputs["input_points"].float(), atol=0.1)


def test_everything_is_what_the_stock_pipeline_gives(tiny, picture):
    model, processor = tiny
    result = segment_everything(model, processor, picture, 4, 0.0, 0.0, points_per_batch=5)
    well_formed(result, picture)
    assert len(result) > 0
    assert (np.diff(result.scores) <= 0).all()
    if model.dtype == torch.float32:
        pipeline = MaskGenerationPipeline(model=model, image_processor=processor.image_processor)
        stock = pipeline(
            picture, points_per_crop=4, points_per_batch=5, pred_iou_thresh=0.0, stability_score_thresh=0.0
        )
        assert np.array_equal(result.masks, np.stack(stock["masks"]))
        assert np.allclose(result.scores, stock["scores"])


def test_everything_with_nothing_found(tiny, picture):
    well_formed(segment_everything(*tiny, picture, 2, pred_iou_thresh=1.0), picture, count=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (63, 1), (3, 3), (1, 2)])
def test_very_small_pictures(tiny, size, capfd):
    picture = Image.new("RGB", size, "orange")
    well_formed(segment_everything(*tiny, picture, 2, 0.0, 0.0), picture)
    well_formed(segment_prompts(*tiny, picture, [(0, 0, *size)], [(0, 0)]), picture, count=2)
    assert capfd.readouterr() == ("", "")


def test_pictures_that_are_too_thin(tiny):
    picture = Image.new("RGB", (20_000, 100))
    for segment in (segment_everything, segment_prompts):
        with pytest.raises(ValueError, match=r"20000x100 pixels is too thin.*64:1"):
            segment(*tiny, picture)


@pytest.mark.parametrize(
    "box, words",
    [
        ((10, 10, 51, 20), "10,10,51,20 reaches outside the picture of 50x30"),
        ((-1, 10, 20, 20), "-1,10,20,20 reaches outside"),
        ((100, 100, 120, 120), "reaches outside"),
        ((20, 10, 10, 20), "20,10,10,20 is reversed"),
        ((10, 20, 20, 10), "is reversed"),
        ((10, 10, 10, 20), "has no area"),
        ((10, 10, float("nan"), 20), "four numbers"),
        ((10, 10, 20), "four numbers"),
    ],
)
def test_boxes_that_cannot_be(box, words):
    with pytest.raises(ValueError, match=words):
        check_prompts((50, 30), boxes_xyxy=[(0, 0, 50, 30), box])


@pytest.mark.parametrize("point", [(50, 3), (3, 30), (-0.1, 3), (float("inf"), 0), (1, 2, 3)])
def test_points_that_cannot_be(point):
    with pytest.raises(ValueError, match="point "):
        check_prompts((50, 30), points_xy=[(0, 0), point])


@pytest.mark.parametrize(
    "settings",
    [
        {"points_per_side": 0},
        {"points_per_side": 2.5},
        {"points_per_batch": -1},
        {"pred_iou_thresh": 1.5},
        {"stability_score_thresh": float("nan")},
    ],
)
def test_settings_outside_their_range(tiny, picture, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        segment_everything(*tiny, picture, **settings)


def test_the_bundled_checkpoint_finds_the_nose_of_the_cat():
    model, processor = load_model(BUNDLED_CHECKPOINT, "cpu")
    picture = Image.open(EXAMPLE_IMAGES / "cat.jpg")
    result = segment_prompts(model, processor, picture, [(215, 215, 288, 265)], [(250, 240)])
    assert (result.masks[0] & result.masks[1]).sum() / (result.masks[0] | result.masks[1]).sum() > 0.6
    assert result.masks[:, 235, 250].all()
    assert not result.masks[:, 100, 165].any()
