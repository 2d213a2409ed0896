"""Checks of an exported folder: valid ONNX, the same results as torch, and the loss of mIoU on a dataset."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..data import ImageDataset, SkipReport
from ..images.preprocessing import resized_size
from ..masks.boxes import xywh_to_xyxy
from ..masks.upscaling import upscale_logits
from .folder import pixels
from .graphs import DECODER, ENCODER
from .precision import SUFFIXES
from .runners import OnnxRunner, Runner, TorchRunner


MAX_DIFFERENCE = {"fp32": 1e-3}  # of logits
MIN_IOU = {"fp32": 0.999, "fp16": 0.99}  # of masks; the loss of int8 is measured on a dataset


@dataclass(frozen=True)
class CheckResult:
    """Agreement of an exported SAM with torch.

    Attributes:
        dtype: of the export.
        max_difference: largest absolute difference of the masks' logits.
        min_iou: smallest IoU of the best mask of a prompt with torch's, at the image's size.
        prompts: number of prompts compared.
        failure: what is not as it must be, as a sentence, or None.
    """

    dtype: str
    max_difference: float
    min_iou: float
    prompts: int
    failure: str | None


def check_folder(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: str | os.PathLike | Image.Image,
    dtype: str = "fp32",
) -> CheckResult:
    """Run onnx.checker, and compare with torch on an image: points, boxes, both, masks, and a batch of two images.

    Args:
        folder: of `export_onnx`.
        model: the model that was exported, in float32 on the CPU.
        processor: its processor.
        image: a photograph.
        dtype: of the files to check.

    Returns:
        The result. int8 and uint8 have no limits here; `mean_iou` measures them.

    Raises:
        ValueError: for a graph that onnx.checker refuses, and for files that are missing.
    """
    import onnx

    runner = OnnxRunner(folder, dtype)
    for name in (ENCODER, DECODER):
        path = Path(folder) / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx"
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ValueError(f"{path}: onnx.checker refuses it: {error}") from error
    runners: tuple[Runner, Runner] = (TorchRunner(model), runner)
    pixel_values = pixels(processor, image)
    pair = np.concatenate([pixel_values, pixel_values[..., ::-1]])  # the image, and the image mirrored
    embeddings = [[r.encode(values) for values in (pixel_values, pair)] for r in runners]
    differences, ious = [], []
    for which, prompts in _prompts(
        model.config.vision_config.image_size, 4 * model.config.prompt_encoder_config.image_embedding_size
    ):
        (scores, logits), (_, ours) = (r.decode(encoded[which], **prompts) for r, encoded in zip(runners, embeddings))
        differences.append(np.abs(logits - ours).max())
        best = scores.argmax(axis=2)[..., None, None, None]
        masks = [np.take_along_axis(values, best, axis=2)[:, :, 0] > 0 for values in (logits, ours)]
        ious.append(_iou(*masks).min())
    difference, iou = float(np.max(differences)), float(np.min(ious))  # NaN stays NaN
    return CheckResult(dtype, difference, iou, len(ious), _failure(dtype, difference, iou))


def mean_iou(
    runner: Runner,
    processor: ProcessorMixin,
    dataset: ImageDataset,
    progress: Callable[[str], object] = lambda line: None,
) -> tuple[float, int]:
    """Measure the mean IoU of box prompts: the mask of highest predicted IoU of each instance, at the image's size.

    Args:
        runner: a model.
        processor: its processor.
        dataset: images with masks; crowds are left out.
        progress: called with a line of text after each image, and at the end where images or instances were skipped.

    Returns:
        The mean over the instances, and their number.

    Raises:
        ValueError: for a dataset without instances.
    """
    image_processor = processor.image_processor
    padded = (image_processor.pad_size["height"], image_processor.pad_size["width"])
    ious: list[float] = []
    skipped = SkipReport()
    for index in range(len(dataset)):
        sample, report = dataset.load(index)
        skipped.merge(report)
        if sample is None:
            continue
        instances = [instance for instance in sample.instances if not instance.is_crowd]
        if not instances:
            continue
        resized = resized_size(sample.height, sample.width, image_processor.size["longest_edge"])
        scale = np.array([resized[1] / sample.width, resized[0] / sample.height] * 2, dtype=np.float32)
        boxes = np.array([xywh_to_xyxy(instance.bbox_xywh) for instance in instances], dtype=np.float32) * scale
        scores, logits = runner.decode(runner.encode(pixels(processor, sample.image)), boxes=boxes[None])
        best = np.take_along_axis(logits[0], scores[0].argmax(axis=1)[:, None, None, None], axis=1)[:, 0]
        masks = upscale_logits(torch.from_numpy(best), padded, resized, (sample.height, sample.width)).numpy() > 0
        ious += _iou(masks, np.stack([instance.mask() for instance in instances])).tolist()
        progress(f"{index + 1} of {len(dataset)} images")
    if skipped:
        progress(skipped.summary(len(dataset)))
    if not ious:
        raise ValueError("the dataset has no instances to measure mIoU on.")
    return float(np.mean(ious)), len(ious)


def _prompts(size: int, mask_size: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield prompts in pixels of the model's input, with 0 for one image and 1 for a batch of two."""
    random = np.random.default_rng(0)
    points = random.uniform(0.1, 0.6, (2, 4, 3, 2)).astype(np.float32) * size
    corner = random.uniform(0.05, 0.4, (2, 4, 2))
    boxes = (np.concatenate([corner, corner + random.uniform(0.1, 0.3, corner.shape)], 2) * size).astype(np.float32)
    labels = np.array([1, 1, 0], dtype=np.int64).reshape(1, 1, 3).repeat(4, 1).repeat(2, 0)
    mask = np.full((2, 1, mask_size, mask_size), -8.0, dtype=np.float32)
    mask[..., mask_size // 4 : mask_size // 2, mask_size // 4 : mask_size // 2] = 8
    yield 0, {"points": points[:1, :, :1], "labels": labels[:1, :, :1]}
    yield 0, {"boxes": boxes[:1]}
    yield 1, {"points": points, "labels": labels}
    yield 1, {"points": points, "labels": labels, "boxes": boxes}
    yield 1, {"points": points, "labels": labels, "masks": mask}


def _iou(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the IoU of each pair of masks (..., H, W); of two empty ones it is 1."""
    common, union = (function(ours, theirs).sum(axis=(-2, -1)) for function in (np.logical_and, np.logical_or))
    return np.where(union > 0, common / np.maximum(union, 1), 1.0)


def _failure(dtype: str, difference: float, iou: float) -> str | None:
    if not np.isfinite(difference):
        return "logits are not finite."
    if difference > (limit := MAX_DIFFERENCE.get(dtype, np.inf)):
        return f"logits differ by {difference:.2g}, and the limit is {limit:g}."
    if iou < (limit := MIN_IOU.get(dtype, 0)):
        return f"a mask has IoU {iou:.4f} with torch's, and the limit is {limit}."
    return None
