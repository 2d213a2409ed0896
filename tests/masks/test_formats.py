"""Label maps, YOLO lines and labelme's documents: read back as the tools that use them do."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageDraw

from samlight_hf.masks.files import coco_document, coco_text
from samlight_hf.masks.formats import label_map, labelme_document, polygons, yolo_lines
from samlight_hf.masks.results import GeneratedMasks, MaskResult
from samlight_hf.masks.rle import RunLengthMasks


needs_opencv = pytest.mark.skipif(find_spec("cv2") is None, reason="needs OpenCV, of the extra polygons")


def mask_of(text: str) -> np.ndarray:
    return np.array([[character == "#" for character in line] for line in text.split()])


RING = mask_of("###### #....# #.##.# #....# ######")  # a hole, and an island in it
NESTED = mask_of("########## #...#....# #...#.##.# #...#.##.# #...#....# ##########")  # two holes beside each other
TOUCHING = mask_of("##.. ##.. ..## ..##")  # at a corner
DOTS = mask_of("#..# .... .#..")
LINES = mask_of("##### ..... #.... #.... #....")
FULL = np.ones((3, 4), dtype=bool)


def random_masks(number: int) -> list[np.ndarray]:
    """Make masks of noise, from single pixels to single holes, and some with large parts."""
    random = np.random.default_rng(0)
    masks = [random.random(random.integers(1, 20, 2)) < share for share in (0.1, 0.5, 0.8, 0.95) for _ in range(number)]
    for _ in range(number):
        small = Image.fromarray(random.integers(0, 255, (9, 12), dtype=np.uint8))
        masks.append(np.asarray(small.resize((80, 60), Image.Resampling.BICUBIC)) > 127)
    return masks


def fill_as_labelme(rings: list, size: tuple[int, int]) -> np.ndarray:
    """Draw polygons as labelme's shape_to_mask does, and put them together: bool (H, W)."""
    image = Image.new("L", size)
    for ring in rings:
        ImageDraw.Draw(image).polygon([tuple(point) for point in ring], outline=1, fill=1)
    return np.asarray(image) > 0


def fill_as_ultralytics(line: str, size: tuple[int, int]) -> np.ndarray:
    """Read a line and draw its polygon as Ultralytics' verify_image_label and polygon2mask do: bool (H, W)."""
    import cv2

    numbers = line.split()[1:]
    assert len(numbers) >= 6 and len(numbers) % 2 == 0
    points = np.array(numbers, dtype=np.float32).reshape(-1, 2)
    assert points.min() >= 0 and points.max() <= 1
    image = np.zeros(size[::-1], dtype=np.uint8)
    cv2.fillPoly(image, np.asarray([points * np.array(size, dtype=np.float32)], dtype=np.int32), color=1)
    return image > 0


@needs_opencv
@pytest.mark.parametrize("mask", [RING, NESTED, TOUCHING, DOTS, LINES, FULL], ids=str)
def test_polygons_give_their_mask_back(mask):
    rings = polygons(mask)
    assert np.array_equal(fill_as_labelme([ring.tolist() for ring in rings], mask.shape[::-1]), mask)


@needs_opencv
def test_polygons_of_any_mask_give_it_back():
    for mask in random_masks(40):
        rings = polygons(mask)
        assert all(ring.shape[0] >= 3 and ring.shape[1] == 2 for ring in rings)
        assert np.array_equal(fill_as_labelme([ring.tolist() for ring in rings], mask.shape[::-1]), mask), mask


@needs_opencv
def test_polygons_are_one_for_each_connected_part_the_largest_first():
    assert [len(polygons(mask)) for mask in (RING, NESTED, TOUCHING, DOTS, LINES, FULL)] == [2, 2, 1, 3, 2, 1]
    assert polygons(FULL)[0].tolist() in ([[0.5, 0.5], [0.5, 2.5], [3.5, 2.5], [3.5, 0.5]],)
    assert np.ptp(polygons(RING)[0], axis=0).tolist() == [5, 4]
    assert polygons(np.zeros((3, 3), dtype=bool)) == []


@needs_opencv
def test_a_yolo_line_gives_its_mask_back():
    masks = [mask for mask in [RING, NESTED, TOUCHING, FULL, *random_masks(20)] if len(polygons(mask)) == 1]
    assert len(masks) > 20
    for mask in masks:
        (line,) = yolo_lines([mask], [7], mask.shape[::-1])
        assert line.startswith("7 ")
        assert np.array_equal(fill_as_ultralytics(line, mask.shape[::-1]), mask), mask


