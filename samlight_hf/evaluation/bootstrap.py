"""Bootstrap intervals and paired comparisons of means over instances.

The masks of one image share its light, its sharpness and its annotator, so they are not independent. All intervals here
resample *images*, each with all of its instances (the cluster bootstrap: Davison and Hinkley, "Bootstrap Methods and
their Application", 1997, section 3.8). The mean remains the mean over instances.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000

# Draws of images that are held at once: 8 MB an array, whatever the number of images and resamples.
_MAX_DRAWS = 2**20


class Interval(NamedTuple):
    """A mean over instances and the ends of its interval, which are NaN for a single image."""

    mean: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """The mean of b minus the mean of a, its interval, and a two-sided p-value for "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Compute a mean and its percentile bootstrap interval. The same seed gives the same numbers.

    For a single image nothing can be resampled: low and high are NaN, not a width of zero.

    Args:
        values: (n,).
        groups: (n,), the image of each value. Images are drawn with replacement, with all of their values. Without it
            each value is an image of its own.
        confidence: between 0 and 1, the share of all repetitions whose interval should contain the true mean. With
            fewer than about 20 images percentile intervals contain it more rarely.
        num_resamples: number of draws.
        seed: seed of the draws.

    Raises:
        ValueError: for no values, a value that is NaN or infinite, or groups of another length.
    """
    array = check_values(values, "values")
    means = resampled_means(array[:, None], group_index(groups, len(array)), confidence, num_resamples, seed)
    low, high = percentile_ends(means, confidence)
    return Interval(float(array.mean()), float(low[0]), float(high[0]))


def paired_bootstrap(
    values_a: Sequence[float],
    values_b: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    instances_a: Sequence[Hashable] | None = None,
    instances_b: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Compare two models on the same instances: mean(b) - mean(a).

    Both models are scored on each draw of images, so the difficulty of an image cancels. The p-value is twice the
    smaller share of draws on either side of zero, and at least 2 / (num_resamples + 1). It is below 1 - confidence
    where the interval excludes zero. It is not corrected for the number of comparisons. For a single image all values
    except the difference are NaN.

    Args:
        values_a: (n,), the values of a.
        values_b: (n,), the values of b in the same order.
        groups: (n,), the image of each value, as in `bootstrap_interval`.
        instances_a: (n,), the identity of each value of a.
        instances_b: (n,), the identity of each value of b. Given both, they must be equal.
        confidence: as in `bootstrap_interval`.
        num_resamples: number of draws.
        seed: seed of the draws.

    Raises:
        ValueError: for lists of different instances, and all errors of `bootstrap_interval`.
    """
    if len(values_a) != len(values_b):
        raise ValueError(
            f"a pair of models needs the same instances, but has {len(values_a)} and {len(values_b)} values."
        )
    if (instances_a is None) != (instances_b is None):
        raise ValueError("give instances_a and instances_b, or neither.")
    if instances_a is not None and instances_b is not None:
        if not len(instances_a) == len(instances_b) == len(values_a):
            raise ValueError(
                f"{len(values_a)} values a model, but {len(instances_a)} and {len(instances_b)} instances: one each is "
                "needed."
            )
        for place, (a, b) in enumerate(zip(instances_a, instances_b)):
            if a != b:
                raise ValueError(f"a pair of models needs the same instances: place {place} holds {a!r} and {b!r}.")
    differences = check_values(values_b, "values_b") - check_values(values_a, "values_a")
    index = group_index(groups, len(differences))
    return paired_tests(differences[:, None], index, confidence, num_resamples, seed)[0]


def check_values(values: Sequence[float], name: str) -> np.ndarray:
    """Return values as float64 (n,). Raises ValueError for other shapes, no values, NaN or infinite ones."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, but have shape {array.shape}.")
    if not len(array):
        raise ValueError(f"{name} are empty: there is no mean of nothing.")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(array)} {name} are not finite, first: {name}[{bad[0]}] is {array[bad[0]]}. "
            "Leaving them out would change the mean: find out where they come from."
        )
    return array


def group_index(groups: Sequence[Hashable] | None, num_values: int) -> np.ndarray:
    """Return the number of each value's group (n,), counted from 0 in order of appearance."""
    if groups is None:
        return np.arange(num_values)
    if len(groups) != num_values:
        raise ValueError(f"{len(groups)} groups for {num_values} values: each value needs one.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def resampled_means(values: np.ndarray, index: np.ndarray, confidence: float, num_resamples: int, seed: int):
    """Compute means over instances for resampled groups.

    Args:
        values: (n, K).
        index: int (n,), the group of each row, as `group_index` returns it.
        confidence: only checked here.
        num_resamples: number of draws.
        seed: seed of the draws.

    Returns:
        (num_resamples, K), NaN for a single group.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples} must be at least 1.")
    num_groups = int(index.max()) + 1
    if num_groups == 1:
        return np.full((num_resamples, values.shape[1]), np.nan)
    # Group sums and, as the last column, group sizes: (G, K + 1). A draw is how often each group was taken: (draws, G).
    sums = np.stack([np.bincount(index, weights=column, minlength=num_groups) for column in (*values.T, None)], axis=1)
    generator = np.random.default_rng(seed)
    means = np.empty((num_resamples, values.shape[1]))
    step = max(1, _MAX_DRAWS // num_groups)
    for start in range(0, num_resamples, step):
        num_draws = min(step, num_resamples - start)
        drawn = generator.integers(0, num_groups, (num_draws, num_groups))
        drawn += num_groups * np.arange(num_draws)[:, None]
        taken = np.bincount(drawn.ravel(), minlength=num_draws * num_groups).reshape(num_draws, num_groups)
        totals = taken.astype(np.float64) @ sums
        means[start : start + num_draws] = totals[:, :-1] / totals[:, -1:]
    return means


def percentile_ends(means: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and high ends (K,) of the percentile interval of means (num_resamples, K)."""
    return np.quantile(means, (1 - confidence) / 2, axis=0), np.quantile(means, (1 + confidence) / 2, axis=0)


def paired_tests(differences: np.ndarray, index, confidence, num_resamples, seed) -> list[PairedDifference]:
    """Test K columns of differences (n, K)."""
    means = resampled_means(differences, index, confidence, num_resamples, seed)
    # The one added is the observed sample itself, without which a p-value could be 0.
    sides = np.stack([(means <= 0).sum(axis=0), (means >= 0).sum(axis=0)]) + 1
    p_values = np.minimum(1, 2 * sides.min(axis=0) / (num_resamples + 1))
    p_values[np.isnan(means).any(axis=0)] = np.nan
    columns = zip(differences.mean(axis=0), *percentile_ends(means, confidence), p_values)
    return [PairedDifference(*map(float, column)) for column in columns]
