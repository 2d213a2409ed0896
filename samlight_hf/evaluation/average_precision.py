"""AP of masks for a detector's boxes and AR of everything mode, by COCOeval (faster-coco-eval)."""

import math
from collections import defaultdict
from collections.abc import Container
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..data import Sample, SampleError
from ..data.annotations import annotation_id, as_integer, checked_rle, matching_id, usable_polygons
from ..inference.crops import MaskGenerationSettings
from ..inference.mask_generation import MaskGenerator
from ..inference.tiles import TileSettings
from ..masks.rle import encode_rle, text_rle
from ..utils.json_files import read_json
from ..utils.messages import one_line
from .models import Encoded, PromptableModel
from .tasks import EvaluationTask


SIZES = ("all", "small", "medium", "large")
LVIS_DETECTIONS = 300  # of an image, as LVIS's own code has it


class DetectorBoxes(EvaluationTask):
    """A task that prompts with a detector's boxes (such as ViTDet's), one mask each (`multimask_output=False`).

    It returns one record for each image, so that every image counts in AP: {"image_id", "predictions": COCO results,
    [{"image_id", "category_id", "score": the detector's, "segmentation": RLE}]}.

    Args:
        path: a COCO results file, [{"image_id", "category_id", "bbox": [x, y, width, height], "score"}, ...].
        image_ids: the image ids of the dataset. The file may have them as text. Boxes of other images are left out, and
            counted in `num_other`, and so are boxes without width or height, in `num_empty`.
        category_ids: the categories that AP is a mean over; None for any. Boxes of others count in no score: they are
            left out, and counted in `num_unknown`.

    Raises:
        ValueError: for a file of another format, or without a box of these images and categories.
    """

    def __init__(self, path: str | Path, image_ids, category_ids: Container[int] | None = None):
        self.num_empty = 0
        try:
            results = read_json(path)
            by_image: dict[str, list[tuple[int, float, tuple[float, ...]]]] = defaultdict(list)
            for number, result in enumerate(results):
                box = tuple(float(result["bbox"][i]) for i in range(4))
                score = float(result["score"])
                if not all(map(math.isfinite, (*box, score))):
                    raise ValueError(f"result {number} has bbox {list(box)} and score {score}, which must be finite")
                if min(box[2:]) <= 0:
                    self.num_empty += 1
                    continue
                by_image[str(result["image_id"])].append((int(result["category_id"]), score, box))
        except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error).rstrip(".")
            raise ValueError(
                f"{path}: not a COCO results file, a list of image_id, category_id, bbox and score: {reason}."
            ) from error
        self.image_ids = {str(image_id): image_id for image_id in image_ids}
        self.by_image = {image: boxes for image, boxes in by_image.items() if image in self.image_ids}
        self.num_other = len(results) - self.num_empty - sum(map(len, self.by_image.values()))
        if not self.by_image:
            empty = f", and {self.num_empty} have no area" if self.num_empty else ""
            raise ValueError(f"{path}: none of its {len(results)} boxes is of an image of this dataset{empty}.")
        self.num_unknown = 0
        if category_ids is not None:
            self._leave_out_unknown(str(path), category_ids)

    def _leave_out_unknown(self, path: str, category_ids: Container[int]):
        boxes = [box for boxes in self.by_image.values() for box in boxes]
        unknown = sorted({category_id for category_id, _, _ in boxes if category_id not in category_ids})
        self.by_image = {
            image: [box for box in boxes if box[0] in category_ids] for image, boxes in self.by_image.items()
        }
        self.num_unknown = len(boxes) - sum(map(len, self.by_image.values()))
        if self.num_unknown == len(boxes):
            raise ValueError(
                f"{path}: none of its {len(boxes)} boxes of these images has a category of the annotations, such as "
                f"{unknown[0]}. Write category_id as the annotations do: COCO's go from 1 to 90 with gaps, a "
                "network's own labels from 0."
            )

    def __call__(self, model: PromptableModel, encoded: Encoded | None, sample: Sample) -> list[dict]:
        assert encoded is not None
        image_id, results = self.image_ids[sample.id], self.by_image.get(sample.id)
        if not results:
            return [{"image_id": image_id, "predictions": []}]
        x, y, width, height = torch.tensor([box for _, _, box in results]).unbind(1)
        boxes = torch.stack([x, y, x + width, y + height], dim=1)
        masks = model.predict(encoded, boxes_xyxy=boxes, multimask_output=False).masks[:, 0].cpu().numpy()
        predictions = [
            {"image_id": image_id, "category_id": category_id, "score": score, "segmentation": encode_rle(mask)}
            for (category_id, score, _), mask in zip(results, masks, strict=True)
        ]
        return [{"image_id": image_id, "predictions": predictions}]


