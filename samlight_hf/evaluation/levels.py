"""Which of the three masks of a prompt is the best one, which one the model takes for it, and how large they are.

A click is ambiguous: it may mean a part or the whole. SAM answers with three masks, and each of its three outputs
learns a level of its own if the training shows nested masks. Where one output is nearly always the best, the others
have learned nothing; where the predicted best is another one than the best, the scores are at fault, not the masks.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .statistics import PLACES, SIZES, score_columns, size_class, values_of


ALL = "all"  # objects, beside SIZES


def mask_levels(records: Sequence[Mapping], **options) -> dict[str, dict[str, dict]]:
    """Compute how often each of three masks is the best and the predicted best, and how large each is.

    Args:
        records: instance records with "mask_index" and "relative_area"; see `InstanceProtocols`.
        options: `confidence`, `num_resamples` and `seed` of `bootstrap_interval`.

    Returns:
        For each prompt with three masks, and in it for "all" objects and each of `SIZES`: {"best": {"first": score,
        "second": score, "third": score}, "no_overlap": score, "predicted_best": as best, "mean_area": as best,
        "median_area": {"first": float or None, ...}}. Scores are shares of the objects, and ratios of areas for
        "mean_area", as `protocol_scores` returns them. An object with which none of the masks overlaps has no best
        one, and counts for "no_overlap". Areas are given for boxes and first clicks alone: later clicks depend on
        which mask was taken before.
    """
    named = (protocol for record in records for protocol in record.get("mask_index") or ())
    prompts = dict.fromkeys(protocol.rpartition("/")[0] for protocol in named)
    sizes = np.array([size_class(record["area"]) for record in records])
    parts = {ALL: list(range(len(records)))}
    parts |= {size: np.flatnonzero(sizes == size).tolist() for size in SIZES}
    levels: dict[str, dict[str, dict]] = {prompt: {} for prompt in prompts}
    for part, rows in parts.items():
        of_part = [records[row] for row in rows]
        tables = [_columns(of_part, prompt) for prompt in prompts]
        scores = iter(score_columns(np.concatenate(tables, axis=1), of_part, **options) if tables else ())
        for prompt, table in zip(prompts, tables):
            levels[prompt][part] = {
                "best": {place: next(scores) for place in PLACES},
                "no_overlap": next(scores),
                "predicted_best": {place: next(scores) for place in PLACES},
                "mean_area": {place: next(scores) for place in PLACES},
                "median_area": dict(zip(PLACES, _medians(table[:, -len(PLACES) :]))),
            }
    return levels


def _columns(records: Sequence[Mapping], prompt: str) -> np.ndarray:
    """Return what is averaged over n objects: (n, 10), in the order in which `mask_levels` takes it apart."""
    indices = values_of(records, "mask_index", [f"{prompt}/oracle", f"{prompt}/predicted"])
    (best_iou,) = values_of(records, "iou", [f"{prompt}/oracle"]).T
    areas = values_of(records, "relative_area", [f"{prompt}/{place}" for place in PLACES])
    best, predicted = (_one_hot(column) for column in indices.T)
    overlaps = np.where(np.isnan(best_iou), np.nan, best_iou > 0)
    return np.concatenate([best * overlaps[:, None], 1 - overlaps[:, None], predicted, areas], axis=1)


def _one_hot(indices: np.ndarray) -> np.ndarray:
    """Return 1 at the index of each row: (n,) -> (n, 3); NaN stays NaN."""
    return np.where(np.isnan(indices)[:, None], np.nan, indices[:, None] == np.arange(len(PLACES)))


def _medians(values: np.ndarray) -> list[float | None]:
    if not len(values) or np.isnan(values).any():
        return [None] * values.shape[1]
    return np.median(values, axis=0).tolist()
