"""IoU of masks as a metric for the `evaluate` library."""

import re

import datasets
import evaluate
import numpy as np
from pycocotools import mask as coco_mask

from .iou import DILATION_RATIO, boundary_iou, mask_iou


_DESCRIPTION = """
Mean intersection over union of binary masks, over instances, with the means for small, medium and large objects and the
boundary IoU of Cheng et al. (2021). Values equal those of pycocotools exactly.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: masks, one for each reference: nested lists, numpy arrays or tensors of shape (H, W), bool or 0 and 1,
        or COCO RLE, `{"size": [H, W], "counts": string, bytes or list of runs}`. Kinds may be mixed.
    references: the true masks, of the same height and width as their predictions.
    boundary (bool): also compute the boundary IoU. Default True.
    dilation_ratio (float): width of the boundary as a part of the image's diagonal. Default 0.02.
    per_instance (bool): also return lists with the value of each instance. Default False.
Returns:
    mean_iou: mean over all instances.
    mean_iou_small, mean_iou_medium, mean_iou_large: over those whose reference has less than 32 x 32 pixels, less than
        96 x 96, or more; None where there is none.
    boundary_iou: mean boundary IoU over all instances.
    num_instances, num_small, num_medium, num_large: number of instances of each mean.
    num_empty_references: references without a pixel. Their IoU is 0, as in pycocotools, and they are in the means.
    ious, boundary_ious, areas: with per_instance, lists in the order of the input; areas are pixels of the reference.
Examples:
    >>> metric = evaluate.load("mask_iou")
    >>> result = metric.compute(predictions=[[[1, 1], [0, 0]]], references=[[[1, 0], [0, 0]]])
    >>> result["mean_iou"]
    0.5
"""

_CITATION = """
@inproceedings{cheng2021boundary,
  title={Boundary {IoU}: Improving Object-Centric Image Segmentation Evaluation},
  author={Cheng, Bowen and Girshick, Ross and Doll{\\'a}r, Piotr and Berg, Alexander C. and Kirillov, Alexander},
  booktitle={CVPR},
  year={2021}
}
"""

# COCO's classes of object size, in pixels.
_SMALL, _MEDIUM = 32**2, 96**2

# Groups of 5 bits as characters: "P" to "o" if the number continues, "0" to "O" for its last group.
_RLE_COUNTS = re.compile(rb"(?:[P-o]{0,6}[0-O])+")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MaskIou(evaluate.Metric):
    """The metric. Masks are stored as RLE until `compute`: a thousandth of the size, and any image size in a batch."""

    def _info(self):
        rle = {"size": [datasets.Value("int32")], "counts": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": rle, "references": rle}),
            reference_urls=["https://arxiv.org/abs/2103.16562"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add several masks of each kind; see the description of `compute`. Raises ValueError."""
        predictions, references = (list(() if masks is None else masks) for masks in (predictions, references))
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references: expected as many.")
        if predictions:
            pairs = [_pair(*pair) for pair in zip(predictions, references)]
            super().add_batch(
                predictions=[prediction for prediction, _ in pairs],
                references=[reference for _, reference in pairs],
                **kwargs,
            )

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one mask of each kind; see the description of `compute`. Raises ValueError."""
        if prediction is None or reference is None:
            raise ValueError("A mask as prediction and one as reference are needed.")
        prediction, reference = _pair(prediction, reference)
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _compute(self, predictions, references, boundary=True, dilation_ratio=DILATION_RATIO, per_instance=False):
        ious, boundary_ious, areas = [], [], []
        for prediction, reference in zip(predictions, references):
            prediction, reference = (coco_mask.decode(rle).view(bool) for rle in (prediction, reference))
            ious.append(float(mask_iou(prediction, reference)))
            areas.append(int(np.count_nonzero(reference)))
            if boundary:
                boundary_ious.append(float(boundary_iou(prediction, reference, dilation_ratio)))
        result = _summary(np.array(ious), np.array(areas))
        if boundary:
            result["boundary_iou"] = float(np.mean(boundary_ious))
        if per_instance:
            result.update(ious=ious, areas=areas, **({"boundary_ious": boundary_ious} if boundary else {}))
        return result


def _summary(ious: np.ndarray, areas: np.ndarray) -> dict:
    """Return the means by size for IoUs and areas (instances,) each."""
    result = {"mean_iou": float(ious.mean()), "num_instances": len(ious)}
    sizes = {
        "small": areas < _SMALL,
        "medium": (areas >= _SMALL) & (areas < _MEDIUM),
        "large": areas >= _MEDIUM,
    }
    for name, chosen in sizes.items():
        result[f"mean_iou_{name}"] = float(ious[chosen].mean()) if chosen.any() else None
        result[f"num_{name}"] = int(chosen.sum())
    result["num_empty_references"] = int((areas == 0).sum())
    return result


def _pair(prediction, reference) -> tuple[dict, dict]:
    prediction, reference = _to_rle(prediction), _to_rle(reference)
    if prediction["size"] != reference["size"]:
        raise ValueError(
            f"A prediction of {prediction['size']} and a reference of {reference['size']} pixels: expected the same "
            "height and width. Resize the prediction to the image's own size."
        )
    return prediction, reference


def _to_rle(mask) -> dict:
    """Convert a mask or an RLE to compressed RLE with counts as a string."""
    if isinstance(mask, dict):
        return _checked_rle(mask)
    if hasattr(mask, "detach"):  # a torch tensor, without importing torch
        mask = mask.detach().cpu().numpy()
    try:
        mask = np.asarray(mask)
    except ValueError as error:
        raise ValueError("A mask with rows of different lengths.") from error
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"A mask of shape {mask.shape}: expected (H, W).")
    if mask.dtype != bool:
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("A mask with values other than 0 and 1: threshold logits first (masks > 0).")
        mask = mask.astype(bool)
    rle = coco_mask.encode(np.asfortranarray(mask).view(np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _checked_rle(rle: dict) -> dict:
    size, counts = rle.get("size"), rle.get("counts")
    try:
        height, width = (int(side) for side in size)
        if isinstance(counts, (list, tuple, np.ndarray)):
            counts = coco_mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)["counts"]
        counts = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"Not a COCO RLE with 'size' and 'counts' ({error}).") from error
    if min(height, width) < 1 or not _RLE_COUNTS.fullmatch(counts) or not _is_complete(counts, height, width):
        raise ValueError(f"Malformed RLE: its runs do not add up to the {height} x {width} pixels of its size.")
    return {"size": [height, width], "counts": counts.decode("ascii")}


def _is_complete(counts: bytes, height: int, width: int) -> bool:
    """Return whether the runs add up to all pixels.

    pycocotools raises for runs that are too long. Where they end too early, it returns uninitialized memory. The runs
    are complete if they fit, and are too long for one pixel less.
    """

    def fits(num_pixels):
        try:
            coco_mask.decode({"size": [num_pixels, 1], "counts": counts})
        except ValueError:
            return False
        return True

    return fits(height * width) and not fits(height * width - 1)