class EverythingTask(EvaluationTask):
    """A task that runs everything mode, transformers' mask generation over a grid of points, for all annotated masks.

    It returns one record for each image: {"picture", "predictions": [{"segmentation", "score"}], "targets":
    [{"segmentation", "area", "iscrowd"}]}. Thresholds of 0 keep every mask that is not suppressed.

    Args:
        points_per_side: side of the grid of points, on the image and on each crop and tile.
        pred_iou_thresh: lowest predicted IoU of a mask.
        stability_score_thresh: lowest stability score of a mask.
        crops_n_layers: layers of crops, see `MaskGenerationSettings`.
        tiles: overlapping tiles that each image is segmented in; None for the image in one pass.

    Raises:
        ValueError: for a setting outside its range.
    """

    needs_embeddings = False

    def __init__(
        self,
        points_per_side: int = 32,
        pred_iou_thresh: float = 0.0,
        stability_score_thresh: float = 0.0,
        crops_n_layers: int = 0,
        tiles: TileSettings | None = None,
    ):
        self.settings = MaskGenerationSettings(
            points_per_side, crops_n_layers, pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
        )  # fmt: skip
        self.tiles = tiles
        self._generator: MaskGenerator | None = None

    def check(self, model: PromptableModel):
        if not model.keeps_aspect:
            raise ValueError(
                f"everything mode takes SAM's frame of an image, and model_type={model.model.config.model_type!r} has "
                "another: evaluate it without."
            )

    def is_too_thin(self, model: PromptableModel, sample: Sample) -> bool:
        return self.tiles is None and super().is_too_thin(model, sample)  # tiles are not as thin

    def __call__(self, model: PromptableModel, encoded: Encoded | None, sample: Sample) -> list[dict]:
        self.check(model)
        if self._generator is None or self._generator.model is not model.model:
            self._generator = MaskGenerator(model.model, model.processor, tiles=self.tiles)
        return [record_everything(self._generator, sample, self.settings)]


def record_everything(generator: MaskGenerator, sample: Sample, settings: MaskGenerationSettings) -> dict:
    """Run everything mode on an image and return the record that `EverythingTask` describes."""
    result = generator(sample.image, settings)
    predictions = [
        {"segmentation": rle, "score": float(score)}
        for rle, score in zip(result.masks.to_coco(), result.scores, strict=True)
    ]
    targets = [{"segmentation": text_rle(i.rle), "area": i.area, "iscrowd": int(i.is_crowd)} for i in sample.instances]
    return {"picture": sample.id, "predictions": predictions, "targets": targets}


def summarize_everything(records: list[dict]) -> dict[str, float]:
    """Return `average_recall` and `precision` of the records of `EverythingTask`."""
    return average_recall(records) | precision(records)


def precision(records: list[dict], min_iou: float = 0.5) -> dict[str, float]:
    """Measure how many masks everything mode finds, how many of them are right, and how well scores rank them.

    A mask is right if its IoU with an annotated region is at least `min_iou`; several masks may match one region. This
    is meaningful only for images that are annotated completely, such as panoptic ones.

    Args:
        records: records of `EverythingTask`.
        min_iou: from 0 to 1.

    Returns:
        `masks per image`; `masks right@0.5`, the share of all masks that are right; and `ranking AUC`, the probability
        that a right mask has a higher score than a wrong one of the same image, mean over the images with both. A value
        that no image defines is left out.
    """
    if not records:
        return {}
    right, areas_under_curve = [], []
    for record in records:
        predicted = [prediction["segmentation"] for prediction in record["predictions"]]
        targets = [target["segmentation"] for target in record["targets"]]
        if not predicted:
            continue
        ious = coco_mask.iou(predicted, targets, [0] * len(targets)) if targets else np.zeros((len(predicted), 1))
        is_right = ious.max(axis=1) >= min_iou
        right.append(is_right)
        if 0 < is_right.sum() < len(is_right):
            scores = np.array([prediction["score"] for prediction in record["predictions"]])
            higher = scores[is_right][:, None] - scores[~is_right]
            areas_under_curve.append(((higher > 0) + 0.5 * (higher == 0)).mean())
    scores_by_name = {"masks per image": sum(map(len, right)) / len(records)}
    if right:
        scores_by_name[f"masks right@{min_iou:g}"] = float(np.concatenate(right).mean())
    if areas_under_curve:
        scores_by_name["ranking AUC"] = float(np.mean(areas_under_curve))
    return scores_by_name


