"""Reports of evaluations: a folder with report.json, report.md, plots and worst cases.

Every missing score is listed with its reason; nothing is left out of an average. Files are written atomically, so an
interrupted run leaves only complete files.
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..utils.atomic_files import atomic_write, fit_name
from ..utils.messages import text_table
from .bootstrap import CONFIDENCE, NUM_RESAMPLES
from .files import is_missing, plain, slug, write_records
from .levels import ALL, mask_levels
from .plots import names_of, protocols_of, require_matplotlib, write_plots
from .statistics import NUM_BINS, PLACES, SIZES, ModelResult, protocol_differences
from .worst_cases import worst_cases


__all__ = ["ModelResult", "console_table", "require_matplotlib", "worst_cases", "write_report"]

MISSING = "missing"
_SETTINGS = dict.fromkeys(
    ("dataset", "num_pictures", "num_instances", "device", "dtype", "date", "seconds", "latency_ms", "versions")
)
# Title of each score, and its path for `ModelResult.score`.
_PATHS = {
    "mIoU": ("iou",), **{f"mIoU of {size}": ("by_size", size) for size in SIZES}, "boundary IoU": ("boundary_iou",),
    "calibration gap": ("calibration_gap",), "calibration error": ("calibration_error",),
}  # fmt: skip

_LEVELS_NOTE = (
    "Best: the share of the objects whose best mask, by the true IoU, is the first, second or third of the three that "
    "a prompt gives. Predicted best: the same for the mask with the highest predicted IoU. Area: the median area of "
    "the first, second and third mask as a multiple of the object's; missing for later clicks, which depend on the "
    "mask that was taken before. No overlap: the share of the objects that none of the three masks touches; they have "
    "no best mask. `report.json` has intervals and mean areas."
)


def write_report(
    folder: str | os.PathLike,
    results: Sequence[ModelResult],
    worst_sheets: Iterable[str | os.PathLike] = (),
    plots: bool = True,
) -> Path:
    """Write report.json, report.md, records_<model>.jsonl.gz and plots.

    NaN is written as null; for a score, the reason is written beside it.

    Args:
        folder: the folder of the report, created where it is missing.
        results: the results of the models. The others are compared with the first one.
        worst_sheets: files of `worst_cases`, in the same folder, to be shown in report.md.
        plots: whether to draw plots.

    Returns:
        The path of report.md.

    Raises:
        ValueError: without results, or for two models of one name.
        ImportError: where matplotlib is missing, before anything is written.
    """
    _check_results(results)
    if plots:
        require_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = _comparisons(results)
    levels = [mask_levels(result.records) for result in results]
    for result in results:
        atomic_write(folder / _records_name(result), partial(write_records, records=result.records))
    plot_notes = write_plots(folder, results) if plots else {"plots": "not asked for"}
    report = {
        "format_version": 1,
        "intervals": {
            "method": "percentile bootstrap over images", "confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES,
            "seed": 0,
        },
        "models": [
            {"settings": r.settings, "scores": r.scores, "levels": its_levels, "records": _records_name(r)}
            for r, its_levels in zip(results, levels)
        ],
        "comparisons": [
            {"baseline": results[0].name, "model": name, "protocols": c} for name, c in comparisons.items()
        ],
        "plots": plot_notes,
    }  # fmt: skip
    text = json.dumps(plain(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    page = _markdown(results, comparisons, levels, plot_notes, [Path(sheet).name for sheet in worst_sheets])
    atomic_write(folder / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
    atomic_write(folder / "report.md", lambda path: path.write_text(page, encoding="utf-8"))
    return folder / "report.md"


def console_table(results: Sequence[ModelResult]) -> str:
    """Return plain-text tables: mIoU of every protocol and model, and which of three masks is the best.

    The first has the mIoU with its interval, the means by object size, and the differences from the first model. The
    second is there where records say which mask was taken.

    Raises ValueError as `write_report` does.
    """
    _check_results(results)
    comparisons = _comparisons(results)
    rows = [["prompt", "mask taken", "model", "instances", "mIoU", *SIZES, "minus the first"]]
    for key, result in itertools.product(protocols_of(results), results):
        score = result.score(key)
        difference = _difference_text(comparisons[result.name][key]) if result.name in comparisons else ""
        sizes = [_mean_text(result.score(key, "by_size", size)) for size in SIZES]
        rows.append([*names_of(key), result.name, f"{score['n']:,}", _score_text(score), *sizes, difference])
    blocks = [text_table(rows, rule=True)] if len(rows) > 1 else []
    blocks += _missing(results, {"mIoU": ("iou",)})
    levels = [mask_levels(result.records, num_resamples=1) for result in results]  # means alone are printed
    if len(rows := _levels_table(results, levels, [ALL])) > 1:
        blocks += ["", text_table(rows, rule=True)]
    return "\n".join(blocks)


def _check_results(results: Sequence[ModelResult]):
    if not results:
        raise ValueError("a report needs the result of at least one model.")
    slugs = [slug(result.name) for result in results]
    for result, own in zip(results, slugs):
        if slugs.count(own) > 1:
            raise ValueError(f"two results are named {result.name!r} or nearly so: give each model a name of its own.")


def _comparisons(results: Sequence[ModelResult]) -> dict[str, dict]:
    """Return the differences of each model but the first from the first, by protocol."""
    first, *others = results
    keys = protocols_of(results)
    return {o.name: protocol_differences(first.records, o.records, keys, (first.name, o.name)) for o in others}


def _missing(results: Sequence[ModelResult], paths: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return a line for each reason why a model has no score (of `paths`, by title), with the protocols concerned."""
    lines: dict[str, list[str]] = {
        f"{result.name}: no instance was evaluated": ["all protocols"]
        for result in results
        if not result.records and result.settings.get("num_instances", 0) is not None  # none was asked for
    }
    for result in results:
        if (expected := result.settings.get("num_instances")) not in (None, len(result.records)):
            lines[f"{result.name}: num_instances is {expected}, but there are {len(result.records)} records"] = [
                "scores are of these"
            ]
    for result, (title, path), key in itertools.product(results, paths.items(), protocols_of(results)):
        score = result.score(key, *path)
        if result.records and "reason" in score:
            lines.setdefault(f"{result.name}, {title}: {score['reason']}", []).append(key)
    everywhere = protocols_of(results)
    return [f"{line} ({'all protocols' if keys == everywhere else ', '.join(keys)})" for line, keys in lines.items()]


