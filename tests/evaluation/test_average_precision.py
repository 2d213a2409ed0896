import copy
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samlight_hf import MaskGenerator, TileSettings
from samlight_hf.data import load_dataset
from samlight_hf.evaluation.average_precision import (
    DetectorBoxes,
    EverythingTask,
    average_precision,
    average_recall,
    check_annotations,
    precision,
    summarize_everything,
)
from samlight_hf.masks.rle import encode_rle
from tests.data.files import box_mask, jpeg, rle, write_coco


SIZE = 200


def truth_and_results(tmp_path, seed=0):
    """Eight images, three categories, and detections that are shifted, missing, double and of the wrong category."""
    generator = np.random.default_rng(seed)
    entries, annotations, results, images = [], [], [], {}
    for image_id in range(1, 9):
        entries.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": SIZE, "height": SIZE})
        images[f"{image_id}.jpg"] = jpeg(SIZE, SIZE, seed=image_id)
        for _ in range(5):
            side = int(generator.choice([12, 50, 110]))
            x, y = (int(value) for value in generator.integers(0, SIZE - side, 2))
            category = int(generator.integers(1, 4))
            mask = box_mask(x, y, side, side, (SIZE, SIZE))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0,
                 "area": side**2,
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
    path, folder = write_coco(tmp_path, entries, annotations, images)
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
    """Perfect masks give 1. With half of them missing, precision is 1 up to recall 1/2, then 0: 51 of 101 points."""
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


def test_only_the_images_of_the_run_count(tmp_path):
    path, _, results = truth_and_results(tmp_path)
    scores = average_precision(path, results, [1, 2, 3])
    precision = reference(path, results, [1, 2, 3])["precision"][:, :, :, 0, -1]
    assert scores["AP all"] == pytest.approx(precision[precision > -1].mean(), abs=1e-12)


def test_annotations_without_an_area_have_their_masks(tmp_path):
    path, _, results = truth_and_results(tmp_path)
    expected = average_precision(path, results, list(range(1, 9)))
    assert {"AP small", "AP medium", "AP large"} < expected.keys()
    content = json.loads(path.read_text())
    for place, annotation in enumerate(content["annotations"]):
        del annotation["area"]
        if place % 2:  # polygons too
            x, y, side, _ = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + side, y, x + side, y + side, x, y + side]]
    path.write_text(json.dumps(content))
    assert average_precision(path, results, list(range(1, 9))) == pytest.approx(expected)


def test_ids_that_are_text_or_zero(tmp_path):
    path, _, results = truth_and_results(tmp_path)
    expected = average_precision(path, results, list(range(1, 9)))
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in content["annotations"]:
        annotation |= {"id": annotation["id"] - 1, "image_id": f"image {annotation['image_id']}"}
    path.write_text(json.dumps(content))
    results = [{**result, "image_id": f"image {result['image_id']}"} for result in results]
    assert average_precision(path, results, [image["id"] for image in content["images"]]) == expected


@pytest.mark.parametrize(
    ("change", "lvis", "said"),
    [
        (lambda content: content.pop("categories"), False, "no categories"),
        (lambda content: content["categories"][0].pop("frequency"), True, "Leave out --lvis"),
        (lambda content: content["images"][0].pop("width"), False, "image 1 needs a width"),
        (lambda content: content["annotations"][1].pop("category_id"), False, "annotation 2 needs a category_id"),
        (lambda content: content["annotations"][1].pop("segmentation"), False, "annotation 2 needs .* a segmentation"),
        (lambda content: content["annotations"].clear(), False, "none of its annotations"),
        (
            lambda content: content["annotations"][1].update(segmentation=rle(box_mask())),
            False,
            "annotation 2 needs .*size disagrees with the image",
        ),
    ],
)
def test_annotations_that_ap_cannot_be_computed_of(tmp_path, change, lvis, said):
    path, _, _ = truth_and_results(tmp_path)
    check_annotations(path, [1, 2, 3], True)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        check_annotations(path, [1, 2, 3], lvis)


def test_annotations_that_the_dataset_reads_count_the_same(tmp_path):
    """AP uses what the reader keeps: flat polygons, stray rings, text for numbers, no ids, boxes."""
    path, _, _ = truth_and_results(tmp_path)
    content = json.loads(path.read_text())
    bad = []
    for number, each in enumerate(content["annotations"]):
        x, y, width, height = each["bbox"]
        square = [x, y, x + width, y, x + width, y + height, x, y + height]
        own = {"segmentation": (square, [square, [0, 0, 150, 150]], [[3, 3], square])[number % 3]}
        own |= {"category_id": str(each["category_id"]), "image_id": str(each["image_id"]), "bbox": []}
        bad.append({name: value for name, value in {**each, **own}.items() if name != "id"})
    bad += [{**bad[0], "id": 1}, {**bad[0], "id": 1}]  # an object of its own, and one that is in the file twice
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9, "segmentation": a["segmentation"]}
        for a in [*content["annotations"], content["annotations"][0]]
    ]
    path.write_text(json.dumps({**content, "annotations": bad}))
    assert average_precision(path, results, list(range(1, 9)))["AP all"] == pytest.approx(1.0)


