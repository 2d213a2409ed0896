"""One model of several: the average of their weights."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


_NOT_ARCHITECTURE = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path", "initializer_range"}


@torch.no_grad()
def average_models(models: Sequence[PreTrainedModel], shares: Sequence[float] | None = None) -> PreTrainedModel:
    """The first of the models, with the weighted mean of all their weights: float32 sums, each weight in its own dtype.

    Models that were trained apart from a common beginning, on other data, for other lengths or with another seed, often average to
    one that is better than each of them on images they have not seen, at the cost of one ("model soups", arXiv 2203.05482).
    From different beginnings the average is worthless: measure it.

    `shares` are relative to each other; by default all are the same.

    Raises:
        ValueError: for less than two models, for shares that are not one positive number for each, and for models of different
            configs, whose weights mean different things.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} model to average: give two or more.")
    shares = [1.0] * len(models) if shares is None else list(shares)
    if len(shares) != len(models) or not all(0 < share < float("inf") for share in shares):
        raise ValueError(f"shares={shares} must be a positive number for each of the {len(models)} models.")
    first = _architecture(models[0].config.to_dict())
    for place, model in enumerate(models[1:], start=2):
        other = _architecture(model.config.to_dict())
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"models 1 and {place} differ: {name} is {first.get(name)} and {other.get(name)}. Only models of one "
                    "architecture can be averaged."
                )
    states, total = [model.state_dict() for model in models], sum(shares)
    # All before the first is written: tied weights stand in a state under two names.
    averages = {
        name: sum(share / total * state[name].float().to(weight.device) for share, state in zip(shares, states))
        for name, weight in states[0].items()
    }
    models[0].load_state_dict(averages)
    return models[0]


def _architecture(config: dict, prefix: str = "") -> dict:
    """Everything in a config, of whatever depth, that says what is computed: {"vision_config.hidden_size": 384, ...}."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _architecture(value, f"{prefix}{name}.")
        elif name not in _NOT_ARCHITECTURE:
            found[f"{prefix}{name}"] = value
    return found
