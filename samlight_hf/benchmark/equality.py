"""Whether what is fast computes the same: embeddings and masks of photographs, against the plain eager model."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, SamImageProcessor

from ..evaluation.metrics.mask_iou import iou
from ..images.preprocessing import preprocess, resized_size
from ..inference.predictor import image_tensor
from ..loading import load_model
from ..masks.upscaling import upscale_logits
from .encoders import EAGER, OPTIMIZED, optimized, report_of
from .measure import attempt, relative_error
from .settings import Settings


POINTS_PER_SIDE = 4
PHOTOGRAPH_SUFFIXES = (".jpg", ".jpeg", ".png")
# What a mode simulates in fp8: the encoder's linear layers of these names.
FP8 = {
    f"float32, {' '.join(names)} in fp8, simulated": names
    for names in (("qkv", "proj", "lin1", "lin2"), ("qkv",), ("proj",), ("lin1",), ("lin2",))
}


def equality_rows(settings: Settings) -> Iterator[dict]:
    """Each photograph with a grid of points, a prompt each, and all three masks of each at the photograph's size.

    In the benchmark's dtype, plain eager and optimized against plain eager in float32, and optimized against plain. And
    what fp8 would do alone: float32 but for the products of linear layers of the encoder. Photographs are prepared as
    transformers' image processor does on a CPU, once for all.
    """
    row = {
        "part": "equality",
        "dtype": settings.dtype_name,
        "checkpoint": settings.checkpoint and settings.checkpoint.name,
    }
    setup = {}
    failed = attempt(row, lambda: setup.update(_load(settings)) or {})
    if "cannot_run" in failed:
        yield failed
        return
    for path in setup["paths"]:
        found = {}
        failed = attempt(
            {**row, "photograph": path.name},
            lambda p=path, f=found: f.update(_predict_all(p, setup["models"], setup["image_processor"])) or {},
        )
        if "cannot_run" in failed:
            yield failed
            continue
        pairs = [(EAGER, "float32"), (OPTIMIZED, "float32"), (OPTIMIZED, EAGER)]
        pairs += [(mode, "float32") for mode in FP8]
        for mode, reference in pairs:
            against = f"eager, {'float32' if reference == 'float32' else settings.dtype_name}"
            compared = {**row, "photograph": path.name, "mode": mode, "against": against}
            if mode not in found:
                yield {**compared, "cannot_run": setup["cannot_run"]}
                continue
            yield {
                **compared,
                **_compare(found[mode], found[reference]),
                **(setup["report"] if mode == OPTIMIZED else {}),
            }


def _load(settings: Settings) -> dict:
    if settings.checkpoint is None or settings.images is None:
        raise ValueError("there is no checkpoint or no photograph: give --checkpoint and --images.")
    paths = sorted(path for path in Path(settings.images).iterdir() if path.suffix.lower() in PHOTOGRAPH_SUFFIXES)
    if not paths:
        raise ValueError(f"{settings.images} holds no photograph ({', '.join(PHOTOGRAPH_SUFFIXES)}).")
    reference, processor = load_model(settings.checkpoint, str(settings.device))
    plain, _ = load_model(settings.checkpoint, str(settings.device), settings.dtype)
    models = {"float32": reference, EAGER: plain}
    for mode, names in FP8.items():
        models[mode] = copy.deepcopy(reference)
        _simulate_fp8(models[mode].vision_encoder, names)
    made = {}
    failed = attempt({}, lambda: made.update(model=_optimize(settings)) or {})
    if made:
        models[OPTIMIZED] = made["model"]
    return {
        "paths": paths, "models": models, "image_processor": processor.image_processor,
        "report": report_of(made["model"]) if made else {}, "cannot_run": failed.get("cannot_run"),
    }  # fmt: skip


def _simulate_fp8(encoder: nn.Module, names: tuple[str, ...]):
    """Rounds what linear layers of these names multiply, each row of a weight and each token with a scale of its own."""
    for name, linear in encoder.named_modules():
        if name.rpartition(".")[2] in names and isinstance(linear, nn.Linear):
            linear.weight.data = _to_fp8_and_back(linear.weight.data)
            linear.register_forward_pre_hook(lambda module, inputs: (_to_fp8_and_back(inputs[0]),))


def _to_fp8_and_back(values: torch.Tensor) -> torch.Tensor:
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def _optimize(settings: Settings):
    model, _ = load_model(settings.checkpoint, str(settings.device))  # as `from_pretrained` gives it
    return optimized(model, settings, image_batch_sizes=(1,), prompt_counts=(POINTS_PER_SIDE**2,))


@torch.inference_mode()
def _predict_all(path: Path, models: dict[str, PreTrainedModel], image_processor: SamImageProcessor) -> dict:
    image = image_tensor(path)
    size, device = tuple(image.shape[-2:]), models[EAGER].device
    resized = resized_size(*size, image_processor.size["longest_edge"])
    pixel_values = preprocess(image_processor, [image], torch.device("cpu")).to(device)
    places = (torch.arange(POINTS_PER_SIDE, device=device) + 0.5) / POINTS_PER_SIDE
    points = torch.stack([(places * resized[1]).repeat(POINTS_PER_SIDE), (places * resized[0]).repeat_interleave(POINTS_PER_SIDE)], dim=-1)  # fmt: skip
    padded = image_processor.pad_size["height"], image_processor.pad_size["width"]
    found = {}
    for name, model in models.items():
        values = pixel_values.to(model.dtype)
        embeddings = model.get_image_embeddings(values).clone()  # the next call may overwrite what a graph returned
        outputs = model(pixel_values=values, input_points=points[None, :, None])
        masks = upscale_logits(outputs.pred_masks.flatten(0, 2), padded, resized, size) > 0
        found[name] = {
            "embeddings": embeddings, "logits": outputs.pred_masks.clone(), "iou_scores": outputs.iou_scores.clone(),
            "masks": masks,
        }  # fmt: skip
    return found


def _compare(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict:
    ious = mask_iou(found["masks"], reference["masks"])
    return {
        "embedding_error": relative_error(found["embeddings"], reference["embeddings"]),
        "logits_error": relative_error(found["logits"], reference["logits"]),
        "iou_score_difference": (found["iou_scores"].double() - reference["iou_scores"].double()).abs().max().item(),
        "masks": len(ious), "mask_iou_mean": ious.mean().item(), "mask_iou_min": ious.min().item(),
        "masks_at_0.99": (ious >= 0.99).double().mean().item(),
    }  # fmt: skip


def mask_iou(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of pairs of masks, bool (n, H, W) twice to float64 (n,); 1 where both are empty."""
    both_empty = ~(masks | others).flatten(1).any(dim=1)
    return iou.mask_iou(masks, others).masked_fill(both_empty, 1.0)