def test_lvis_scores_by_frequency(tmp_path):
    path, _, results = truth_and_results(tmp_path)
    content = json.loads(path.read_text())
    for image in content["images"]:
        present = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = sorted({1, 2, 3} - present)
        image["not_exhaustive_category_ids"] = []
    path.write_text(json.dumps(content))
    scores = average_precision(path, results, list(range(1, 9)), lvis=True)
    # Every category of every image is annotated, so LVIS's rules leave nothing out, and the result equals COCO's.
    precision = reference(path, results, list(range(1, 9)), max_detections=(300,))["precision"][:, :, :, 0, -1]
    assert scores["AP all"] == pytest.approx(precision.mean(), abs=1e-12)
    for category, name in enumerate(("rare", "common", "frequent")):
        assert scores[f"AP {name}"] == pytest.approx(precision[:, :, category].mean(), abs=1e-12)


def test_lvis_takes_the_best_300_detections_of_an_image_whatever_their_category(tmp_path):
    """As LVIS's own code does: here 300 boxes of one category are before the only right one of another."""
    path, _, _ = truth_and_results(tmp_path)
    content = json.loads(path.read_text())
    truth = {**content["annotations"][0], "category_id": 1}
    for image in content["images"]:
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [2], []
    path.write_text(json.dumps({**content, "annotations": [truth]}))
    right = {"image_id": 1, "category_id": 1, "score": 0.1, "segmentation": truth["segmentation"]}
    others = [{**right, "category_id": 2, "score": 0.9}] * 299
    assert average_precision(path, [*others, right], [1], lvis=True)["AP all"] == pytest.approx(1.0)
    assert average_precision(path, [*others, others[0], right], [1], lvis=True)["AP all"] == 0.0
    assert average_precision(path, [*others, others[0], right], [1])["AP all"] == pytest.approx(1.0), "of COCO"


def test_average_recall_equals_pycocotools(tmp_path):
    path, _, results = truth_and_results(tmp_path)
    annotations = json.loads(path.read_text())["annotations"]
    records = [
        {
            "picture": str(image_id),
            "targets": [
                {k: a[k] for k in ("segmentation", "area", "iscrowd")}
                for a in annotations if a["image_id"] == image_id
            ],
            "predictions": [{k: r[k] for k in ("segmentation", "score")} for r in results if r["image_id"] == image_id],
        }
        for image_id in range(1, 9)
    ]  # fmt: skip
    scores = average_recall(records)
    recall = reference(path, results, list(range(1, 9)), use_categories=False, max_detections=[1000])["recall"]
    for place, size in enumerate(("all", "small", "medium", "large")):
        assert scores[f"AR@1000 {size}"] == pytest.approx(recall[:, 0, place, 0].mean(), abs=1e-12)


def test_images_without_masks_or_predictions(tmp_path):
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
        {"image_id": 2, "category_id": 1, "bbox": [9, 0, -3, 20], "score": 0.4},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    work = DetectorBoxes(tmp_path / "boxes.json", dataset.ids)
    assert work.num_other == work.num_empty == 1
    sample = dataset[0]
    (encoded,) = promptable.encode([sample.image])
    (record,) = work(promptable, encoded, sample)
    found = record["predictions"]
    assert record["image_id"] == 1
    assert [(r["image_id"], r["category_id"], r["score"]) for r in found] == [(1, 2, 0.8), (1, 1, 0.4)]
    assert found[0]["segmentation"]["size"] == [SIZE, SIZE]
    assert work(promptable, encoded, dataset[1]) == [{"image_id": 2, "predictions": []}]


def test_a_detectors_text_stands_for_numbers(promptable, tmp_path):
    """The image ids are those of the dataset, whose annotations COCOeval has."""
    path, folder, _ = truth_and_results(tmp_path)
    dataset = load_dataset(path, images=folder, limit=1)
    box = {"image_id": "1", "category_id": "2", "bbox": [10, 10, 50, 60], "score": "0.8"}
    (tmp_path / "boxes.json").write_text(json.dumps([box]))
    work = DetectorBoxes(tmp_path / "boxes.json", dataset.ids)
    (record,) = work(promptable, promptable.encode([dataset[0].image])[0], dataset[0])
    (found,) = record["predictions"]
    assert (found["image_id"], found["category_id"], found["score"]) == (1, 2, 0.8)
    assert average_precision(path, [found], dataset.ids)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"score": float("nan")}, "result 1 .*score nan"),
        ({"score": "high"}, "'high'"),
        ({"bbox": [0, 0, float("inf"), 1]}, "result 1 .*inf"),
        ({"category_id": "cat"}, "'cat'"),
    ],
)
def test_a_result_that_could_not_be_scored_is_refused(tmp_path, fields, said):
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}
    (tmp_path / "boxes.json").write_text(json.dumps([box, {**box, **fields}]))
    with pytest.raises(ValueError, match=rf"boxes\.json: .*{said}"):
        DetectorBoxes(tmp_path / "boxes.json", [1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a COCO results file, .*: .*cannot be read: not JSON"),
        ("{}", "none of its 0 boxes|not a COCO results file"),
        ('[{"image_id": 1}]', "not a COCO results file, .*: 'bbox' is missing"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1], "score": 1}]', "not a COCO results file"),
    ],
)
def test_a_file_that_is_no_results_is_refused(tmp_path, content, said):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(ValueError, match=rf"boxes\.json: ({said})"):
        DetectorBoxes(tmp_path / "boxes.json", [1])


