"""Training of the IoU head alone: masks stay, and the mask that a user wants gets the highest score."""

import copy

import numpy as np
import pytest
import torch
from samlight_hf.modeling.modeling_sam_lightening import make_processor

from samlight_hf import Predictor, SamLighteningModel
from samlight_hf.data import SyntheticScenes
from samlight_hf.data.clicks import deepest_point
from samlight_hf.evaluation.iou_head import NUM_POINTS, HeadExamples, fit_iou_head, measure_order, record_examples
from tests.conftest import tiny_config


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SamLighteningModel(tiny_config()).eval()


def record(model, num_images=3, **options) -> HeadExamples:
    return record_examples(
        model, make_processor(model.config.vision_config), SyntheticScenes(5, 32), num_images, **options
    )


@pytest.mark.filterwarnings("error:The mask decoder")
def test_recorded_are_the_inputs_of_the_head_and_the_ious_of_its_masks(model):
    examples, scenes = record(model, 1), SyntheticScenes(5, 32)
    sample = scenes[int(np.random.default_rng(0).permutation(len(scenes))[0])]
    number = len(sample.instances)
    assert len(examples) == 3 * number + NUM_POINTS
    is_anywhere = examples.own.isnan().any(dim=1)
    assert is_anywhere.nonzero().flatten().tolist() == list(range(2 * number, 2 * number + NUM_POINTS))
    assert (examples.best >= examples.own)[~is_anywhere].all()
    masks = np.stack([instance.mask() for instance in sample.instances]).astype(bool)
    predictor = Predictor(model, make_processor(model.config.vision_config)).set_image(sample.image)
    prediction = predictor.predict(points_xy=[[deepest_point(mask)[0]] for mask in masks])
    ious = (prediction.masks & masks[:, None]).sum((2, 3)) / (prediction.masks | masks[:, None]).sum((2, 3))
    # Objects are prompted in the order in which they are drawn.
    torch.testing.assert_close(_sorted(examples.own[:number]), _sorted(torch.from_numpy(ious).float()))
    with torch.no_grad():
        scores = model.mask_decoder.iou_prediction_head(examples.tokens[:number])[:, 1:]
    torch.testing.assert_close(_sorted(scores), _sorted(torch.from_numpy(prediction.scores)))
    assert not model.mask_decoder.iou_prediction_head._forward_pre_hooks


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    return rows[rows[:, 0].argsort()]


def test_a_fitted_head_takes_better_masks_and_changes_no_mask(model):
    examples, fitted = record(model, 5), copy.deepcopy(model)
    fit_iou_head(fitted, [examples], [True], num_steps=200, learning_rate=3e-3)
    before, best = measure_order(model.mask_decoder.iou_prediction_head, examples)
    after, same_best = measure_order(fitted.mask_decoder.iou_prediction_head, examples)
    assert best == same_best and before < after <= best
    for name, tensor in model.state_dict().items():
        assert ("iou_prediction_head" in name) != torch.equal(tensor, fitted.state_dict()[name]), name


def test_a_head_in_half_precision_is_measured_and_fitted(model):
    examples = record(model)
    expected = measure_order(model.mask_decoder.iou_prediction_head, examples)
    model.bfloat16()
    assert measure_order(model.mask_decoder.iou_prediction_head, examples) == pytest.approx(expected, abs=0.05)
    fit_iou_head(model, [examples], [True], num_steps=2)
    assert model.mask_decoder.iou_prediction_head.proj_in.weight.dtype == torch.bfloat16


def test_no_more_images_are_loaded_than_are_used(model, monkeypatch):
    loaded = []
    load = SyntheticScenes.load
    monkeypatch.setattr(SyntheticScenes, "load", lambda self, index: loaded.append(index) or load(self, index))
    record(model, 2)
    assert len(loaded) == 2


def test_the_score_of_the_single_mask_stays_near_its_value(model):
    examples, fitted = record(model, 5), copy.deepcopy(model)
    fit_iou_head(fitted, [examples], [True], num_steps=200, learning_rate=3e-3)
    with torch.no_grad():
        before, after = (each.mask_decoder.iou_prediction_head(examples.tokens) for each in (model, fitted))
    assert (before - after)[:, 0].abs().mean() < 0.02 < (before - after)[:, 1:].abs().mean()


def test_points_anywhere_are_learned_only_of_complete_images(model):
    tokens = torch.randn(64, model.mask_decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    nothing = HeadExamples(tokens, torch.full((64, 3), torch.nan), torch.zeros(64, 3))
    objects = HeadExamples(tokens + 0.01, torch.ones(64, 3), torch.ones(64, 3))
    both = HeadExamples(*(torch.cat([getattr(part, name) for part in (nothing, objects)]) for name in vars(nothing)))
    scores = []
    for is_complete in (True, False):
        fitted = copy.deepcopy(model)
        fit_iou_head(fitted, [both], [is_complete], num_steps=150, learning_rate=3e-3)
        with torch.no_grad():
            scores.append(fitted.mask_decoder.iou_prediction_head(tokens)[:, 1:].mean().item())
    assert scores[0] < 0.8 < scores[1]


def test_a_data_set_without_objects_is_refused(model):
    class Empty(SyntheticScenes):
        def load(self, index):
            return None, super().load(index)[1]

    with pytest.raises(ValueError, match="no image of the data set has an object"):
        record_examples(model, make_processor(model.config.vision_config), Empty(2, 32), 2)
