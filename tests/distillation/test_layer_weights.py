import pytest
import torch
from transformers import TrainerControl, TrainerState

from samlight_hf.distillation import DynamicLayerWeights, LayerWeightCallback, OutputOnly, UniformLayerWeights
from samlight_hf.distillation.layer_weights import layer_weight_schedule


def test_dynamic_weights_rise_one_after_another():
    schedule = DynamicLayerWeights(ramp_fraction=0.5)  # of 1,200 steps: a_2, a_3, a_4 take 200 each
    expected = {
        0: [1, 0, 0, 0], 50: [1, 0.25, 0, 0], 100: [1, 0.5, 0, 0], 200: [1, 1, 0, 0], 300: [1, 1, 0.5, 0],
        400: [1, 1, 1, 0], 450: [1, 1, 1, 0.25], 600: [1, 1, 1, 1], 1200: [1, 1, 1, 1],
    }  # fmt: skip
    for step, weights in expected.items():
        assert schedule(step, 1200, 4) == pytest.approx(weights), step


def test_dynamic_weights_are_the_formula():
    for num_layers in (1, 2, 5):
        for step in range(0, 101, 7):
            weights = DynamicLayerWeights(0.8)(step, 100, num_layers)
            for n in range(2, num_layers + 1):
                value = step / 80 * (num_layers - 1) - (n - 2)
                assert weights[n - 1] == pytest.approx(min(max(value, 0), 1))
            assert weights[0] == 1
            assert len(weights) == num_layers


def test_other_schedules():
    assert UniformLayerWeights()(3, 10, 3) == [1, 1, 1]
    assert OutputOnly()(3, 10, 3) == [0, 0, 1]
    assert OutputOnly()(3, 10, 1) == [1]


def test_schedules_by_name():
    assert layer_weight_schedule("dynamic", 0.3) == DynamicLayerWeights(0.3)
    assert layer_weight_schedule("output_only") == OutputOnly()
    with pytest.raises(
        ValueError, match=r"layer_weights='other' is not known. Use one of dynamic, uniform, output_only"
    ):
        layer_weight_schedule("other")


@pytest.mark.parametrize("ramp_fraction", [0, -1, 1.5, float("nan")])
def test_a_ramp_outside_the_training_is_refused(ramp_fraction):
    with pytest.raises(ValueError, match="ramp_fraction"):
        DynamicLayerWeights(ramp_fraction)


def test_the_callback_sets_the_weights_of_the_step():
    module = torch.nn.Module()
    module.layer_weights = torch.zeros(3)
    state = TrainerState(global_step=25, max_steps=100)
    LayerWeightCallback(DynamicLayerWeights(0.5)).on_step_begin(None, state, TrainerControl(), model=module)
    assert module.layer_weights.tolist() == [1, 1, 0]