def check_annotations(annotation_json: str | Path, image_ids: list, lvis: bool = False) -> set[int]:
    """Raise ValueError, before anything is predicted, where `average_precision` could not be computed.

    Returns:
        The ids of the categories.
    """
    content, _ = _read_truth(annotation_json, image_ids, lvis)
    return {category["id"] for category in content["categories"]}


def average_precision(
    annotation_json: str | Path, results: list[dict], image_ids: list, lvis: bool = False
) -> dict[str, float]:
    """Compute COCO's or LVIS's mask AP, 0 to 1.

    AP is the mean over IoU thresholds 0.5:0.05:0.95, by COCOeval: 100 detections of a category in an image for COCO;
    300 in an image, of all categories together, with federated annotations and AP by frequency of the category, for
    LVIS. Annotations without an area get the area of their mask.

    Args:
        annotation_json: the annotation file.
        results: COCO results with masks.
        image_ids: the images that are evaluated.
        lvis: whether the annotations are LVIS's.

    Returns:
        AP over all and by size or frequency, without those that no annotation has.

    Raises:
        ValueError: for annotations that lack what AP needs.
    """
    from faster_coco_eval import COCO

    content, numbers = _read_truth(annotation_json, image_ids, lvis)
    truth = COCO(content)
    for annotation in content["annotations"]:
        if annotation.get("area") is None:
            annotation["area"] = float(coco_mask.area(truth.annToRLE(annotation)))
    results = [{**r, "image_id": numbers[r["image_id"]]} for r in results if r["image_id"] in numbers]
    if lvis:  # COCOeval counts detections of each category
        results = _best_of_images(results, LVIS_DETECTIONS)
    evaluation = _run(truth, results, list(truth.imgs), [LVIS_DETECTIONS] if lvis else [1, 10, 100], lvis_style=lvis)
    precision = evaluation.eval["precision"]  # (thresholds, recalls, categories, sizes, max detections)
    scores = {f"AP {size}": precision[:, :, :, i, -1] for i, size in enumerate(SIZES)}
    scores |= {"AP50": precision[0, :, :, 0, -1], "AP75": precision[5, :, :, 0, -1]}
    if lvis:
        frequency = [truth.cats[category]["frequency"] for category in evaluation.params.catIds]
        for letter, name in (("r", "rare"), ("c", "common"), ("f", "frequent")):
            scores[f"AP {name}"] = precision[:, :, [i for i, f in enumerate(frequency) if f == letter], 0, -1]
    return _means(scores)


def average_recall(records: list[dict], max_detections: int = 1000) -> dict[str, float]:
    """Compute the average recall of `EverythingTask`'s records, 0 to 1.

    It is the recall at `max_detections` masks an image, without categories, mean over IoU thresholds; over all and by
    size.
    """
    from faster_coco_eval import COCO

    category = {"category_id": 1}
    annotations = [
        {**target, **category, "image_id": number, "bbox": coco_mask.toBbox(target["segmentation"]).tolist()}
        for number, record in enumerate(records, start=1)
        for target in record["targets"]
    ]
    for identifier, annotation in enumerate(annotations, start=1):
        annotation["id"] = identifier
    images = [{"id": number} for number in range(1, len(records) + 1)]
    for image, record in zip(images, records, strict=True):
        size = (record["targets"] or record["predictions"] or [{"segmentation": {"size": [1, 1]}}])[0]
        image["height"], image["width"] = size["segmentation"]["size"]
    truth = COCO({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]})
    results = [
        {**prediction, **category, "image_id": number}
        for number, record in enumerate(records, start=1)
        for prediction in record["predictions"]
    ]
    evaluation = _run(truth, results, [image["id"] for image in images], [max_detections], use_categories=False)
    recall = evaluation.eval["recall"]  # (thresholds, categories, sizes, max detections)
    return _means({f"AR@{max_detections} {size}": recall[:, :, i, -1] for i, size in enumerate(SIZES)})


