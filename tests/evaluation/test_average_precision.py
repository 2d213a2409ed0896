import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samlight_hf.data import load_dataset
from samlight_hf.evaluation.average_precision import (
    DetectorBoxes,
    Everything,
    average_precision,
    average_recall,
    encode_rle,
)
from tests.data.files import box_mask, jpeg, rle, write_coco


SIZE = 200


def truth_and_results(tmp_path, seed=0):
    """Eight pictures, three categories, and detections that are shifted, missing, double and of the wrong category."""
    generator = np.random.default_rng(seed)
    images, annotations, results, pictures = [], [], [], {}
    for image_id in range(1, 9):
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": SIZE, "height": SIZE})
        pictures[f"{image_id}.jpg"] = jpeg(SIZE, SIZE, seed=image_id)
        for _ in range(5):
            side = int(generator.choice([12, 50, 110]))
            x, y = (int(value) for value in generator.integers(0, SIZE - side, 2))
            category = int(generator.integers(1, 4))
            mask = box_mask(x, y, side, side, (SIZE, SIZE))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0, "area": side**2,
                 "bbox": [x, y, side, side], "segmentation": rle(mask)}
            )  # fmt: skip
            for _ in range(int(generator.integers(0, 3))):
                shift = int(generator.integers(0, max(2, side // 4)))
                found = box_mask(min(x + shift, SIZE - side), y, side, side, (SIZE, SIZE))
                results.append(
                    {"image_id": image_id, "category_id": category if generator.random() < 0.9 else 1,
                     "score": float(generator.random()), "segmentation": encode_rle(found)}
                )  # fmt: skip
    categories = [{"id": i, "name": str(i), "frequency": "rcf"[i - 1]} for i in (1, 2, 3)]
    path, folder = write_coco(tmp_path, images, annotations, pictures)
    path.write_text(json.dumps({**json.loads(path.read_text()), "categories": categories}))
    return path, folder, results


def reference(path, results, image_ids, use_categories=True, max_detections=(1, 10, 100)):
    truth = COCO(str(path))
    evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), "segm")
    evaluation.params.imgIds, evaluation.params.useCats = image_ids, int(use_categories)
    evaluation.params.maxDets = list(max_detections)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_pycocotools(tmp_path, seed):
    path, _, results = truth_and_results(tmp_path, seed)
    scores = average_precision(path, results, list(range(1, 9)))
    precision = reference(path, results, list(range(1, 9)))["precision"]
    for place, size in enumerate(("all", "small", "medium", "large")):
        values = precision[:, :, :, place, -1]
        assert scores[f"AP {size}"] == pytest.approx(values[values > -1].mean(), abs=1e-12)
    assert scores["AP50"] == pytest.approx(precision[0, :, :, 0, -1].mean(), abs=1e-12)


def test_average_precision_that_is_known(tmp_path):
    """Perfect masks give 1. With half of them missing, precision is 1 up to recall 1/2 and 0 beyond: 51 of 101 points."""
    path, _, _ = truth_and_results(tmp_path)
    annotations = json.loads(path.read_text())["annotations"]
    one_category = [{**a, "category_id": 1} for a in annotations]
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": one_category}))
    results = [
        {"image_id": a["image_id"], "category_id": 1, "score": 0.9, "segmentation": a["segmentation"]}
        for a in one_category
    ]
    assert average_precision(path, results, list(range(1, 9)))["AP all"] == pytest.approx(1.0)
    half = average_precision(path, results[: len(results) // 2], list(range(1, 9)))
    assert half["AP all"] == pytest.approx(51 / 101)


def test_only_the_pictures_of_the_run_count(tmp_path):
    path, _, results = truth_and_results(tmp_path)
    scores = average_precision(path, results, [1, 2, 3])
    precision = reference(path, results, [1, 2, 3])["precision"][:, :, :, 0, -1]
    assert scores["AP all"] == pytest.approx(precision[precision > -1].mean(), abs=1e-12)


def test_lvis_scores_by_frequency(tmp_path):
    path, _, results = truth_and_results(tmp_path)
    content = json.loads(path.read_text())
    for image in content["images"]:
        present = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = sorted({1, 2, 3} - present)
        image["not_exhaustive_category_ids"] = []
    path.write_text(json.dumps(content))
    scores = average_precision(path, results, list(range(1, 9)), lvis=True)
    # Every category of every picture is annotated, so LVIS's rules leave nothing out, and COCO's numbers must come out.
    precision = reference(path, results, list(range(1, 9)), max_detections=(300,))["precision"][:, :, :, 0, -1]
    assert scores["AP all"] == pytest.approx(precision.mean(), abs=1e-12)
    for category, name in enumerate(("rare", "common", "frequent")):
        assert scores[f"AP {name}"] == pytest.approx(precision[:, :, category].mean(), abs=1e-12)


def test_average_recall_equals_pycocotools(tmp_path):
    path, _, results = truth_and_results(tmp_path)
    annotations = json.loads(path.read_text())["annotations"]
    records = [
        {
            "picture": str(image_id),
            "targets": [{k: a[k] for k in ("segmentation", "area", "iscrowd")} for a in annotations if a["image_id"] == image_id],
            "predictions": [{k: r[k] for k in ("segmentation", "score")} for r in results if r["image_id"] == image_id],
        }
        for image_id in range(1, 9)
    ]  # fmt: skip
    scores = average_recall(records)
    recall = reference(path, results, list(range(1, 9)), use_categories=False, max_detections=[1000])["recall"]
    for place, size in enumerate(("all", "small", "medium", "large")):
        assert scores[f"AR@1000 {size}"] == pytest.approx(recall[:, 0, place, 0].mean(), abs=1e-12)


def test_pictures_without_masks_or_predictions(tmp_path):
    target = {"segmentation": rle(box_mask()), "area": 80, "iscrowd": 0}
    records = [
        {"picture": "a", "targets": [target], "predictions": []},
        {"picture": "b", "targets": [], "predictions": [{"segmentation": rle(box_mask()), "score": 0.5}]},
        {"picture": "c", "targets": [], "predictions": []},
    ]
    assert average_recall(records)["AR@1000 all"] == 0.0


def test_detector_boxes(promptable, tmp_path):
    path, folder, _ = truth_and_results(tmp_path)
    dataset = load_dataset(path, images=folder, limit=3)
    boxes = [
        {"image_id": 1, "category_id": 2, "bbox": [10, 10, 50, 60], "score": 0.8},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20], "score": 0.4},
        {"image_id": 77, "category_id": 1, "bbox": [0, 0, 20, 20], "score": 0.4},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    work = DetectorBoxes(tmp_path / "boxes.json", dataset.ids)
    assert work.num_other == 1
    sample = dataset[0]
    (encoded,) = promptable.encode([sample.image])
    records = work(promptable, encoded, sample)
    assert [(r["image_id"], r["category_id"], r["score"]) for r in records] == [(1, 2, 0.8), (1, 1, 0.4)]
    assert records[0]["segmentation"]["size"] == [SIZE, SIZE]
    assert work(promptable, encoded, dataset[1]) == []


@pytest.mark.parametrize(
    "content", ["{", "{}", '[{"image_id": 1}]', '[{"image_id": 1, "category_id": 1, "bbox": [1], "score": 1}]']
)
def test_a_file_that_is_no_results_is_refused(tmp_path, content):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(ValueError, match=r"boxes\.json: (not a COCO results file|none of its 0 boxes)"):
        DetectorBoxes(tmp_path / "boxes.json", [1])


def test_boxes_of_other_pictures_alone_are_refused(tmp_path):
    (tmp_path / "boxes.json").write_text(
        json.dumps([{"image_id": 5, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}])
    )
    with pytest.raises(ValueError, match="none of its 1 boxes is of a picture of this dataset"):
        DetectorBoxes(tmp_path / "boxes.json", [1, 2])


def test_everything(promptable, dataset):
    sample = dataset[0]
    (record,) = Everything(points_per_side=3)(promptable, None, sample)
    assert len(record["targets"]) == len(sample.instances)
    assert record["predictions"]
    assert 0 <= average_recall([record])["AR@1000 all"] <= 1


def test_everything_mode_of_a_stretched_frame_is_refused(promptable, dataset):
    promptable.keeps_aspect = False  # as SAM 2's
    with pytest.raises(ValueError, match="everything mode takes SAM's frame"):
        Everything()(promptable, None, dataset[0])
