"""Tables of a model card. Every number is read from a file that a program wrote."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult
from transformers import PreTrainedConfig

from ..modeling.configuration_sam_lightening import SamLighteningConfig
from .checks import without_absolute_paths


logger = logging.getLogger(__name__)

Rows = list[list[str]]

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TRAINING = (  # settings and results of a stage that a card shows
    "max_steps", "global_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "bf16", "fp16", "seed", "num_focus_layers", "layer_weights", "ramp_fraction", "num_prompts", "box_share",
    "num_refinements", "focal_weight", "bce_weight", "dice_weight", "iou_weight", "train_loss", "images_per_second",
    "seconds",
)  # fmt: skip


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table with the first row as its header; return an empty text where there is no second row."""
    if len(rows) < 2:
        return ""
    lines = ["| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def architecture_rows(
    config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], dtypes: set[str], num_bytes: int
) -> Rows:
    """Return rows on architecture and size, from the config and the headers of the weights.

    Args:
        config: Config of a SAM-Lightening or an original SAM.
        shapes: Shapes of the weights, by their names.
        dtypes: safetensors' names of the weights' dtypes.
        num_bytes: Size of the weight files.
    """
    vision = config.vision_config
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    # shared_embedding is a second name of a tensor; some files hold both.
    total = sum(size for name, size in sizes.items() if not name.startswith("prompt_encoder.shared_embedding."))
    encoder = sum(size for name, size in sizes.items() if name.startswith("vision_encoder."))
    num_tokens = (vision.image_size // vision.patch_size) ** 2
    width, depth, num_heads = vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads
    image, patch = (f"{size} x {size} px" for size in (vision.image_size, vision.patch_size))
    dtype_names = ", ".join(_DTYPES.get(dtype, dtype) for dtype in sorted(dtypes))
    return [
        ["", ""],
        ["parameters", f"{_short(total)}, of which {_short(encoder)} in the image encoder"],
        ["image encoder", f"{width} wide, {depth} layers, {num_heads} heads"],
        ["image", f"{image}, longest side resized, the rest padded; {num_tokens:,} tokens of {patch}"],
        ["attention", _attention(config, num_tokens)],
        ["weights", f"{dtype_names}, {num_bytes / 1e6:,.1f} MB of safetensors"],
    ]


def evaluation_section(
    report: Mapping, facts: Mapping, names: Sequence[str], fingerprint: Callable[[str], str | None] | None = None
) -> dict:
    """Extract from a `samlight evaluate` report what a card says about one model.

    Args:
        report: Content of report.json.
        facts: `CardFacts.evaluation`.
        names: Names by which the report may call the model. Ignored where the report has only one model.
        fingerprint: Returns the fingerprint of the model's weights in a dtype, which is compared with the report's.

    Returns:
        Values for the template, with "scores", "extra" and "settings" of the report.

    Raises:
        ValueError: For another kind of file, and where no model, or more than one, has one of the names.
    """
    models = report.get("models")
    if report.get("format_version") != 1 or not isinstance(models, list) or not models:
        raise ValueError("the evaluation is no report.json of `samlight evaluate` (format_version 1).")
    if not all(map(_is_result, models)):
        raise ValueError(
            "the evaluation is no complete report.json: one of its models lacks settings, with the model, or scores. "
            "Run `samlight evaluate` again."
        )
    matches = [model for model in models if model["settings"]["model"] in names] if len(models) > 1 else models
    if len(matches) != 1:
        known = ", ".join(str(model["settings"]["model"]) for model in models)
        wanted = " or ".join(dict.fromkeys((names[0], names[-1])))
        raise ValueError(
            f"the evaluation is of {known}: none of them, or more than one, is {wanted}. Give the report of this "
            "model, or give the model that name in card.yaml."
        )
    settings, scores = matches[0]["settings"], matches[0]["scores"]
    dataset = facts.get("name") or without_absolute_paths(str(settings.get("dataset") or "unnamed data"))
    has_boundary = any(_mean(score.get("boundary_iou")) is not None for score in scores.values())
    rows = [["prompt", "mask taken", "mIoU", *["boundary IoU"] * has_boundary]]
    for protocol, score in sorted(scores.items(), key=_protocol_order):
        columns = [score.get("iou"), *[score.get("boundary_iou")] * has_boundary]
        rows.append([*protocol.split("/"), *map(_score_text, columns)])
    extra = {name: value for name, value in (settings.get("extra") or {}).items() if isinstance(value, int | float)}
    extra_rows = [["measure", "value"], *([name, f"{value:.3f}"] for name, value in extra.items())]
    versions = [f"{name} {version}" for name, version in (settings.get("versions") or {}).items()]
    setting = [settings.get("dtype"), settings.get("device"), settings.get("date"), *versions]
    own = fingerprint(str(settings.get("dtype"))) if fingerprint and settings.get("weights") else None
    called = without_absolute_paths(str(settings["model"]))
    if own not in (None, settings.get("weights")):
        logger.warning("the evaluation is of other weights, and the card says so. Evaluate %s again.", called)
        setting.insert(0, f"**measured with other weights than these** (`{called}`)")
    elif own is None and settings["model"] not in names:  # shows where a report may be of other weights
        setting.insert(0, f"evaluated as `{called}`")
    skipped = [f"{count} x {reason}" for reason, count in (settings.get("skipped") or {}).items()]
    return {
        "dataset": dataset,
        "dataset_id": facts.get("id") or re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
        "split": facts.get("split"),
        "num_images": f"{settings.get('num_pictures', 0):,}",
        "num_instances": f"{settings.get('num_instances', 0):,}",
        "setting": ", ".join(str(part) for part in setting if part),
        "table": "\n\n".join(table for table in (markdown_table(rows), markdown_table(extra_rows)) if table),
        "intervals": _intervals(report.get("intervals") or {}),
        "protocols": [without_absolute_paths(str(sentence)) for sentence in settings.get("protocols") or ()]
        + [f"Skipped: {', '.join(skipped)}"] * bool(skipped),
        "command": without_absolute_paths(str(settings.get("command") or "")),
        "calibration": _calibration(scores),
        "scores": scores,
        "extra": extra,
        "settings": settings,
    }  # fmt: skip


def _is_result(model) -> bool:
    """Return whether a model's entry of a report has the parts that a card needs."""
    settings, scores = (model.get(key) if isinstance(model, Mapping) else None for key in ("settings", "scores"))
    return (
        isinstance(settings, Mapping)
        and "model" in settings
        and isinstance(scores, Mapping)
        and all(key.count("/") == 1 and isinstance(score, Mapping) for key, score in scores.items())
    )


def evaluation_results(section: Mapping) -> list[EvalResult]:
    """Return the Hub's metadata of an `evaluation_section`: one result per protocol and metric that has a number."""
    common = {
        "task_type": "mask-generation", "task_name": "Mask Generation", "dataset_type": section["dataset_id"],
        "dataset_name": section["dataset"], "dataset_split": section["split"],
    }  # fmt: skip
    results = []
    for protocol, score in sorted(section["scores"].items(), key=_protocol_order):
        prompt, choice = protocol.split("/")
        for key, metric_type, title in (("iou", "mean_iou", "mIoU"), ("boundary_iou", "boundary_iou", "boundary IoU")):
            if (mean := _mean(score.get(key))) is not None:
                name = f"{title} ({prompt}, {choice} mask)"
                results.append(
                    EvalResult(**common, metric_type=metric_type, metric_name=name, metric_value=round(mean, 4))
                )
    for name, value in section["extra"].items():
        metric_type = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        results.append(EvalResult(**common, metric_type=metric_type, metric_name=name, metric_value=round(value, 4)))
    return results


def training_rows(training: Mapping | Sequence[Mapping] | None) -> Rows:
    """Return a row per setting or result of a training, with a column per stage.

    Args:
        training: Content of a stage's result.json, of several, or a mapping with "stages" (and "teacher", the card's
            default base_model). Settings of a stage are in its "settings", or beside them, as in
            TrainingArguments.to_dict().

    Raises:
        ValueError: For other content, and where it has no setting of a training.
    """
    if not training:
        return []
    stages: Any = training["stages"] if isinstance(training, Mapping) and "stages" in training else training
    stages = [stages] if isinstance(stages, Mapping) else list(stages)
    if not all(isinstance(stage, Mapping) for stage in stages):
        raise ValueError("training must be the result.json of a stage, or several: mappings of settings and values.")
    flat = [{**stage, **(stage.get("settings") or {})} for stage in stages]
    for stage in flat:
        if stage.get("muon"):  # `optim` is then for the other weights only
            stage["optim"] = f"Muon for matrices, {stage.get('optim') or 'AdamW'} for the rest"
    rows = [["setting", *(str(stage.get("stage") or "value") for stage in flat)]]
    for key in _TRAINING:
        values = [stage.get(key) for stage in flat]
        if any(value not in (None, False) for value in values):
            rows.append([key, *map(_value_text, values)])
    if flat and len(rows) == 1:
        raise ValueError("training holds no setting of a training: give the result.json of a stage.")
    return rows


def speed_section(section: Mapping | None, benchmark: Mapping | None, config: PreTrainedConfig) -> tuple[Rows, str]:
    """Return a table of the latency in the evaluation and in benchmarks/run.py, and where each was measured.

    The benchmark is used where the image encoder has the shape that was benchmarked.

    Args:
        section: `evaluation_section`, or None.
        benchmark: Content of the JSON of benchmarks/run.py, or None.
        config: Config of the model.

    Raises:
        ValueError: For a benchmark without rows.
    """
    if benchmark is not None and not isinstance(benchmark.get("rows"), list):
        raise ValueError("the benchmark is no JSON of benchmarks/run.py: it has no rows.")
    rows, sources = [["part", "dtype", "batch", "time", "peak memory"]], []
    if section and any((latency := section["settings"].get("latency_ms") or {}).values()):
        settings = section["settings"]
        parts = {"encoder": "image encoder, per image", "decoder": "prompt encoder and mask decoder, per call"}
        for part, label in parts.items():
            if (ms := latency.get(part)) is not None:
                rows.append([f"{label}, in the evaluation", settings.get("dtype", ""), "", f"{ms:.2f} ms", ""])
        sources.append(f"In the evaluation above, on {settings.get('device')}, {settings.get('date')}.")
    if benchmark is not None and _has_default_encoder(config):
        measured = [row for row in benchmark["rows"] if row["part"] == "encoder" and row["model"] == "SAM-Lightening"]
        rows += [
            [f"image encoder, {row['mode']}", row["dtype"], str(row["batch_size"]), f"{row['ms']:.2f} ms",
             f"{row['peak_memory_mb']:.0f} MB"]
            for row in measured
            if row.get("attn_implementation", "dilated_flash_attention") == "dilated_flash_attention" and "ms" in row
        ]  # fmt: skip
        sources += [_benchmark_source(benchmark)] if measured else []
    return rows, "\n".join(sources)


def _benchmark_source(benchmark: Mapping) -> str:
    # After runs with --append, the encoder's rows may be those of an earlier run.
    run = next(head for head in (benchmark, *reversed(benchmark.get("earlier", ()))) if "encoder" in head["parts"])
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    return (
        f"By batch size: an encoder of this shape with random weights, on {run['device']}, {run['date']}, {versions}; "
        f"memory with the encoder's weights; `{without_absolute_paths(run['command'])}`."
    )


def _attention(config: PreTrainedConfig, num_tokens: int) -> str:
    if not isinstance(config, SamLighteningConfig):
        vision = config.vision_config
        positions = f"with{'' if vision.use_rel_pos else 'out'} relative positions"
        if not vision.window_size:
            return f"the whole image, {positions}"
        return f"windows of {vision.window_size}, {positions}; global in layers {_listed(vision.global_attn_indexes)}"
    layers: dict[tuple, list[int]] = {}
    for layer, pattern in enumerate(config.vision_config.layer_patterns()):
        layers.setdefault(tuple(pattern), []).append(layer)
    texts = []
    for (segment_length, dilation_rate, dilation_offsets, window_size), indexes in layers.items():
        if window_size:
            area = f"windows of {window_size} x {window_size} tokens"
        else:
            area = "the whole image" if segment_length == num_tokens else f"bands of {segment_length:,} tokens"
        rate = f", dilation rate {dilation_rate}" if dilation_rate > 1 else ""
        offsets = ", one residue class per head" if dilation_offsets == "per_head" and dilation_rate > 1 else ""
        texts.append(f"layers {_listed(indexes)}: {area}{rate}{offsets}")
    return "; ".join(texts)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _has_default_encoder(config: PreTrainedConfig) -> bool:
    """Return whether the image encoder has the shape that the benchmark measures."""
    if not isinstance(config, SamLighteningConfig):
        return False
    own, default = config.vision_config.to_dict(), SamLighteningConfig().vision_config.to_dict()
    ignored = ("transformers_version", "dtype", "scale", "initializer_range", "_name_or_path")
    return all(own[name] == default.get(name) for name in own if name not in ignored)


def _intervals(intervals: Mapping) -> str:
    if not {"confidence", "method", "num_resamples"} <= intervals.keys():
        return ""
    return f"{intervals['confidence']:.0%} intervals ({intervals['method']}, {intervals['num_resamples']:,} draws)"


def _protocol_order(item: tuple[str, Mapping]) -> tuple:
    """Return a sort key: boxes first, then clicks by their number; otherwise the order of the report stays."""
    prompt = item[0].split("/")[0]
    return prompt != "box", int(prompt.split()[0]) if prompt[:1].isdigit() else 0


def _calibration(scores: Mapping) -> str:
    for protocol, score in scores.items():
        if (gap := _mean(score.get("calibration_gap"))) is not None:
            prompt, choice = protocol.split("/")
            error = _mean(score.get("calibration_error"))  # old reports have none
            binned = "" if error is None else f"; its expected calibration error, in ten bins, is {error:.3f}"
            return f"{gap:.2f} on average in the evaluation above ({prompt}, {choice} mask){binned}"
    return ""


def _mean(score: Mapping | None) -> float | None:
    return score.get("mean") if score else None


def _score_text(score: Mapping | None) -> str:
    if not score or score.get("mean") is None:
        return "missing"
    interval = f" [{score['low']:.3f}, {score['high']:.3f}]" if score.get("low") is not None else ""
    return f"{score['mean']:.3f}{interval}"


def _short(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _value_text(value) -> str:
    if value is None or value is False:
        return "no" if value is False else ""
    if value is True:
        return "yes"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