def _measured(results: Sequence[ModelResult]) -> dict[str, tuple[str, ...]]:
    """Return `_PATHS`, without boundary IoU where it was not requested."""
    asked = any(record.get("boundary_iou") for result in results for record in result.records)
    return {title: path for title, path in _PATHS.items() if asked or path != ("boundary_iou",)}


# Markdown and text.


def _main_table(results: Sequence[ModelResult], comparisons: Mapping) -> list[list[str]]:
    header = ["prompt", "mask taken", "instances", *(f"{result.name} mIoU" for result in results)]
    rows = [header + [f"{name} minus {results[0].name}" for name in comparisons]]
    for key in protocols_of(results):
        scores = [result.score(key) for result in results]
        counts = dict.fromkeys(f"{score['n']:,}" for score in scores)
        differences = [_difference_text(comparison[key]) for comparison in comparisons.values()]
        rows.append([*names_of(key), " / ".join(counts), *map(_score_text, scores), *differences])
    return rows


def _details(results: Sequence[ModelResult]) -> list[list[str]]:
    """Return the scores that are not in the main table, with a row for each protocol and model."""
    columns = {title: path for title, path in _measured(results).items() if path != ("iou",)}
    rows = [["prompt", "mask taken", "model", *columns]]
    for key, result in itertools.product(protocols_of(results), results):
        scores = (result.score(key, *path) for path in columns.values())
        rows.append([*names_of(key), result.name, *map(_score_text, scores)])
    return rows


def _levels_table(
    results: Sequence[ModelResult], levels: Sequence[Mapping], parts: Sequence[str] = (ALL, *SIZES)
) -> list[list[str]]:
    """Return which of the three masks is the best and the predicted best, with a row for each prompt, part and model.

    Args:
        results: the results of the models.
        levels: for each of them, what `mask_levels` returns.
        parts: "all" and sizes of objects.
    """
    header = ["prompt", "objects", "model", "instances", "best: 1st, 2nd, 3rd", "predicted best", "area / object's"]
    rows = [[*header, "no overlap"]]
    for prompt, part in itertools.product(dict.fromkeys(prompt for each in levels for prompt in each), parts):
        for result, its_levels in zip(results, levels):
            if found := its_levels.get(prompt, {}).get(part):
                shares = [_shares_text(found[name]) for name in ("best", "predicted_best")]
                medians = [found["median_area"][place] for place in PLACES]
                areas = MISSING if None in medians else ", ".join(f"{median:.2f}" for median in medians)
                number, none = f"{found['no_overlap']['n']:,}", _shares_text({"": found["no_overlap"]})
                rows.append([prompt, part, result.name, number, *shares, areas, none])
    return rows


def _shares_text(scores: Mapping[str, Mapping]) -> str:
    """Return shares as percentages: those of the first, the second and the third mask."""
    means = [score["mean"] for score in scores.values()]
    return MISSING if None in means else ", ".join(f"{mean:.0%}" for mean in means)


def _mean_text(score: Mapping) -> str:
    if not score["n"]:
        return "-"
    return MISSING if score["mean"] is None else f"{score['mean']:.3f}"


def _score_text(score: Mapping) -> str:
    if score["mean"] is None:
        return MISSING
    interval = "no interval: one image" if score["low"] is None else f"{score['low']:.3f}, {score['high']:.3f}"
    return f"{score['mean']:.3f} [{interval}]"


