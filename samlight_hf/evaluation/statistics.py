"""Means that say how sure they are: bootstrap intervals, paired comparisons, and scores by object size.

Masks of one image share its light, its sharpness and its annotator, so they are no independent draws. All intervals
here resample *images*, each with all of its instances (the cluster bootstrap: Davison and Hinkley, "Bootstrap Methods
and their Application", 1997, section 3.8), while the mean stays the mean over instances.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
NUM_BINS = 10  # of predicted IoUs, for the calibration error
MEASURES = "iou", "boundary_iou", "predicted_iou"
SIZES = "small", "medium", "large"
_SMALL_BELOW, _MEDIUM_BELOW = 32**2, 96**2  # square pixels of the original image, as in COCO

# Draws of images that are held at once: 8 MB an array, whatever the number of images and resamples.
_MAX_DRAWS = 2**20


class Interval(NamedTuple):
    """A mean over instances and the ends of its interval, which are NaN where one image is all there is."""

    mean: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Mean of b minus mean of a, its interval, and a two-sided p-value for "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, eq=False)
class ModelResult:
    """What one model did on every instance, and how it was asked.

    Args:
        settings: "model", and as far as they are known "dataset", "protocols" (sentences that state prompt, mask choice and
            averaging), "command", "date", "device", "dtype", "versions", "skipped" ({reason: count}), "num_pictures",
            "num_instances", "seconds" and "latency_ms" ({part: value}), "extra" ({name: value}).
        records: for each instance {"picture", "instance", "area" (square pixels), "width", "height", "iou",
            "boundary_iou", "predicted_iou"}, the last three by protocol ("1 click/oracle": prompt/mask taken).

    Raises:
        ValueError: without a name, for a record without identity, area or IoU, two of the same instance, or an IoU outside
            of 0 to 1. None and NaN are taken, and reported as missing.
    """

    settings: Mapping
    records: Sequence[Mapping]

    def __post_init__(self):
        if not self.settings.get("model"):
            raise ValueError("settings['model'] must name the model.")
        seen = set()
        for place, record in enumerate(self.records):
            if absent := {"picture", "instance", "area", "iou"} - record.keys():
                raise ValueError(f"{self.name}: record {place} has no {', '.join(sorted(absent))}.")
            if (key := instance_key(record)) in seen:
                raise ValueError(f"{self.name}: image {key[0]}, instance {key[1]} has two records.")
            seen.add(key)
            for measure in ("iou", "boundary_iou"):
                for protocol, value in (record.get(measure) or {}).items():
                    if value is not None and (value < 0 or value > 1):
                        raise ValueError(
                            f"{self.name}: image {key[0]}, instance {key[1]}: {protocol} {measure} is {value}."
                        )

    @property
    def name(self) -> str:
        return str(self.settings["model"])

    @cached_property
    def protocols(self) -> list[str]:
        """In the order in which records name them."""
        return list(dict.fromkeys(protocol for record in self.records for protocol in record["iou"] or ()))

    @cached_property
    def scores(self) -> dict[str, dict]:
        """See `protocol_scores`."""
        return protocol_scores(self.records, self.protocols)

    def score(self, protocol: str, *path: str) -> dict:
        """One score, {"mean": None, "reason"} where this model was not evaluated so."""
        score = self.scores.get(protocol)
        for name in path or ("iou",):
            score = score and score[name]
        return score or {"mean": None, "low": None, "high": None, "n": 0, "reason": "not evaluated"}


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `values` (n,) and its percentile bootstrap interval; the same numbers for the same seed.

    Args:
        groups: (n,) the image of each value. Images are drawn with replacement, with all of their values. Without it
            each value is an image of its own.
        confidence: between 0 and 1, the part of all repetitions whose interval should hold the true mean. With fewer
            than about 20 images percentile intervals hold it more rarely than that.

    With a single image there is nothing to resample: low and high are NaN, not a width of zero.

    Raises:
        ValueError: for no values, for a value that is NaN or infinite, for groups of another length.
    """
    values = _checked(values, "values")
    means = _resampled_means(values[:, None], _group_index(groups, len(values)), confidence, num_resamples, seed)
    low, high = _ends(means, confidence)
    return Interval(float(values.mean()), float(low[0]), float(high[0]))


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
    """How much better b is than a on the same instances: mean(b) - mean(a), (n,) each in the same order.

    Both models are scored on each draw of images, so what makes an image hard for both cancels. The p-value is twice
    the smaller part of draws on either side of zero, and at least 2 / (num_resamples + 1): it is below 1 - confidence where
    the interval leaves zero out. It knows nothing of how many comparisons are made.

    Args:
        groups: (n,) the image of each value, as in `bootstrap_interval`.
        instances_a, instances_b: (n,) the identity of each value; given both, they must be the same, place by place.

    With a single image all but the difference is NaN.

    Raises:
        ValueError: for lists of different instances, and whatever `bootstrap_interval` refuses.
    """
    if len(values_a) != len(values_b):
        raise ValueError(
            f"a pair of models needs the same instances, but has {len(values_a)} and {len(values_b)} values."
        )
    if (instances_a is None) != (instances_b is None):
        raise ValueError("give instances_a and instances_b, or neither.")
    if instances_a is not None:
        if not len(instances_a) == len(instances_b) == len(values_a):
            raise ValueError(
                f"{len(values_a)} values a model, but {len(instances_a)} and {len(instances_b)} instances: one each is needed."
            )
        for place, (a, b) in enumerate(zip(instances_a, instances_b)):
            if a != b:
                raise ValueError(f"a pair of models needs the same instances: place {place} holds {a!r} and {b!r}.")
    differences = _checked(values_b, "values_b") - _checked(values_a, "values_a")
    index = _group_index(groups, len(differences))
    return _paired(differences[:, None], index, confidence, num_resamples, seed)[0]


