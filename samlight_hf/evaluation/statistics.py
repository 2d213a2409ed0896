"""Scores of models with their uncertainty: means with intervals, paired differences, and scores by object size.

Intervals resample images, as explained in `bootstrap.py`; means are over instances.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .bootstrap import (
    CONFIDENCE,
    NUM_RESAMPLES,
    check_values,
    group_index,
    paired_tests,
    percentile_ends,
    resampled_means,
)


NUM_BINS = 10  # of predicted IoUs, for the calibration error
MEASURES = "iou", "boundary_iou", "predicted_iou"
SIZES = "small", "medium", "large"
PLACES = "first", "second", "third"  # of the masks of multimask_output=True
_SMALL_BELOW, _MEDIUM_BELOW = 32**2, 96**2  # square pixels of the original image, as in COCO


@dataclass(frozen=True, eq=False)
class ModelResult:
    """The records of one model for every instance, and the settings of the evaluation.

    Args:
        settings: "model", and as far as they are known "dataset", "protocols" (sentences that state prompt, mask choice
            and averaging), "command", "date", "device", "dtype", "versions", "skipped" ({reason: count}),
            "num_pictures", "num_instances", "seconds" and "latency_ms" ({part: value}), "extra" ({name: value}).
        records: for each instance {"picture", "instance", "area" (square pixels), "width", "height", "iou",
            "boundary_iou", "predicted_iou"}, the last three by protocol ("1 click/oracle": prompt/mask choice), and
            optionally "mask_index" and "relative_area"; see `InstanceProtocols`.

    Raises:
        ValueError: without a name; for a record without identity, area or IoU; two records of one instance; or an IoU
            outside of 0 to 1. None and NaN are allowed, and reported as missing.
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
        """The protocols, in the order in which records name them."""
        return list(dict.fromkeys(protocol for record in self.records for protocol in record["iou"] or ()))

    @cached_property
    def scores(self) -> dict[str, dict]:
        """The scores of every protocol; see `protocol_scores`."""
        return protocol_scores(self.records, self.protocols)

    def score(self, protocol: str, *path: str) -> dict:
        """Return one score; {"mean": None, "reason": ...} where this model was not evaluated with the protocol."""
        score = self.scores.get(protocol)
        for name in path or ("iou",):
            score = score and score.get(name)
        return score or {"mean": None, "low": None, "high": None, "n": 0, "reason": "not evaluated"}


def size_class(area: float) -> str:
    """Return the size class of an area: "small" below 32² square pixels, "medium" below 96², otherwise "large".

    These are COCO's limits, at the image's original size. COCOeval counts an area of exactly 32² or 96² in both
    neighboring classes; here it belongs only to the larger one.

    Raises:
        ValueError: for an area that is not a positive number. Instances without area are to be skipped and counted.
    """
    if not (area > 0 and math.isfinite(area)):
        raise ValueError(f"area={area} is not a positive number of pixels.")
    return SIZES[(area >= _SMALL_BELOW) + (area >= _MEDIUM_BELOW)]


def calibration_gap(predicted_iou: Sequence[float], iou: Sequence[float]) -> float:
    """Return the mean of |predicted - true IoU|: how far the model's own estimate can be trusted.

    Args:
        predicted_iou: (n,).
        iou: (n,).

    Raises:
        ValueError: for different lengths, no values, NaN or infinite ones.
    """
    return float(np.abs(np.subtract(*_checked_pair(predicted_iou, iou))).mean())


def calibration_error(predicted_iou: Sequence[float], iou: Sequence[float]) -> float:
    """Compute the expected calibration error (Naeini et al. 2015; Guo et al. 2017).

    It is |mean predicted - mean true IoU| of the instances whose predicted IoU is in one of ten bins of equal width,
    averaged over bins by their instances. Where annotators disagree about an object, no estimate is right for each of
    their masks, and the gap stays above zero; the error is zero where estimates are right on average. It is never
    larger than the gap. For few instances it is biased upwards, and more so in bootstrap draws from them: chance in one
    bin does not cancel chance in another.

    Args:
        predicted_iou: (n,).
        iou: (n,).

    Raises:
        ValueError: as `calibration_gap` does.
    """
    predicted, true = _checked_pair(predicted_iou, iou)
    return _summed_magnitudes(_binned(predicted, predicted - true))


