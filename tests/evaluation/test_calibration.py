"""Rescaling of scores: no mask changes, and everything mode finds the wanted number at its default thresholds."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from samlight_hf import MaskGenerator, SamLighteningModel
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES
from samlight_hf.data import Instance, Sample, load_dataset
from samlight_hf.evaluation.calibration import calibrate, map_scores, scale_mask_logits
from samlight_hf.loading import load_model
from tests.conftest import tiny_config
from tests.data.files import jpeg, sa1b_json, write_tar


BOX = torch.tensor([[[2.0, 3.0, 20.0, 25.0]]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SamLighteningModel(tiny_config()).eval()


@pytest.fixture
def pixel_values(model):
    size = model.config.vision_config.image_size
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_scaled_logits_are_the_same_masks_and_the_same_when_fed_back(model, pixel_values):
    scaled = copy.deepcopy(model)
    scale_mask_logits(scaled, 3.0)
    before, after = (each(pixel_values, input_boxes=BOX, multimask_output=False) for each in (model, scaled))
    torch.testing.assert_close(after.pred_masks, 3 * before.pred_masks)
    assert torch.equal(after.iou_scores, before.iou_scores)
    before, after = (
        each(pixel_values, input_boxes=BOX, input_masks=first.pred_masks[:, 0])
        for each, first in ((model, before), (scaled, after))
    )
    torch.testing.assert_close(after.pred_masks, 3 * before.pred_masks, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.iou_scores, before.iou_scores)


@torch.no_grad()
def test_mapped_scores_are_linear_and_those_of_boxes_stay(model, pixel_values):
    mapped = copy.deepcopy(model)
    map_scores(mapped, (0.5, 0.88), (0.7, 1.0))
    for multimask in (True, False):
        before, after = (each(pixel_values, input_boxes=BOX, multimask_output=multimask) for each in (model, mapped))
        expected = 0.88 + (before.iou_scores - 0.5) * 0.6 if multimask else before.iou_scores
        torch.testing.assert_close(after.iou_scores, expected)
        assert torch.equal(after.pred_masks, before.pred_masks)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_factor_that_is_no_scale_is_refused(model, factor):
    with pytest.raises(ValueError, match="factor=.* must be positive and finite"):
        scale_mask_logits(model, factor)


def test_scores_that_would_be_reversed_are_refused(model):
    with pytest.raises(ValueError, match="must be below high="):
        map_scores(model, (0.7, 0.88), (0.5, 1.0))


@pytest.fixture(scope="module")
def bundled():
    return load_model(BUNDLED_CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def photographs():
    """Two of the example images; the upper half of each counts as annotated."""
    samples = []
    for name in ("cat.jpg", "coffee.jpg"):
        image = Image.open(EXAMPLE_IMAGES / name).convert("RGB")
        upper = np.zeros((image.height, image.width), dtype=np.uint8, order="F")
        upper[: image.height // 2] = 1
        instance = Instance(1, coco_mask.encode(upper), (0, 0, image.width, image.height // 2), float(upper.sum()))
        samples.append(Sample(name, image, (instance,), image.width, image.height))
    return samples


def test_everything_mode_finds_the_wanted_number_at_default_thresholds(bundled, photographs):
    model, processor = copy.deepcopy(bundled[0]), bundled[1]
    scale_mask_logits(model, 1 / 8)
    map_scores(model, (0.0, 0.0), (1.0, 0.7))
    before = MaskGenerator(model, processor)(photographs[0].image, points_per_crop=4)
    result = calibrate(model, processor, photographs, masks_per_image=5, points_per_side=4, logit_scales=(8.0,))
    generator = MaskGenerator(model, processor)
    found = [generator(sample.image, points_per_crop=4) for sample in photographs]
    assert len(before) == 0  # nothing at the default thresholds either
    assert np.mean([len(each) for each in found]) == pytest.approx(5, abs=0.5)
    assert result.masks_per_image == 5 and 0 <= result.share_right <= 1
    assert max(each.scores.max() for each in found) == pytest.approx(1.0, abs=1e-3)


def test_images_that_cannot_be_used_are_skipped_and_told(bundled, photographs, tmp_path):
    cat = photographs[0].image
    members = {
        "a.jpg": (EXAMPLE_IMAGES / "cat.jpg").read_bytes(),
        "a.json": sa1b_json(width=cat.width, height=cat.height),
    }
    broken = {"b.jpg": jpeg()[:300], "b.json": sa1b_json()}
    model, options = copy.deepcopy(bundled[0]), {"points_per_side": 3, "logit_scales": (8.0,)}
    with pytest.warns(UserWarning, match=r"Skipped 1 of 2 images(?s:.*)damaged or truncated \(b\)"):
        dataset = load_dataset(write_tar(tmp_path / "broken.tar", {**members, **broken}))
        assert calibrate(model, bundled[1], dataset, 1, **options).masks_per_image == 1
    with pytest.raises(ValueError, match="no image of the data set can be used"):
        calibrate(model, bundled[1], load_dataset(write_tar(tmp_path / "none.tar", broken)), 1, **options)


def test_more_masks_than_there_are_is_refused(bundled, photographs):
    with pytest.raises(ValueError, match="masks_per_image=10000 is more than the model finds"):
        calibrate(*bundled, photographs[:1], 10_000, points_per_side=2, logit_scales=(1.0,))
