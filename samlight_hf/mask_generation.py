"""Masks of one picture: for boxes, for points, or for everything in it. Coordinates are pixels of the original picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import MaskGenerationPipeline, PreTrainedModel, ProcessorMixin

from .loading import quiet_transformers


DEFAULT_POINTS_PER_SIDE = 32
DEFAULT_PRED_IOU_THRESH = 0.88
DEFAULT_STABILITY_SCORE_THRESH = 0.95

# Masks of one batch at the picture's own size, before they are thresholded: float32, three for a point.
_BATCH_BYTES = 2**30


@dataclass(frozen=True)
class MaskResult:
    """n masks of a picture of H x W pixels; all fields are well formed where n is 0.

    Attributes:
        masks: bool (n, H, W).
        scores: float32 (n,), the IoU with the true mask that the model predicts.
        boxes_xyxy: float32 (n, 4), the tight box of each mask as pixel edges: x2 and y2 lie behind the last pixel. Zeros
            for an empty mask.
    """

    masks: np.ndarray
    scores: np.ndarray
    boxes_xyxy: np.ndarray

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, part: slice) -> "MaskResult":
        return MaskResult(self.masks[part], self.scores[part], self.boxes_xyxy[part])


class _HalfPrecisionPipeline(MaskGenerationPipeline):
    """transformers' pipeline, whose non-maximum suppression takes scores of the boxes' dtype, float32, and no other.

    `progress.update` is told how many points have been decoded.
    """

    progress = None

    def _forward(self, model_inputs, **kwargs):
        num_points = model_inputs["input_points"].shape[1]
        output = super()._forward(model_inputs, **kwargs)
        if self.progress is not None:
            self.progress.update(num_points)
        return output

    def postprocess(self, model_outputs, **kwargs):
        for output in model_outputs:
            output["iou_scores"] = output["iou_scores"].float()
        return super().postprocess(model_outputs, **kwargs)


@quiet_transformers()
def segment_everything(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    picture: Image.Image,
    points_per_side: int = DEFAULT_POINTS_PER_SIDE,
    pred_iou_thresh: float = DEFAULT_PRED_IOU_THRESH,
    stability_score_thresh: float = DEFAULT_STABILITY_SCORE_THRESH,
    points_per_batch: int | None = None,
    progress=None,
) -> MaskResult:
    """Masks of everything in the picture, the best first: a grid of `points_per_side`² points, three masks each.

    Kept are masks with a predicted IoU above `pred_iou_thresh` and a stability above `stability_score_thresh` (both
    0 to 1; 0 keeps all), and of those whose boxes overlap by an IoU above 0.7 the best.

    `points_per_batch` is how many points are decoded at once; None takes what suits device and picture. `progress`, such as
    a tqdm bar, has its `update` called with the number of points decoded.
    Raises ValueError for settings outside their range, and for a picture that is too thin for the model.
    """
    for name, value in (("points_per_side", points_per_side), ("points_per_batch", points_per_batch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a positive integer.")
    for name, value in (("pred_iou_thresh", pred_iou_thresh), ("stability_score_thresh", stability_score_thresh)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be from 0 to 1.")
    check_picture(processor, picture)
    # Without a device the pipeline takes the model to the GPU, where there is one.
    pipeline = _HalfPrecisionPipeline(model=model, image_processor=processor.image_processor, device=model.device)
    pipeline.progress = progress
    output = pipeline(
        picture,
        points_per_crop=points_per_side,
        points_per_batch=points_per_batch or _prompts_per_batch(model, picture),
        pred_iou_thresh=pred_iou_thresh,
        stability_score_thresh=stability_score_thresh,
    )
    if not output["masks"]:
        return _result(picture, np.zeros((0, picture.height, picture.width), dtype=bool), np.zeros(0))
    return _result(picture, np.stack([np.asarray(mask) for mask in output["masks"]]), np.asarray(output["scores"]))


@quiet_transformers()
@torch.inference_mode()
def segment_prompts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    picture: Image.Image,
    boxes_xyxy: Sequence[Sequence[float]] = (),
    points_xy: Sequence[Sequence[float]] = (),
) -> MaskResult:
    """One mask for each prompt: first those of the boxes, then those of the points. The picture is encoded once.

    Boxes are (x1, y1, x2, y2) with 0 <= x1 < x2 <= width, points (x, y) with 0 <= x < width, likewise in y. Each point
    is a prompt of its own, on the object; of its three masks the one with the highest predicted IoU is taken.
    Raises ValueError for a prompt outside the picture, a reversed or empty box, or a picture that is too thin.
    """
    check_prompts(picture.size, boxes_xyxy, points_xy)
    check_picture(processor, picture)
    inputs = processor(images=picture, return_tensors="pt")
    pixel_values = inputs["pixel_values"].to(model.device, model.dtype)
    embeddings = model.get_image_embeddings(pixel_values)

    # Both go from the original picture to the resized one, which is not the same factor in x and y after rounding.
    height, width = inputs["reshaped_input_sizes"][0].tolist()
    scale = torch.tensor([width / picture.width, height / picture.height], dtype=torch.float32)
    boxes = torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(1, -1, 4) * scale.repeat(2)  # (1, prompts, 4)
    points = torch.tensor(points_xy, dtype=torch.float32).reshape(1, -1, 1, 2) * scale  # (1, prompts, 1 point, 2)

    masks, scores = [np.zeros((0, picture.height, picture.width), dtype=bool)], [np.zeros(0)]
    chunk_size = _prompts_per_batch(model, picture)
    for name, prompts in (("input_boxes", boxes), ("input_points", points)):
        for chunk in prompts.to(model.device).split(chunk_size, dim=1):
            if chunk.shape[1] == 0:  # split gives one empty chunk where there is nothing to split
                continue
            output = model(image_embeddings=embeddings, multimask_output=name == "input_points", **{name: chunk})
            # (1, prompts, masks, h, w) and (1, prompts, masks) -> (1, prompts, 1, h, w) and (prompts,)
            predicted_iou, best = output.iou_scores[0].float().max(dim=1)
            logits = output.pred_masks[:, torch.arange(len(best), device=best.device), best, None].float()
            chunk_masks = processor.post_process_masks(logits, inputs["original_sizes"], inputs["reshaped_input_sizes"])
            masks.append(chunk_masks[0][:, 0].cpu().numpy())
            scores.append(predicted_iou.cpu().numpy())
    return _result(picture, np.concatenate(masks), np.concatenate(scores))


def check_prompts(
    size: tuple[int, int], boxes_xyxy: Sequence[Sequence[float]] = (), points_xy: Sequence[Sequence[float]] = ()
):
    """Raises ValueError for the first prompt that a picture of `size` (width, height) cannot have."""
    width, height = size
    for box in boxes_xyxy:
        if len(box) != 4 or not all(map(math.isfinite, box)):
            raise ValueError(f"box {_numbers(box)} must be four numbers, X1,Y1,X2,Y2.")
        x1, y1, x2, y2 = box
        if x1 >= x2 or y1 >= y2:
            kind = "has no area" if x1 == x2 or y1 == y2 else "is reversed"
            raise ValueError(f"box {_numbers(box)} {kind}: it must be X1,Y1,X2,Y2 with X1 < X2 and Y1 < Y2.")
        if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            raise ValueError(
                f"box {_numbers(box)} reaches outside the picture of {width}x{height} pixels: keep X from 0 to {width} "
                f"and Y from 0 to {height}."
            )
    for point in points_xy:
        if len(point) != 2 or not all(map(math.isfinite, point)):
            raise ValueError(f"point {_numbers(point)} must be two numbers, X,Y.")
        if not (0 <= point[0] < width and 0 <= point[1] < height):
            raise ValueError(
                f"point {_numbers(point)} lies outside the picture of {width}x{height} pixels: keep X from 0 to "
                f"{width - 1} and Y from 0 to {height - 1}."
            )


def check_picture(processor: ProcessorMixin, picture: Image.Image):
    """Raises ValueError for a picture whose short side would vanish when its long side is resized for the model."""
    longest_edge = processor.image_processor.size["longest_edge"]
    if min(picture.size) * longest_edge / max(picture.size) < 0.5:
        raise ValueError(
            f"a picture of {picture.width}x{picture.height} pixels is too thin: resized to {longest_edge} pixels it would be "
            f"0 pixels thick. Cut it to a ratio below {2 * longest_edge}:1."
        )


def _prompts_per_batch(model: PreTrainedModel, picture: Image.Image) -> int:
    """Bounded by memory; on a CPU small batches are faster too, since they stay closer to its caches."""
    pixels = max(picture.width * picture.height, model.config.vision_config.image_size**2)
    return max(1, min(16 if model.device.type == "cpu" else 64, _BATCH_BYTES // (3 * 4 * pixels)))


def _result(picture: Image.Image, masks: np.ndarray, scores: np.ndarray) -> MaskResult:
    assert masks.shape == (len(scores), picture.height, picture.width)
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(columns):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return MaskResult(masks, scores.astype(np.float32), boxes)


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