def size_class(area: float) -> str:
    """ "small" below 32² square pixels, "medium" below 96², else "large": COCO's limits, at the original size.

    COCOeval counts an area of exactly 32² or 96² in both neighbours; here it belongs to the larger one alone.

    Raises:
        ValueError: for an area that is not a positive number. Instances without area are to be skipped and counted.
    """
    if not (area > 0 and math.isfinite(area)):
        raise ValueError(f"area={area} is not a positive number of pixels.")
    return SIZES[(area >= _SMALL_BELOW) + (area >= _MEDIUM_BELOW)]


def calibration_gap(predicted_iou: Sequence[float], iou: Sequence[float]) -> float:
    """Mean of |predicted - true IoU| over (n,) instances: how far the model's own estimate can be trusted.

    Raises:
        ValueError: for different lengths, no values, NaN or infinite ones.
    """
    return float(np.abs(np.subtract(*_checked_pair(predicted_iou, iou))).mean())


def calibration_error(predicted_iou: Sequence[float], iou: Sequence[float]) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017) over (n,) instances: |mean predicted - mean true IoU|
    of those whose predicted IoU is in one of ten bins of equal width, averaged over bins by their instances.

    Where annotators disagree about a thing, no estimate is right for each of their masks, and the gap stays above zero; this
    is zero where estimates are right on average. It is never more than the gap. Of few instances it comes out too large, and
    of what the bootstrap draws from them larger still: chance in one bin does not cancel that in another.

    Raises ValueError as `calibration_gap` does.
    """
    predicted, true = _checked_pair(predicted_iou, iou)
    return _summed_magnitudes(_binned(predicted, predicted - true))


def protocol_scores(records: Sequence[Mapping], protocols: Sequence[str], **options) -> dict[str, dict]:
    """Every protocol's scores over instance records (see `ModelResult`), by protocol.

    Returns for each {"iou": score, "boundary_iou": score, "calibration_gap": score, "calibration_error": score,
    "by_size": {"small": score, ...}}, where a score is {"mean", "low", "high", "n"}. A mean is taken over all instances or
    not at all: where a value is missing or NaN, the three are None and "reason" tells how many and which is the first.
    With a single image, low and high are None and "reason" says so.

    `options` are `confidence`, `num_resamples` and `seed` of `bootstrap_interval`.
    """
    iou, boundary, predicted = (values_of(records, measure, protocols) for measure in MEASURES)
    measured = {
        "iou": iou, "boundary_iou": boundary, "calibration_gap": np.abs(predicted - iou),
        "calibration_error": _binned(predicted, predicted - iou),
    }  # fmt: skip
    blocks = {name: _scores(values, records, **options) for name, values in measured.items()}
    sizes = np.array([size_class(record["area"]) for record in records])
    by_size = {}
    for size in SIZES:
        rows = np.flatnonzero(sizes == size)
        by_size[size] = _scores(iou[rows], [records[row] for row in rows], **options)
    return {
        protocol: {
            **{name: scores[column] for name, scores in blocks.items()},
            "by_size": {size: scores[column] for size, scores in by_size.items()},
        }
        for column, protocol in enumerate(protocols)
    }


def protocol_differences(
    records_a: Sequence[Mapping],
    records_b: Sequence[Mapping],
    protocols: Sequence[str],
    names: tuple[str, str] = ("a", "b"),
    **options,
) -> dict[str, dict]:
    """By protocol, what `paired_bootstrap` says of the IoU of b against a: {"difference", "low", "high", "p_value", "n"}.

    Where they cannot be compared (other instances, a value missing) the four are None and "reason" says why; with a
    single image, all but the difference. The order
    of the instances is free. `names` are what reasons call the two.
    """
    place_of = {instance_key(record): place for place, record in enumerate(records_b)}
    keys = [instance_key(record) for record in records_a]
    if not keys or place_of.keys() != set(keys):
        only_a, only_b = len(set(keys) - place_of.keys()), len(place_of.keys() - set(keys))
        reason = (
            f"not the same instances: {only_a} only in {names[0]}, {only_b} only in {names[1]}"
            if keys
            else "no instances"
        )
        return {protocol: _no_difference(len(keys), reason) for protocol in protocols}
    values_a = values_of(records_a, "iou", protocols)
    values_b = values_of([records_b[place_of[key]] for key in keys], "iou", protocols)
    problems = [
        "; ".join(
            f"{problem} ({name})" for name, problem in zip(names, (_problem(a, keys), _problem(b, keys))) if problem
        )
        for a, b in zip(values_a.T, values_b.T)
    ]
    whole = [column for column, problem in enumerate(problems) if not problem]
    differences = {column: _no_difference(len(keys), problems[column]) for column in range(len(protocols))}
    if whole:
        index = _group_index([image for image, _ in keys], len(keys))
        for column, test in zip(whole, _paired((values_b - values_a)[:, whole], index, **_options(options))):
            ends = _interval(low=test.low, high=test.high, p_value=test.p_value)
            differences[column] = {"difference": test.difference, "n": len(keys)} | ends
    return {protocol: differences[column] for column, protocol in enumerate(protocols)}


def values_of(records: Sequence[Mapping], measure: str, protocols: Sequence[str]) -> np.ndarray:
    """(instances, protocols) float64 of one measure; a value that is absent or None is NaN."""
    values = np.full((len(records), len(protocols)), np.nan)
    for row, record in enumerate(records):
        measured = record.get(measure) or {}
        for column, protocol in enumerate(protocols):
            value = measured.get(protocol)
            if value is not None:
                values[row, column] = value
    return values


def instance_key(record: Mapping) -> tuple:
    """What makes an instance the same one in the results of several models."""
    return record["picture"], record["instance"]


def _scores(values: np.ndarray, records: Sequence[Mapping], **options) -> list[dict]:
    """One score for each column of (instances, protocols): see `protocol_scores`. Of (instances, protocols, bins), as
    `_binned` makes them, a score is the sum of the magnitudes of the bins' means."""
    keys = [instance_key(record) for record in records]
    values = values[..., None] if values.ndim == 2 else values
    problems = [_problem(column, keys) if keys else "no such instances" for column in values.sum(axis=2).T]
    whole = [column for column, problem in enumerate(problems) if not problem]
    scores = [{"mean": None, "low": None, "high": None, "n": len(keys), "reason": problem} for problem in problems]
    if whole:
        options = _options(options)
        # All protocols are scored on the same draws: one pass serves them all.
        columns = values[:, whole].reshape(len(keys), -1)
        means = _resampled_means(columns, _group_index([image for image, _ in keys], len(keys)), **options)
        means = np.abs(means.reshape(len(means), len(whole), -1)).sum(axis=2)
        for column, low, high in zip(whole, *_ends(means, options["confidence"])):
            mean = _summed_magnitudes(values[:, column])
            scores[column] = {"mean": mean, "n": len(keys)} | _interval(low=low, high=high)
    return scores


