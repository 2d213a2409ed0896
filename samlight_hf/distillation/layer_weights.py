"""Layer-wise weights a_n(t) of the feature distillation loss, SAM-Lightening (arXiv 2403.09195), section 2.2.

Focus layers are numbered from the one nearest the input, n = 1 ... N; the last is the encoder's output. A schedule is a
pure function of the step, so nothing has to be saved to resume.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import TrainerCallback


class LayerWeightSchedule(Protocol):
    def __call__(self, step: int, max_steps: int, num_layers: int) -> list[float]:
        """Return the weights a_1 ... a_N of an optimizer step, counted from 0 to `max_steps`."""


@dataclass(frozen=True)
class DynamicLayerWeights:
    """Dynamic weights: a_1 = 1 throughout; the others rise from 0 to 1, one after another, during the ramp.

    a_n(t) = clip((t / T_ramp) * (N - 1) - (n - 2), 0, 1), T_ramp = `ramp_fraction` * `max_steps`.
    """

    ramp_fraction: float = 0.5

    def __post_init__(self):
        if not 0 < self.ramp_fraction <= 1:
            raise ValueError(f"ramp_fraction={self.ramp_fraction} must be above 0 and at most 1.")

    def __call__(self, step: int, max_steps: int, num_layers: int) -> list[float]:
        turn = step / (self.ramp_fraction * max_steps) * (num_layers - 1)
        return [1.0, *(min(max(turn - (n - 2), 0.0), 1.0) for n in range(2, num_layers + 1))]


@dataclass(frozen=True)
class UniformLayerWeights:
    """Weights that are all 1 throughout."""

    def __call__(self, step: int, max_steps: int, num_layers: int) -> list[float]:
        return [1.0] * num_layers


@dataclass(frozen=True)
class OutputOnly:
    """Weight 1 for the encoder's output alone."""

    def __call__(self, step: int, max_steps: int, num_layers: int) -> list[float]:
        return [0.0] * (num_layers - 1) + [1.0]


def layer_weight_schedule(name: str, ramp_fraction: float = 0.5) -> LayerWeightSchedule:
    """Return the schedule called "dynamic", "uniform" or "output_only". Raises ValueError for another name."""
    schedules: dict[str, LayerWeightSchedule] = {
        "dynamic": DynamicLayerWeights(ramp_fraction),
        "uniform": UniformLayerWeights(),
        "output_only": OutputOnly(),
    }
    if name not in schedules:
        raise ValueError(f"layer_weights={name!r} is not known. Use one of {', '.join(schedules)}.")
    return schedules[name]


class LayerWeightCallback(TrainerCallback):
    """Callback that sets `layer_weights`, a buffer of the trained module, at the beginning of every optimizer step."""

    def __init__(self, schedule: LayerWeightSchedule):
        self.schedule = schedule

    def on_step_begin(self, args, state, control, model, **kwargs):
        weights = self.schedule(state.global_step, state.max_steps, len(model.layer_weights))
        model.layer_weights.copy_(torch.tensor(weights))
