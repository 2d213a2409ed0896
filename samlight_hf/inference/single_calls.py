"""Functions for one image with masks as pixels: of everything in it, or one for each box and each point."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..images.preprocessing import ImageInput, image_tensor
from ..masks.boxes import mask_edges
from ..masks.results import MaskResult
from .crops import (
    DEFAULT_POINTS_PER_SIDE,
    DEFAULT_PRED_IOU_THRESH,
    DEFAULT_STABILITY_SCORE_THRESH,
    MaskGenerationSettings,
)
from .encoded_image import EncodedImage
from .mask_generation import MaskGenerator
from .predictor import Predictor
from .prompts import ObjectPrompt, clip_prompts


@torch.inference_mode()
def predict_objects(predictor: Predictor, prompts: Sequence[ObjectPrompt], image: EncodedImage) -> MaskResult:
    """Predict one mask for each object on an encoded image.

    For an object with one point and no box it is the one of three masks with the highest predicted IoU.

    Args:
        predictor: The predictor.
        prompts: n prompts, in pixels of the image.
        image: The encoded image.

    Returns:
        The n masks, in the same order.

    Raises:
        ValueError: If a box or a point lies outside the image, or a box is reversed or empty.
    """
    parsed = []  # all of them before the work begins
    for prompt in prompts:
        parts: dict = {"boxes_xyxy": None if prompt.box_xyxy is None else [prompt.box_xyxy]}
        if prompt.points_xy:
            parts |= {"points_xy": [prompt.points_xy], "labels": [prompt.labels]}
        parsed += predictor._parse(image, 0, **parts)
    masks, scores = np.zeros((len(prompts), *image.size), dtype=bool), np.zeros(len(prompts), dtype=np.float32)
    for is_ambiguous in (False, True):
        places = [place for place, prompt in enumerate(prompts) if prompt.is_ambiguous == is_ambiguous]
        if places:
            predicted_iou, logits = predictor._decode([image], [parsed[place] for place in places], is_ambiguous)
            predicted_iou, best = predicted_iou.max(dim=1)
            logits = logits[torch.arange(len(best), device=best.device), best]
            masks[places] = predictor.to_masks(logits, image=image).cpu().numpy()
            scores[places] = predicted_iou.cpu().numpy()
    return MaskResult(masks, scores, mask_edges(masks))


def predict_prompts(
    predictor: Predictor,
    boxes_xyxy: Sequence = (),
    points_xy: Sequence = (),
    index: int = 0,
    image: EncodedImage | None = None,
) -> MaskResult:
    """Predict one mask for each box and each point on an encoded image, by `predict_objects`.

    Args:
        predictor: The predictor.
        boxes_xyxy: Boxes in pixels of the image, see `clip_prompts`.
        points_xy: Points in pixels of the image, see `clip_prompts`. Each is on an object of its own.
        index: The index of the image among those that were set.
        image: The encoded image, instead of `index`.

    Returns:
        The masks of the boxes first, then those of the points.

    Raises:
        ValueError: If a prompt lies outside the image, or a box is reversed or empty.
    """
    prompts = [ObjectPrompt(box_xyxy=box) for box in boxes_xyxy]
    prompts += [ObjectPrompt(points_xy=(point,), labels=(1,)) for point in points_xy]
    return predict_objects(predictor, prompts, predictor.images[index] if image is None else image)


def segment_prompts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: ImageInput,
    boxes_xyxy: Sequence[Sequence[float]] = (),
    points_xy: Sequence[Sequence[float]] = (),
) -> MaskResult:
    """Encode an image for one use and call `predict_prompts` on it.

    Raises:
        ValueError: As `predict_prompts`, and if the image cannot be read or is too thin for the model.
    """
    tensor = image_tensor(image)
    clip_prompts((tensor.shape[2], tensor.shape[1]), boxes_xyxy, points_xy)  # before the image is encoded
    predictor = Predictor(model, processor, output="torch", cuda_graphs=False)
    return predict_prompts(predictor, boxes_xyxy, points_xy, image=predictor.encode(tensor))


def segment_everything(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: ImageInput,
    points_per_side: int = DEFAULT_POINTS_PER_SIDE,
    pred_iou_thresh: float = DEFAULT_PRED_IOU_THRESH,
    stability_score_thresh: float = DEFAULT_STABILITY_SCORE_THRESH,
    points_per_batch: int | None = None,
    progress=None,
) -> MaskResult:
    """Segment everything in one image with a `MaskGenerator` made for one use.

    Args:
        model: The model.
        processor: Its processor.
        image: The image, see `images.preprocessing.image_tensor`.
        points_per_side: Points along each side of the grid.
        pred_iou_thresh: See `MaskGenerationSettings`.
        stability_score_thresh: See `MaskGenerationSettings`.
        points_per_batch: See `MaskGenerator`.
        progress: See `MaskGenerator.generate`.

    Returns:
        The masks as pixels, the best first.

    Raises:
        ValueError: For settings outside their range, and for an image that is too thin for the model.
    """
    if not isinstance(points_per_side, int) or points_per_side < 1:
        raise ValueError(f"points_per_side={points_per_side!r} must be a positive integer.")
    settings = MaskGenerationSettings(
        points_per_side, pred_iou_thresh=pred_iou_thresh, stability_score_thresh=stability_score_thresh
    )
    # Capturing CUDA graphs would not pay off for one image.
    generator = MaskGenerator(model, processor, points_per_batch=points_per_batch, cuda_graphs=False)
    return generator.generate(image_tensor(image), settings, progress).to_result()