def _binned(predicted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(...) twice -> (..., NUM_BINS): each value in the bin of its prediction, 0 in the others; where it is NaN, NaN in all.

    Bins hold their lower end, and the last one 1; predictions outside of 0 to 1 are in the bin at that end.
    """
    bins = np.clip(np.floor(predicted * NUM_BINS), 0, NUM_BINS - 1)
    return values[..., None] * (bins[..., None] == np.arange(NUM_BINS))


def _summed_magnitudes(values: np.ndarray) -> float:
    """(n, bins): |mean over n| of each bin, added up: of one bin that holds nothing below zero, its mean."""
    return float(sum(abs(column.mean()) for column in values.T))


def _problem(values: np.ndarray, keys: Sequence[tuple]) -> str:
    bad = np.flatnonzero(~np.isfinite(values))
    if not len(bad):
        return ""
    image, instance = keys[bad[0]]
    return f"{len(bad)} of {len(values)} values are missing or not finite, first: image {image}, instance {instance}"


def _interval(**ends: float) -> dict:
    if any(map(math.isnan, ends.values())):
        return {**dict.fromkeys(ends), "reason": "no interval: a single image"}
    return {name: float(end) for name, end in ends.items()}


def _no_difference(num_instances: int, reason: str) -> dict:
    return {"difference": None, "low": None, "high": None, "p_value": None, "n": num_instances, "reason": reason}


def _options(given: Mapping) -> dict:
    return {"confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES, "seed": 0, **given}


def _checked(values: Sequence[float], name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one dimension, but have shape {values.shape}.")
    if not len(values):
        raise ValueError(f"{name} are empty: there is no mean of nothing.")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(values)} {name} are not finite, first: {name}[{bad[0]}] is {values[bad[0]]}. "
            "Leaving them out would change the mean: find out where they come from."
        )
    return values


def _checked_pair(predicted_iou: Sequence[float], iou: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(predicted_iou) != len(iou):
        raise ValueError(f"{len(predicted_iou)} predicted and {len(iou)} true IoUs cannot be compared.")
    return _checked(predicted_iou, "predicted_iou"), _checked(iou, "iou")


def _group_index(groups: Sequence[Hashable] | None, num_values: int) -> np.ndarray:
    """(n,) int, the groups numbered from 0 in the order in which they appear."""
    if groups is None:
        return np.arange(num_values)
    if len(groups) != num_values:
        raise ValueError(f"{len(groups)} groups for {num_values} values: each value needs one.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def _resampled_means(values: np.ndarray, index: np.ndarray, confidence: float, num_resamples: int, seed: int):
    """(n, K) values of groups `index` (n,) -> (num_resamples, K) means over instances; NaN for a single group."""
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


def _ends(means: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """(num_resamples, K) -> the low and high ends (K,) of the percentile interval."""
    return np.quantile(means, (1 - confidence) / 2, axis=0), np.quantile(means, (1 + confidence) / 2, axis=0)


def _paired(differences: np.ndarray, index, confidence, num_resamples, seed) -> list[PairedDifference]:
    """(n, K) differences -> K tests."""
    means = _resampled_means(differences, index, confidence, num_resamples, seed)
    # The one added is the observed sample itself, without which a p-value could be 0.
    sides = np.stack([(means <= 0).sum(axis=0), (means >= 0).sum(axis=0)]) + 1
    p_values = np.minimum(1, 2 * sides.min(axis=0) / (num_resamples + 1))
    p_values[np.isnan(means).any(axis=0)] = np.nan
    columns = zip(differences.mean(axis=0), *_ends(means, confidence), p_values)
    return [PairedDifference(*map(float, column)) for column in columns]