@needs_opencv
def test_parts_of_a_yolo_line_are_joined_by_thin_lines():
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:20, 5:20] = mask[25:35, 40:55] = mask[2, 50] = True
    (line,) = yolo_lines([mask], [0], (60, 40))
    filled = fill_as_ultralytics(line, (60, 40))
    assert filled[mask].all() and 20 <= (filled & ~mask).sum() <= 60


@needs_opencv
def test_yolo_lines_have_no_line_for_an_empty_mask_and_a_class_for_each():
    assert [line[:2] for line in yolo_lines([FULL, ~FULL, FULL], [0, 1, 2], (4, 3))] == ["0 ", "2 "]
    with pytest.raises(ValueError):
        yolo_lines([FULL], [0, 1], (4, 3))


@needs_opencv
def test_a_labelme_document_has_the_fields_of_its_schema():
    document = json.loads(json.dumps(labelme_document([RING, FULL], ["a", "b"], (6, 5), "photos/x.jpg")))
    assert {key: document[key] for key in document if key != "shapes"} == {
        "version": "5.5.0", "flags": {}, "imagePath": "photos/x.jpg", "imageData": None,
        "imageHeight": 5, "imageWidth": 6,
    }  # fmt: skip
    assert [(shape["label"], shape["group_id"]) for shape in document["shapes"]] == [("a", 0), ("a", 0), ("b", None)]
    keys = {"label", "points", "group_id", "description", "shape_type", "flags", "mask"}
    assert all(set(shape) == keys and shape["shape_type"] == "polygon" for shape in document["shapes"])
    rings = [shape["points"] for shape in document["shapes"] if shape["group_id"] == 0]
    assert np.array_equal(fill_as_labelme(rings, (6, 5)), RING)


def test_a_label_map_has_the_highest_score_where_masks_overlap():
    masks = np.zeros((3, 4, 6), dtype=bool)
    masks[0, :, :4] = masks[1, :, 2:] = masks[2, 1:3, 1:3] = True
    for given in (masks, list(masks), RunLengthMasks.from_masks(masks)):
        labels = label_map(given, [0.5, 0.9, 0.7])
        assert labels.dtype == np.uint16
        assert labels.tolist() == [[1, 1, 2, 2, 2, 2], [1, 3, 2, 2, 2, 2], [1, 3, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2]]
    assert label_map(masks, [1, 1, 1])[1].tolist() == [1, 1, 1, 1, 2, 2]  # of equal ones the first


def test_label_maps_of_no_mask_and_of_too_many():
    for none in (np.zeros((0, 2, 3), dtype=bool), RunLengthMasks.from_masks(np.zeros((0, 2, 3), dtype=bool))):
        assert label_map(none, []).tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="at least one mask"):
        label_map([], [])
    with pytest.raises(ValueError, match="1 scores and 2 masks"):
        label_map(np.zeros((2, 2, 3), dtype=bool), [1])
    with pytest.raises(ValueError, match="65,536 masks do not fit"):
        label_map(np.zeros((65_536, 1, 1), dtype=bool), np.zeros(65_536))
    assert label_map(np.ones((65_535, 1, 1), dtype=bool), np.arange(65_535)).tolist() == [[65_535]]


def test_without_opencv_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'pip install "samlight-hf\[polygons\]"'):
        polygons(FULL)


def results(num_masks: int, kind: type) -> GeneratedMasks | MaskResult:
    """Make results whose run lengths have every character that there is."""
    random = np.random.default_rng(num_masks)
    masks = random.random((num_masks, 300, 70)).cumsum(axis=1) % 50 < 25
    scores, boxes, points = (random.random((num_masks, width), dtype=np.float32) * 70 for width in (1, 4, 2))
    if kind is MaskResult:
        return MaskResult(masks, scores[:, 0], boxes)
    run_lengths = RunLengthMasks.from_masks(masks)
    return GeneratedMasks(run_lengths, scores[:, 0], boxes, boxes[:, 2], points, boxes[:, ::-1])


@pytest.mark.parametrize("kind", [GeneratedMasks, MaskResult])
@pytest.mark.parametrize("num_masks", [0, 1, 40])
def test_the_text_of_a_coco_document_is_its_json(kind, num_masks):
    result = results(num_masks, kind)
    for name in ("folder/cat.jpg", 'a "[]" \\ "annotations": [] é.png'):
        expected = json.dumps(coco_document(name, (70, 300), result))
        assert coco_text(name, (70, 300), result) == expected
        assert num_masks < 40 or "\\\\" in expected


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_the_text_of_a_coco_document_has_jsons_names_for_what_is_no_number(number):
    result = results(3, GeneratedMasks)
    result.stability_scores[1] = number
    assert coco_text("a.png", (70, 300), result) == json.dumps(coco_document("a.png", (70, 300), result))