def _difference_text(test: Mapping) -> str:
    if test["difference"] is None:
        return "not comparable"
    if test["p_value"] is None:
        return f"{test['difference']:+.3f} [no interval: one image]"
    p_value = "p < 0.001" if test["p_value"] < 0.001 else f"p = {test['p_value']:.3f}"
    return f"{test['difference']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}], {p_value}"


def _markdown(
    results: Sequence[ModelResult], comparisons: Mapping, levels: Sequence[Mapping], plot_notes: Mapping,
    worst: Sequence[str],
) -> str:  # fmt: skip
    names = [result.name for result in results]
    blocks = ["# Evaluation", "## How it was measured", *_protocol_blocks(results)]
    blocks += ["## Mean IoU", _table(_main_table(results, comparisons))]
    for name, comparison in comparisons.items():
        reasons = dict.fromkeys(test["reason"] for test in comparison.values() if test["difference"] is None)
        blocks += [f"{name} is not comparable with {names[0]} where it says so: {reason}." for reason in reasons]
    blocks += ["## By object size, at the boundary, and how well the model knows", _table(_details(results))]
    if len(rows := _levels_table(results, levels)) > 1:
        blocks += ["## Which of the three masks", _LEVELS_NOTE, _table(rows)]
    lines = _missing(results, _measured(results)) or ["No score is missing."]
    blocks += ["## What is missing", "\n".join(f"- {line}" for line in lines)]
    blocks += ["## Other measures", _settings_table(results, ["extra"])]
    blocks += ["## Skipped", _settings_table(results, ["skipped"], absent=0), "## Settings"]
    elsewhere = {"model", "protocols", "command", "extra", "skipped"}
    others = dict.fromkeys(name for result in results for name in result.settings)
    blocks += [_settings_table(results, [name for name in {**_SETTINGS, **others} if name not in elsewhere])]
    commands = dict.fromkeys(str(result.settings.get("command") or f"command {MISSING}") for result in results)
    blocks += [f"```bash\n{command}\n```" for command in commands] + ["## Plots"]
    blocks += [
        f"No {name}: {note}." if not note.endswith(".png") else f"![{name}]({note})"
        for name, note in plot_notes.items()
    ]
    blocks += ["## Worst cases", *([f"![worst cases]({name})" for name in worst] or ["None were drawn."])]
    return "\n\n".join(blocks) + "\n"


def _protocol_blocks(results: Sequence[ModelResult]) -> list[str]:
    texts: dict[str, list[str]] = {}
    for result in results:
        sentences = "\n".join(f"- {sentence}" for sentence in result.settings.get("protocols") or ())
        texts.setdefault(sentences or f"- Protocol {MISSING}: the run did not state it.", []).append(result.name)
    blocks = list(texts)
    if len(texts) > 1:
        blocks = ["**The protocols of these models are worded differently: read them before comparing.**"]
        blocks += [f"{', '.join(names)}:\n\n{text}" for text, names in texts.items()]
    num_images = min(len({record["picture"] for record in result.records}) for result in results)
    note = (
        f"Brackets hold {CONFIDENCE:.0%} intervals: a percentile bootstrap of {NUM_RESAMPLES:,} draws over images, "
        "each with all of its instances; means are over instances. Differences are paired on the same instances; their "
        "two-sided p-values are not corrected for the number of comparisons. Small, medium, large: below 32², below "
        "96², and other areas. Calibration gap: mean distance of the model's own estimate of the IoU from the IoU. "
        "Calibration error: distance of the means of both over the masks whose estimate is in one of "
        f"{NUM_BINS} bins of equal width, averaged over bins by their masks (expected calibration error)."
    )
    if num_images < 20:
        note += f" Images: {num_images}. With fewer than 20, intervals are too narrow, p-values too small: take more."
    return [*blocks, note]


def _settings_table(results: Sequence[ModelResult], names: Iterable[str], absent=None) -> str:
    """Return a table of settings with a column for each model. A mapping fills a row for each of its keys.

    `absent` is the value of a key that a model's mapping lacks.
    """
    rows = {}
    for name in names:
        values = [result.settings.get(name) for result in results]
        mappings = [value if isinstance(value, Mapping) else {} for value in values]
        for key in dict.fromkeys(key for mapping in mappings for key in mapping):
            rows[f"{name}: {key}"] = [None if value is None else value.get(key, absent) for value in values]
        if not any(mappings):
            rows[name] = ["none" if value == {} else value for value in values]
    cells = [[label, *map(_value_text, values)] for label, values in rows.items()]
    return _table([["", *(result.name for result in results)], *cells])


def _value_text(value) -> str:
    if is_missing(value):
        return MISSING
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _records_name(result: ModelResult) -> str:
    return fit_name(f"records_{slug(result.name)}", ".jsonl.gz")