def test_boxes_of_unknown_categories_are_counted_and_refused_alone(tmp_path):
    """A network's own labels, from 0, would give a low AP without a word."""
    path, _, _ = truth_and_results(tmp_path)
    known = check_annotations(path, [1, 2])
    boxes = [{"image_id": 1, "category_id": c, "bbox": [1, 1, 2, 2], "score": 1} for c in (0, 0, 1)]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    work = DetectorBoxes(tmp_path / "boxes.json", [1, 2], known)
    assert work.num_unknown == 2 and [category for category, _, _ in work.by_image["1"]] == [1]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes[:2]))
    with pytest.raises(ValueError, match="none of its 2 boxes of these images has a category .* such as 0"):
        DetectorBoxes(tmp_path / "boxes.json", [1, 2], known)


def test_boxes_of_other_images_alone_are_refused(tmp_path):
    (tmp_path / "boxes.json").write_text(
        json.dumps([{"image_id": 5, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}])
    )
    with pytest.raises(ValueError, match="none of its 1 boxes is of an image of this dataset"):
        DetectorBoxes(tmp_path / "boxes.json", [1, 2])


def test_everything(promptable, dataset):
    sample = dataset[0]
    (record,) = EverythingTask(points_per_side=3)(promptable, None, sample)
    assert len(record["targets"]) == len(sample.instances)
    assert record["predictions"]
    assert 0 <= average_recall([record])["AR@1000 all"] <= 1


def test_everything_in_crops_and_tiles(promptable, dataset):
    """The masks are those of a `MaskGenerator` with these settings, and another model gets a generator of its own."""
    sample, tiles = dataset[0], TileSettings(20, 8)
    task = EverythingTask(points_per_side=2, crops_n_layers=1, tiles=tiles)
    (record,) = task(promptable, None, sample)
    generator = MaskGenerator(promptable.model, promptable.processor, tiles=tiles)
    options = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    expected = generator(sample.image, points_per_crop=2, crops_n_layers=1, **options)
    found = [prediction["segmentation"] for prediction in record["predictions"]]
    assert found == expected.masks.to_coco()
    assert len(found) > len(generator(sample.image, points_per_crop=2, **options))
    (plain,) = EverythingTask(points_per_side=2)(promptable, None, sample)
    assert len(plain["predictions"]) < len(found)
    other = copy.deepcopy(promptable)
    with torch.no_grad():
        other.model.mask_decoder.mask_tokens.weight.mul_(-1)
    assert task(other, None, sample) != [record]


@pytest.mark.parametrize("setting", ["points_per_side", "crops_n_layers"])
def test_a_setting_that_cannot_be_is_refused_at_once(setting):
    with pytest.raises(ValueError, match="-1 must be"):
        EverythingTask(**{setting: -1})


def test_everything_mode_of_a_stretched_frame_is_refused(promptable, dataset):
    promptable.keeps_aspect = False  # like SAM 2's
    with pytest.raises(ValueError, match="everything mode takes SAM's frame"):
        EverythingTask()(promptable, None, dataset[0])


def rectangle(x1: int, y1: int, x2: int, y2: int) -> dict:
    mask = np.zeros((20, 20), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return encode_rle(mask)


def test_precision_counts_right_masks_and_how_scores_rank_them():
    """Two right masks (IoU 1 and 0.5), two wrong ones, one of which has a score between theirs; and an empty image."""
    target = {"segmentation": rectangle(0, 0, 10, 10), "area": 100, "iscrowd": 0}
    masks = {(0, 0, 10, 10): 0.9, (0, 0, 10, 5): 0.3, (10, 10, 20, 20): 0.5, (0, 15, 5, 20): 0.1}
    predictions = [{"segmentation": rectangle(*box), "score": score} for box, score in masks.items()]
    records = [
        {"picture": "a", "predictions": predictions, "targets": [target]},
        {"picture": "b", "predictions": [], "targets": [target]},
    ]
    assert precision(records) == {"masks per image": 2.0, "masks right@0.5": 0.5, "ranking AUC": 0.75}
    assert precision(records, min_iou=0.6) == {
        "masks per image": 2.0, "masks right@0.6": 0.25, "ranking AUC": 1.0,
    }  # fmt: skip
    assert set(summarize_everything(records)) > {"masks right@0.5", "AR@1000 all"}


def test_precision_leaves_out_what_is_not_defined():
    assert precision([]) == {}
    assert precision([{"picture": "a", "predictions": [], "targets": []}]) == {"masks per image": 0.0}
    wrong = {"picture": "a", "predictions": [{"segmentation": rectangle(0, 0, 2, 2), "score": 1.0}], "targets": []}
    assert precision([wrong]) == {"masks per image": 1.0, "masks right@0.5": 0.0}