def protocol_scores(records: Sequence[Mapping], protocols: Sequence[str], **options) -> dict[str, dict]:
    """Compute every protocol's scores over instance records.

    Args:
        records: instance records; see `ModelResult`.
        protocols: the protocols.
        options: `confidence`, `num_resamples` and `seed` of `bootstrap_interval`.

    Returns:
        For each protocol {"iou": score, "boundary_iou": score, "calibration_gap": score, "calibration_error": score,
        "by_size": {"small": score, ...}}, without "boundary_iou" where no record has it. A score is {"mean", "low",
        "high", "n"}. A mean is taken over all instances or not at all: where a value is missing or NaN, the three are
        None, and "reason" says how many values are missing and which is the first. For a single image, low and high are
        None and "reason" says so.
    """
    iou, boundary, predicted = (values_of(records, measure, protocols) for measure in MEASURES)
    measured = {
        "iou": iou, "boundary_iou": boundary, "calibration_gap": np.abs(predicted - iou),
        "calibration_error": _binned(predicted, predicted - iou),
    }  # fmt: skip
    if not any(record.get("boundary_iou") for record in records):  # not requested
        del measured["boundary_iou"]
    blocks = {name: score_columns(values, records, **options) for name, values in measured.items()}
    sizes = np.array([size_class(record["area"]) for record in records])
    by_size = {}
    for size in SIZES:
        rows = np.flatnonzero(sizes == size).tolist()
        by_size[size] = score_columns(iou[rows], [records[row] for row in rows], **options)
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
    """Compare the IoU of b with that of a by protocol, with `paired_bootstrap`.

    Args:
        records_a: instance records; see `ModelResult`.
        records_b: records of the same instances, in any order.
        protocols: the protocols.
        names: the names of a and b in reasons.
        options: `confidence`, `num_resamples` and `seed` of `bootstrap_interval`.

    Returns:
        {"difference", "low", "high", "p_value", "n"} for each protocol. Where the models cannot be compared (other
        instances, a missing value) the first four are None, and "reason" says why; for a single image, all but the
        difference.
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
        index = group_index([image for image, _ in keys], len(keys))
        for column, test in zip(whole, paired_tests((values_b - values_a)[:, whole], index, **_options(options))):
            ends = _interval(low=test.low, high=test.high, p_value=test.p_value)
            differences[column] = {"difference": test.difference, "n": len(keys)} | ends
    return {protocol: differences[column] for column, protocol in enumerate(protocols)}


def values_of(records: Sequence[Mapping], measure: str, protocols: Sequence[str]) -> np.ndarray:
    """Return one measure as float64 (instances, protocols); a value that is absent or None is NaN."""
    values = np.full((len(records), len(protocols)), np.nan)
    for row, record in enumerate(records):
        measured = record.get(measure) or {}
        for column, protocol in enumerate(protocols):
            value = measured.get(protocol)
            if value is not None:
                values[row, column] = value
    return values


def instance_key(record: Mapping) -> tuple:
    """Return the identity of a record's instance, the same in the results of all models."""
    return record["picture"], record["instance"]


def score_columns(values: np.ndarray, records: Sequence[Mapping], **options) -> list[dict]:
    """Compute a score for each column of (instances, protocols); see `protocol_scores`.

    Values (instances, protocols, bins), as returned by `_binned`, are scored by the sum of the magnitudes of the bins'
    means.
    """
    keys = [instance_key(record) for record in records]
    values = values[..., None] if values.ndim == 2 else values
    problems = [_problem(column, keys) if keys else "no such instances" for column in values.sum(axis=2).T]
    whole = [column for column, problem in enumerate(problems) if not problem]
    scores = [{"mean": None, "low": None, "high": None, "n": len(keys), "reason": problem} for problem in problems]
    if whole:
        options = _options(options)
        # All protocols are scored on the same draws: one pass serves them all.
        columns = values[:, whole].reshape(len(keys), -1)
        means = resampled_means(columns, group_index([image for image, _ in keys], len(keys)), **options)
        means = np.abs(means.reshape(len(means), len(whole), -1)).sum(axis=2)
        for column, low, high in zip(whole, *percentile_ends(means, options["confidence"])):
            mean = _summed_magnitudes(values[:, column])
            scores[column] = {"mean": mean, "n": len(keys)} | _interval(low=low, high=high)
    return scores


def _binned(predicted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Put each value into the bin of its prediction: (...) twice -> (..., NUM_BINS), 0 in the other bins.

    A NaN is NaN in all bins. A bin contains its lower end, and the last one contains 1. Predictions outside of 0 to 1
    are in the nearest bin.
    """
    bins = np.clip(np.floor(predicted * NUM_BINS), 0, NUM_BINS - 1)
    return values[..., None] * (bins[..., None] == np.arange(NUM_BINS))


def _summed_magnitudes(values: np.ndarray) -> float:
    """Sum the magnitudes of the means of the columns of (n, bins); for one nonnegative column, this is its mean."""
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


def _options(options: Mapping) -> dict:
    return {"confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES, "seed": 0, **options}


def _checked_pair(predicted_iou: Sequence[float], iou: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(predicted_iou) != len(iou):
        raise ValueError(f"{len(predicted_iou)} predicted and {len(iou)} true IoUs cannot be compared.")
    return check_values(predicted_iou, "predicted_iou"), check_values(iou, "iou")