def _read_truth(annotation_json: str | Path, image_ids: list, lvis: bool) -> tuple[dict, dict[int | str, int]]:
    """Return the annotations of these images for COCOeval, and the numbers of the images in it by their ids.

    COCOeval does not accept text as an id, and treats an annotation id of 0 as "no match": so both are numbered from 1.
    """
    content = read_json(annotation_json, dict)
    categories = content.get("categories")
    if not (isinstance(categories, list) and categories and all(_has_integer(c, "id") for c in categories)):
        raise ValueError(
            f"{annotation_json}: no categories with ids: AP is a mean over them. Add them, or leave out --detections."
        )
    if lvis and not all(category.get("frequency") in ("r", "c", "f") for category in categories):
        raise ValueError(f"{annotation_json}: categories without LVIS's frequency (r, c or f). Leave out --lvis.")
    numbers = {image_id: n for n, image_id in enumerate(sorted(image_ids, key=lambda i: (isinstance(i, str), i)), 1)}
    images: dict[int | str, dict] = {}
    for image in content["images"]:
        if (image_id := annotation_id(image)) in numbers:
            if not (_has_integer(image, "width") and _has_integer(image, "height")):
                raise ValueError(f"{annotation_json}: image {image_id!r} needs a width and a height for AP.")
            images.setdefault(image_id, {**image, "id": numbers[image_id]})
    annotations: list[dict] = []
    ids = set()
    for place, annotation in enumerate(content["annotations"]):
        image_id = matching_id(annotation.get("image_id"), images) if isinstance(annotation, dict) else None
        identifier = annotation_id(annotation)
        if image_id not in images or (identifier is not None and identifier in ids):  # the dataset skips these, too
            continue
        ids.add(identifier)
        category_id, image = as_integer(annotation.get("category_id")), images[image_id]
        try:
            mask, why = _mask_for_coco(annotation.get("segmentation"), image["width"], image["height"]), "no category"
        except SampleError as error:
            mask, why = None, str(error.reason)
        if mask is None or category_id is None:
            name = f"number {place}" if identifier is None else identifier
            raise ValueError(
                f"{annotation_json}: annotation {name} needs a category_id and a segmentation for AP ({why})."
            )
        own = {"segmentation": mask, "category_id": category_id, "image_id": image["id"]}
        annotations.append({**annotation, **own, "id": len(annotations) + 1})
    if not annotations:
        raise ValueError(f"{annotation_json}: none of its annotations is of these images: there is no AP of them.")
    return {"images": list(images.values()), "annotations": annotations, "categories": categories}, numbers


def _mask_for_coco(segmentation, width: int, height: int) -> dict | list:
    """Return an RLE that fits the image, or polygons as `CocoDataset` reads them (pycocotools would misread some).

    Raises:
        SampleError: for others; COCOeval would count an RLE of another size as an object that is never found.
    """
    if isinstance(segmentation, dict):
        checked_rle(segmentation, width, height)
        return segmentation
    return usable_polygons(segmentation)[0]


def _has_integer(entry, key: str) -> bool:
    return isinstance(entry, dict) and type(entry.get(key)) is int


def _best_of_images(results: list[dict], number: int) -> list[dict]:
    """Return the results of the highest scores of each image."""
    by_image: defaultdict[int, list[dict]] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return [
        result
        for own in by_image.values()
        for result in sorted(own, key=lambda result: result["score"], reverse=True)[:number]
    ]


def _run(truth, results: list[dict], image_ids: list, max_detections: list[int], use_categories=True, lvis_style=False):
    from faster_coco_eval import COCOeval_faster

    results = [dict(result) for result in results]  # loadRes writes into them
    evaluation = COCOeval_faster(truth, truth.loadRes(results), "segm", lvis_style=lvis_style)
    evaluation.params.imgIds = image_ids
    evaluation.params.maxDets = max_detections
    evaluation.params.useCats = int(use_categories)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _means(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Average COCOeval's scores, in which -1 means that there is no annotation."""
    return {name: float(values[values > -1].mean()) for name, values in scores.items() if (values > -1).any()}
