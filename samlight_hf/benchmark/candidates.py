"""Equality of everything mode's candidates, before duplicates are suppressed, with the plain model's in float32."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, SamImageProcessor

from ..engine.optimize import optimize
from ..inference.crops import (
    DEFAULT_PRED_IOU_THRESH,
    DEFAULT_STABILITY_SCORE_THRESH,
    MaskGenerationSettings,
)
from ..loading import load_model
from ..masks.upscaling import upscale_logits
from .encoders import EAGER, OPTIMIZED
from .equality import checkpoint_and_photographs, mask_iou, prompt_with_grid
from .generation import THRESHOLDS
from .measure import attempt
from .settings import Settings


LEAST_IOU = 0.97  # wanted of every mask
_POINTS = 64  # at once
_DEFAULTS = {"pred_iou_thresh": DEFAULT_PRED_IOU_THRESH, "stability_score_thresh": DEFAULT_STABILITY_SCORE_THRESH}


def candidate_rows(settings: Settings) -> Iterator[dict]:
    """Compare masks of all points of a grid with those of the model itself in float32, at the photograph's size.

    They are chosen as everything mode chooses, before it suppresses duplicates: predicted IoU and stability, here in
    float32, are above thresholds. These are the default ones, and lower ones. On a GPU the dtypes are the benchmark's
    and float16.
    """
    row = {"part": "candidates", "checkpoint": settings.checkpoint and settings.checkpoint.name}
    loaded = attempt(row, lambda: _load(settings))
    if "cannot_run" in loaded:
        yield loaded
        return
    for path in loaded["paths"]:
        named = {**row, "photograph": path.name, "points_per_side": settings.points_per_side}
        compared = attempt(named, partial(_compare, path, loaded["models"], loaded["image_processor"], settings))
        yield from ({**named, **line} for line in compared["lines"]) if "lines" in compared else (compared,)


def _load(settings: Settings) -> dict:
    """Return photographs, image processor, and models by dtype and mode, that of the reference first."""
    checkpoint, paths = checkpoint_and_photographs(settings)
    device = str(settings.device)
    reference, processor = load_model(checkpoint, device)
    models = {("float32", EAGER): reference}
    for dtype in dict.fromkeys((settings.dtype, torch.float16) if settings.on_cuda else (settings.dtype,)):
        name = str(dtype).removeprefix("torch.")
        if dtype != torch.float32:
            models[name, EAGER] = load_model(checkpoint, device, dtype)[0]
        model, _ = load_model(checkpoint, device)  # as `from_pretrained` returns it
        models[name, OPTIMIZED] = optimize(model, dtype, image_batch_sizes=(1,), prompt_counts=(_POINTS,))
    return {"paths": paths, "models": models, "image_processor": processor.image_processor}


def _compare(
    path: Path,
    models: dict[tuple[str, str], PreTrainedModel],
    image_processor: SamImageProcessor,
    settings: Settings,
) -> dict[str, list[dict]]:
    prompted = prompt_with_grid(path, image_processor, settings.points_per_side, settings.device)
    predict = partial(_predict, points=prompted.points, sizes=prompted.sizes)
    reference, *others = models.items()
    expected, scores, stabilities = predict(reference[1], prompted.pixel_values)
    lines = []
    for (dtype, mode), model in others:
        ious = mask_iou(predict(model, prompted.pixel_values)[0], expected)
        for limits in (_DEFAULTS, THRESHOLDS):
            kept = (scores > limits["pred_iou_thresh"]) & (stabilities > limits["stability_score_thresh"])
            lines.append({"mode": mode, "dtype": dtype, **limits, **_summary(ious[kept])})
    return {"lines": lines}


def _summary(ious: torch.Tensor) -> dict[str, float]:
    found: dict[str, float] = {"masks": len(ious)}
    if len(ious):
        found |= {
            "mask_iou_mean": ious.mean().item(), "mask_iou_min": ious.min().item(),
            f"masks_below_{LEAST_IOU}": int((ious < LEAST_IOU).sum()),
        }  # fmt: skip
    return found


@torch.inference_mode()
def _predict(
    model: PreTrainedModel, pixel_values: torch.Tensor, points: torch.Tensor, sizes: tuple
) -> tuple[torch.Tensor, ...]:
    """Return the masks (3 * points, H, W), their predicted IoUs, and their stabilities."""
    embeddings = model.get_image_embeddings(pixel_values.to(model.dtype)).clone()  # a graph's output is overwritten
    offset = MaskGenerationSettings().stability_score_offset
    parts = []
    for some in points.split(_POINTS):
        outputs = model(image_embeddings=embeddings, input_points=some[None, :, None])
        logits = upscale_logits(outputs.pred_masks.flatten(0, 2), *sizes).float()
        inner, outer = ((logits > limit).flatten(1).sum(dim=1) for limit in (offset, -offset))
        parts.append((logits > 0, outputs.iou_scores.flatten().float(), inner / outer.clamp_min(1)))
    masks, scores, stabilities = (torch.cat(part) for part in zip(*parts))
    return masks, scores, stabilities
