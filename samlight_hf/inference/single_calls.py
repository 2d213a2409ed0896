"""Functions for one image: prompts as boxes and points, one mask for each, as pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..images.preprocessing import ImageInput, image_tensor
from ..masks.boxes import mask_edges
from ..masks.results import MaskResult
from .encoded_image import EncodedImage
from .predictor import Predictor
from .prompts import clip_prompts


@torch.inference_mode()
def predict_prompts(
    predictor: Predictor,
    boxes_xyxy: Sequence = (),
    points_xy: Sequence = (),
    index: int = 0,
    image: EncodedImage | None = None,
) -> MaskResult:
    """Predict one mask for each box and each point on an encoded image.

    Each point is a prompt of its own, on the object. Of its three masks the one with the highest predicted IoU is
    taken.

    Args:
        predictor: The predictor.
        boxes_xyxy: Boxes in pixels of the image, see `clip_prompts`.
        points_xy: Points in pixels of the image, see `clip_prompts`.
        index: The index of the image among those that were set.
        image: The encoded image, instead of `index`.

    Returns:
        The masks of the boxes first, then those of the points.

    Raises:
        ValueError: If a prompt lies outside the image, or a box is reversed or empty.
    """
    image = predictor.images[index] if image is None else image
    height, width = image.size
    clip_prompts((width, height), boxes_xyxy, points_xy)  # checks all prompts before the work begins
    masks, scores = [np.zeros((0, height, width), dtype=bool)], [np.zeros(0, dtype=np.float32)]
    for kind, prompts in (("boxes_xyxy", boxes_xyxy), ("points_xy", [[point] for point in points_xy])):
        if len(prompts):
            parsed = predictor._parse(image, 0, **{kind: prompts})
            predicted_iou, logits = predictor._decode([image], parsed, multimask_output=kind == "points_xy")
            predicted_iou, best = predicted_iou.max(dim=1)
            logits = logits[torch.arange(len(best), device=best.device), best]
            masks.append(predictor.to_masks(logits, image=image).cpu().numpy())
            scores.append(predicted_iou.cpu().numpy())
    all_masks = np.concatenate(masks)
    return MaskResult(all_masks, np.concatenate(scores), mask_edges(all_masks))


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
