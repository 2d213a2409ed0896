"""Calibration to SAM's scale: mask logits and predicted IoUs are rescaled inside the weights; masks do not change.

Everything mode keeps masks whose predicted IoU is above 0.88 and whose stability is above 0.95. These defaults suit a
model that was trained on masks from a model. One that was trained on masks drawn by many people scores lower, however
good its masks are. `calibrate` finds the thresholds at which such a model finds the wanted number of masks, and maps
them to the defaults.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..data import ImageDataset, Sample, SampleError, SkipReport
from ..inference.crops import DEFAULT_PRED_IOU_THRESH, DEFAULT_STABILITY_SCORE_THRESH, MaskGenerationSettings
from ..inference.mask_generation import MaskGenerator
from .average_precision import precision, record_everything


LOGIT_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Attributes:
        logit_scale: factor by which mask logits were multiplied.
        pred_iou_thresh: predicted IoU before calibration that is now `DEFAULT_PRED_IOU_THRESH`.
        top_score: predicted IoU before calibration that is now 1.
        masks_per_image: masks of everything mode at the default thresholds, mean over the images.
        share_right: share of them with IoU >= 0.5 with an annotated region.
        ranking_auc: how often a right mask has a higher score than a wrong one. Calibration does not change it.
    """

    logit_scale: float
    pred_iou_thresh: float
    top_score: float
    masks_per_image: float
    share_right: float
    ranking_auc: float


@torch.no_grad()
def scale_mask_logits(model: PreTrainedModel, factor: float):
    """Multiply a SAM's mask logits by a factor, in place, in the last layers of its hypernetworks.

    Masks do not change, since their threshold is 0. Stability rises with the factor. Logits that are fed back as a
    mask prompt are divided by it, in the first convolution that reads them.

    Args:
        model: a SAM or SAM-Lightening, changed in place.
        factor: positive and finite.

    Raises:
        ValueError: for another factor.
    """
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor={factor!r} must be positive and finite.")
    parts: Any = model
    for network in parts.mask_decoder.output_hypernetworks_mlps:
        network.proj_out.weight.mul_(factor)
        network.proj_out.bias.mul_(factor)
    parts.prompt_encoder.mask_embed.conv1.weight.div_(factor)


@torch.no_grad()
def map_scores(model: PreTrainedModel, low: tuple[float, float], high: tuple[float, float]):
    """Map the predicted IoUs of the three masks of an ambiguous prompt linearly, in the last layer of the IoU head.

    Their order does not change. The score of the single mask, which boxes get, does not change either.

    Args:
        model: a SAM or SAM-Lightening, changed in place.
        low: a predicted IoU, and its new value.
        high: a higher predicted IoU, and its new value.

    Raises:
        ValueError: unless both values of `high` are above those of `low`.
    """
    if not (low[0] < high[0] and low[1] < high[1]):
        raise ValueError(f"low={low} must be below high={high}, before and after.")
    slope = (high[1] - low[1]) / (high[0] - low[0])
    parts: Any = model
    last = parts.mask_decoder.iou_prediction_head.proj_out
    last.weight[1:] *= slope
    last.bias[1:] = last.bias[1:] * slope + (low[1] - slope * low[0])


def calibrate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: ImageDataset,
    masks_per_image: float = 20.0,
    points_per_side: int = 32,
    logit_scales: Sequence[float] = LOGIT_SCALES,
) -> Calibration:
    """Rescale a SAM, in place, so that everything mode finds about `masks_per_image` masks at the default thresholds.

    Among the scales of the logits, it chooses the one at which most of these masks are right.

    Args:
        model: a SAM or SAM-Lightening.
        processor: the model's processor.
        dataset: images that are annotated completely, and that the model is not evaluated on afterwards.
        masks_per_image: wanted number of masks, mean over the images.
        points_per_side: side of the grid of points.
        logit_scales: factors to try.

    Returns:
        The chosen scale and thresholds, and the scores at the default thresholds.

    Raises:
        ValueError: where no scale gives so many masks, and where no image can be used.

    Warns:
        UserWarning: counts the images that were skipped.
    """
    generator = MaskGenerator(model, processor)
    calibrations: list[Calibration] = []
    for scale in logit_scales:
        # With logits multiplied by `scale`, an offset of 1 corresponds to 1 / scale before.
        settings = MaskGenerationSettings(
            points_per_side,
            pred_iou_thresh=0.0,
            stability_score_thresh=DEFAULT_STABILITY_SCORE_THRESH,
            stability_score_offset=1 / scale,
        )
        report = SkipReport()
        records = [record_everything(generator, sample, settings) for sample in _usable(dataset, report)]
        if not records:
            raise ValueError(f"no image of the data set can be used. {report.summary(len(dataset))}")
        if report and scale == logit_scales[0]:
            warnings.warn(report.summary(len(dataset)), stacklevel=2)
        scores = np.sort([prediction["score"] for record in records for prediction in record["predictions"]])[::-1]
        number = round(masks_per_image * len(records))
        if len(scores) <= number:
            continue
        threshold, top = float(scores[number]), float(scores[0])
        ranking = precision(records).get("ranking AUC", float("nan"))
        measured = precision([_above(record, threshold) for record in records])
        masks, right = measured["masks per image"], measured["masks right@0.5"]
        calibrations.append(Calibration(scale, threshold, top, masks, right, ranking))
    if not calibrations:
        raise ValueError(
            f"masks_per_image={masks_per_image} is more than the model finds with a stability above "
            f"{DEFAULT_STABILITY_SCORE_THRESH} at any of the logit scales {tuple(logit_scales)}. Ask for fewer, or "
            "give larger scales."
        )
    best = max(calibrations, key=lambda calibration: calibration.share_right)
    scale_mask_logits(model, best.logit_scale)
    map_scores(model, (best.pred_iou_thresh, DEFAULT_PRED_IOU_THRESH), (best.top_score, 1.0))
    return best


def _usable(dataset: ImageDataset, report: SkipReport) -> Iterator[Sample]:
    for index in range(len(dataset)):
        try:
            yield dataset[index]
        except SampleError as error:
            report.add_image(error.reason, error.where)


def _above(record: dict, threshold: float) -> dict:
    """Return a record without the masks of lower scores."""
    predictions = [prediction for prediction in record["predictions"] if prediction["score"] > threshold]
    return {**record, "predictions": predictions}
