"""Weight averaging: several models of one architecture become one model."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


_NOT_ARCHITECTURE = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path", "initializer_range"}


@torch.no_grad()
def average_models(models: Sequence[PreTrainedModel], shares: Sequence[float] | None = None) -> PreTrainedModel:
    """Average the weights of several models and load the result into the first of them.

    Models fine-tuned separately from the same initialization, with different data, schedules or seeds, often average to
    a model that generalizes better than each of them, at the inference cost of one ("Model soups", Wortsman et al.,
    arXiv 2203.05482). The average of models with different initializations is useless, so evaluate the result.

    Args:
        models: Two or more models of the same architecture. The first one is changed in place.
        shares: One positive weight per model, relative to each other. Default: equal shares.

    Returns:
        `models[0]` with the averaged weights. Sums are computed in float32; each weight keeps its dtype and device.

    Raises:
        ValueError: For fewer than two models, for shares that are not one positive finite number per model, or for
            models with different configs.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} model to average: give two or more.")
    shares = [1.0] * len(models) if shares is None else list(shares)
    if len(shares) != len(models) or not all(0 < share < float("inf") for share in shares):
        raise ValueError(f"shares={shares} must be a positive number for each of the {len(models)} models.")
    first = _architecture(models[0].config.to_dict())
    for number, model in enumerate(models[1:], start=2):
        other = _architecture(model.config.to_dict())
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"models 1 and {number} differ: {name} is {first.get(name)} and {other.get(name)}. "
                    "Only models of one architecture can be averaged."
                )
    states, total = [model.state_dict() for model in models], sum(shares)
    # Compute all averages before writing any: a state dict holds a tied weight under two names.
    averages = {
        name: sum(share / total * state[name].float().to(weight.device) for share, state in zip(shares, states))
        for name, weight in states[0].items()
    }
    models[0].load_state_dict(averages)
    return models[0]


def _architecture(config: dict, prefix: str = "") -> dict:
    """Flatten the config fields that define the architecture: {"vision_config.hidden_size": 384, ...}."""
    fields: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= _architecture(value, f"{prefix}{name}.")
        elif name not in _NOT_ARCHITECTURE:
            fields[f"{prefix}{name}"] = value
    return fields
