"""Equality of fast and plain models: embeddings and masks of photographs, against the plain eager model."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, SamImageProcessor

from ..evaluation.metrics.mask_iou import iou
from ..images.preprocessing import preprocess, resized_size
from ..inference.crops import point_grid
from ..inference.predictor import image_tensor
from ..loading import load_model
from ..masks.upscaling import upscale_logits
from .encoders import EAGER, OPTIMIZED, optimized, report_of
from .measure import attempt, relative_error
from .settings import Settings


POINTS_PER_SIDE = 4
PHOTOGRAPH_SUFFIXES = (".jpg", ".jpeg", ".png")
# The linear layers of the encoder that a mode simulates in fp8, by name.
FP8 = {
    f"float32, {' '.join(names)} in fp8, simulated": names
    for names in (("qkv", "proj", "lin1", "lin2"), ("qkv",), ("proj",), ("lin1",), ("lin2",))
}


def equality_rows(settings: Settings) -> Iterator[dict]:
    """Compare embeddings and masks of each photograph, for a grid of points, a prompt each, with three masks each.

    In the benchmark's dtype, plain eager and optimized are compared with plain eager in float32, and optimized with
    plain. The effect of fp8 alone is compared too: float32 except for products of the encoder's linear layers.
    Photographs are prepared once, as transformers' image processor does on a CPU. Masks are compared at the
    photograph's size.
    """
    row = {
        "part": "equality",
        "dtype": settings.dtype_name,
        "checkpoint": settings.checkpoint and settings.checkpoint.name,
    }
    loaded = attempt(row, lambda: {"setup": _load(settings)})
    if "cannot_run" in loaded:
        yield loaded
        return
    setup = loaded["setup"]
    for path in setup["paths"]:
        named = {**row, "photograph": path.name}
        predicted = attempt(named, partial(_predict_all, path, setup["models"], setup["image_processor"]))
        if "cannot_run" in predicted:
            yield predicted
            continue
        predictions = predicted["predictions"]
        pairs = [(EAGER, "float32"), (OPTIMIZED, "float32"), (OPTIMIZED, EAGER)]
        pairs += [(mode, "float32") for mode in FP8]
        for mode, reference in pairs:
            against = f"eager, {'float32' if reference == 'float32' else settings.dtype_name}"
            compared = {**named, "mode": mode, "against": against}
            if mode not in predictions:
                yield {**compared, "cannot_run": setup["cannot_run"]}
                continue
            differences = _compare(predictions[mode], predictions[reference])
            yield {**compared, **differences, **(setup["report"] if mode == OPTIMIZED else {})}


def checkpoint_and_photographs(settings: Settings) -> tuple[Path, list[Path]]:
    """Return what is compared on real weights. Raises ValueError if there is no checkpoint or no photograph."""
    if settings.checkpoint is None or settings.images is None:
        raise ValueError("there is no checkpoint or no photograph: give --checkpoint and --images.")
    paths = sorted(path for path in Path(settings.images).iterdir() if path.suffix.lower() in PHOTOGRAPH_SUFFIXES)
    if not paths:
        raise ValueError(f"{settings.images} holds no photograph ({', '.join(PHOTOGRAPH_SUFFIXES)}).")
    return settings.checkpoint, paths


def _load(settings: Settings) -> dict:
    checkpoint, paths = checkpoint_and_photographs(settings)
    reference, processor = load_model(checkpoint, str(settings.device))
    plain, _ = load_model(checkpoint, str(settings.device), settings.dtype)
    models = {"float32": reference, EAGER: plain}
    for mode, names in FP8.items():
        models[mode] = copy.deepcopy(reference)
        _simulate_fp8(models[mode].vision_encoder, names)
    attempted = attempt({}, lambda: {"model": _optimize(checkpoint, settings)})
    if "model" in attempted:
        models[OPTIMIZED] = attempted["model"]
    return {
        "paths": paths, "models": models, "image_processor": processor.image_processor,
        "report": report_of(attempted["model"]) if "model" in attempted else {},
        "cannot_run": attempted.get("cannot_run"),
    }  # fmt: skip


def _simulate_fp8(encoder: nn.Module, names: tuple[str, ...]):
    """Round the factors of the named linear layers to fp8, with a scale for each row of a weight and each token."""
    for name, linear in encoder.named_modules():
        if name.rpartition(".")[2] in names and isinstance(linear, nn.Linear):
            linear.weight.data = _to_fp8_and_back(linear.weight.data)
            linear.register_forward_pre_hook(lambda module, inputs: (_to_fp8_and_back(inputs[0]),))


def _to_fp8_and_back(values: torch.Tensor) -> torch.Tensor:
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def _optimize(checkpoint: Path, settings: Settings):
    model, _ = load_model(checkpoint, str(settings.device))  # as `from_pretrained` returns it
    return optimized(model, settings, image_batch_sizes=(1,), prompt_counts=(POINTS_PER_SIDE**2,))


@dataclass(frozen=True)
class Prompted:
    """A photograph, as transformers' image processor prepares it on a CPU, and a grid of points on it.

    Attributes:
        pixel_values: float32 (1, 3, S, S).
        points: float32 (points, 2), in pixels of the resized photograph.
        sizes: (height, width) of the padded, the resized and the original photograph, as `upscale_logits` takes them.
    """

    pixel_values: torch.Tensor
    points: torch.Tensor
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def prompt_with_grid(
    path: Path, image_processor: SamImageProcessor, points_per_side: int, device: torch.device
) -> Prompted:
    """Read a photograph, and prepare it and a grid of points on it for a model on this device."""
    image = image_tensor(path)
    height, width = image.shape[-2:]
    resized = resized_size(height, width, image_processor.size["longest_edge"])
    pixel_values = preprocess(image_processor, [image], torch.device("cpu")).to(device)
    points = point_grid(points_per_side) * torch.tensor([resized[1], resized[0]])
    padded = image_processor.pad_size["height"], image_processor.pad_size["width"]
    return Prompted(pixel_values, points.to(device), (padded, resized, (height, width)))


@torch.inference_mode()
def _predict_all(path: Path, models: dict[str, PreTrainedModel], image_processor: SamImageProcessor) -> dict:
    prompted = prompt_with_grid(path, image_processor, POINTS_PER_SIDE, models[EAGER].device)
    predictions = {}
    for name, model in models.items():
        values = prompted.pixel_values.to(model.dtype)
        embeddings = model.get_image_embeddings(values).clone()  # the next call may overwrite a graph's output
        outputs = model(pixel_values=values, input_points=prompted.points[None, :, None])
        masks = upscale_logits(outputs.pred_masks.flatten(0, 2), *prompted.sizes) > 0
        predictions[name] = {
            "embeddings": embeddings, "logits": outputs.pred_masks.clone(), "iou_scores": outputs.iou_scores.clone(),
            "masks": masks,
        }  # fmt: skip
    return {"predictions": predictions}


def _compare(outputs: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict:
    ious = mask_iou(outputs["masks"], reference["masks"])
    return {
        "embedding_error": relative_error(outputs["embeddings"], reference["embeddings"]),
        "logits_error": relative_error(outputs["logits"], reference["logits"]),
        "iou_score_difference": (outputs["iou_scores"].double() - reference["iou_scores"].double()).abs().max().item(),
        "masks": len(ious), "mask_iou_mean": ious.mean().item(), "mask_iou_min": ious.min().item(),
        "masks_at_0.99": (ious >= 0.99).double().mean().item(),
    }  # fmt: skip


def mask_iou(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Compute the IoU of pairs of masks, bool (n, H, W) twice -> float64 (n,); 1 where both are empty."""
    both_empty = ~(masks | others).flatten(1).any(dim=1)
    return iou.mask_iou(masks, others).masked_fill(both_empty, 1.0)
