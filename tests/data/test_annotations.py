"""Test that annotations become instances with the right mask, or are refused for the right reason."""

import json
from collections import Counter

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from samlight_hf.data import SampleError, SkipReason, SkipReport
from samlight_hf.data.annotations import parse_instance, parse_instances
from samlight_hf.masks.rle import run_lengths

from .files import HEIGHT, WIDTH, annotation, box_mask, rle, uncompressed_rle


def parse(fields):
    return parse_instance(json.loads(json.dumps(fields)), WIDTH, HEIGHT)


def refused(fields, reason):
    with pytest.raises(SampleError) as raised:
        parse(fields)
    assert raised.value.reason == reason


def test_polygons_and_both_kinds_of_rle_give_the_same_mask():
    mask = box_mask(x=5, y=4, width=10, height=8)
    for segmentation in (rle(mask), uncompressed_rle(mask), [[5, 4, 15, 4, 15, 12, 5, 12]]):
        instance = parse({"id": 1, "segmentation": segmentation})
        np.testing.assert_array_equal(instance.mask(), mask)
        assert instance.area == 80
        assert instance.bbox_xywh == (5, 4, 10, 8)
        assert isinstance(instance.rle["counts"], bytes)


def test_several_polygons_are_one_mask():
    polygons = [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 12, 10, 12, 12, 10, 12]]
    expected = box_mask(0, 0, 4, 4) | box_mask(10, 10, 2, 2)
    np.testing.assert_array_equal(parse({"id": 1, "segmentation": polygons}).mask(), expected)


def test_annotated_fields_are_kept():
    instance = parse(
        annotation(7, bbox=[1, 2, 3.5, 4], area=11.5, iscrowd=1, category_id=3, point_coords=[[6.0, 5.0], [1.0, 1.0]])
    )
    assert instance.id == 7 and instance.is_crowd is True and instance.category_id == 3
    assert instance.bbox_xywh == (1, 2, 3.5, 4) and instance.area == 11.5 and instance.point_xy == (6, 5)
    plain = parse(annotation("x7"))
    assert (plain.id, plain.is_crowd, plain.category_id, plain.point_xy) == ("x7", False, None, None)


def test_box_and_area_without_extent_come_from_the_mask():
    instance = parse(annotation(bbox=[5, 4, 0, 8], area=0))
    assert instance.bbox_xywh == (5, 4, 10, 8) and instance.area == 80


RLE = rle(box_mask())
TOTAL = WIDTH * HEIGHT


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [WIDTH, HEIGHT], "counts": RLE["counts"]}, SkipReason.RLE_SIZE),
        ({"size": [HEIGHT + 1, WIDTH], "counts": RLE["counts"]}, SkipReason.RLE_SIZE),
        (rle(np.zeros((HEIGHT, WIDTH))), SkipReason.ZERO_AREA),
        ({"size": [HEIGHT, WIDTH], "counts": [TOTAL]}, SkipReason.ZERO_AREA),
        ({"size": [HEIGHT, WIDTH], "counts": RLE["counts"][:-1]}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": RLE["counts"] + "1"}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": "ä"}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": "~~"}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 50 + "0"}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": [TOTAL - 1]}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": [TOTAL + 5, -5]}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": [2**64, TOTAL - 2**64]}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": [3.5, TOTAL]}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH], "counts": []}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT, WIDTH]}, SkipReason.MALFORMED_RLE),
        ({"counts": RLE["counts"]}, SkipReason.MALFORMED_RLE),
        ({"size": [HEIGHT], "counts": RLE["counts"]}, SkipReason.MALFORMED_RLE),
        ([[1, 1, 9, 9]], SkipReason.TOO_FEW_POINTS),
        ([[1, 1, 9, 9], [2, 2]], SkipReason.TOO_FEW_POINTS),
        ([1, 1, 9, 9], SkipReason.TOO_FEW_POINTS),
        ([[1, 1, 9, 1, 9, 9], [2, 2, 8, 2, 8, 8, 5]], SkipReason.MALFORMED_ANNOTATION),
        ([[1, 1, 9, 1, 9, 9], "ring"], SkipReason.MALFORMED_ANNOTATION),
        ([[1, 1, 9, 1, 9, 9], [1, 1, 1e9, 1, 9, 9]], SkipReason.OUTSIDE),
        ([[]], SkipReason.TOO_FEW_POINTS),
        ([[1, 1, 9, 1, 9, 9, 4]], SkipReason.MALFORMED_ANNOTATION),
        ([[1, 1, 9, 1, 9, float("nan")]], SkipReason.MALFORMED_ANNOTATION),
        ([[1, 1, 9, 1, 9, 10**400]], SkipReason.MALFORMED_ANNOTATION),
        ([[1, 1, "9", 1, 9, 9]], SkipReason.MALFORMED_ANNOTATION),
        ([1, 1, 9, 1, 9, 9, 4], SkipReason.MALFORMED_ANNOTATION),
        ("mask.png", SkipReason.MALFORMED_ANNOTATION),
        ([[1, 1, 9, 1, 1e9, 9]], SkipReason.OUTSIDE),
        ([[1, 1, 9, 9, 5, 5]], SkipReason.ZERO_AREA),
        ([[-9, -9, -2, -9, -2, -2]], SkipReason.ZERO_AREA),
        ([], SkipReason.NO_MASK),
        (None, SkipReason.NO_MASK),
    ],
)
def test_masks_that_cannot_be_used(segmentation, reason):
    refused({"id": 1, "segmentation": segmentation}, reason)


@pytest.mark.parametrize("is_crowd", [2, "yes", [1]])
def test_whether_it_is_a_crowd_must_be_known(is_crowd):
    refused({**annotation(), "iscrowd": is_crowd}, SkipReason.MALFORMED_ANNOTATION)
    assert not parse({**annotation(), "iscrowd": None}).is_crowd and parse({**annotation(), "iscrowd": "1"}).is_crowd


SQUARE = [5, 4, 15, 4, 15, 12, 5, 12]  # box_mask()


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"segmentation": [SQUARE, [1, 1, 9, 9]]}, [SkipReason.STRAY_RING]),
        ({"segmentation": [[2, 2], SQUARE, [1, 1, 9, 9], []]}, [SkipReason.STRAY_RING] * 3),
        ({"segmentation": [[1, 1, 9, 9, 3], SQUARE]}, [SkipReason.STRAY_RING]),
        ({"segmentation": SQUARE}, [SkipReason.FLAT_POLYGON]),
        ({"bbox": []}, [SkipReason.BAD_BOX]),
        ({"bbox": [1, 2, 3]}, [SkipReason.BAD_BOX]),
        ({"bbox": [1, 2, 3, None]}, [SkipReason.BAD_BOX]),
        ({"bbox": "1 2 3 4"}, [SkipReason.BAD_BOX]),
        ({"bbox": [WIDTH, 2, 3, 3]}, [SkipReason.BAD_BOX]),
        ({"bbox": [-5, 2, 3, 3]}, [SkipReason.BAD_BOX]),
        ({"point_coords": [[WIDTH + 1, 3]]}, [SkipReason.BAD_POINT]),
        ({"point_coords": [3, 4]}, [SkipReason.BAD_POINT]),
        ({"category_id": "cat"}, [SkipReason.BAD_CATEGORY]),
        ({"category_id": 1.5}, [SkipReason.BAD_CATEGORY]),
        ({"category_id": {}, "bbox": []}, [SkipReason.BAD_CATEGORY, SkipReason.BAD_BOX]),
        ({"id": None}, [SkipReason.MISSING_ID]),
        ({"id": [1]}, [SkipReason.MISSING_ID]),
        ({}, []),
    ],
)
def test_a_bad_part_is_left_out_and_counted_and_the_mask_is_kept(fields, reasons):
    report = SkipReport()
    (instance,) = parse_instances([{**annotation(), **fields}], "sa_1", WIDTH, HEIGHT, report)
    np.testing.assert_array_equal(instance.mask(), box_mask())
    assert instance.bbox_xywh == (5, 4, 10, 8)
    assert instance.category_id is None and instance.point_xy is None
    assert instance.id == ("number 0" if "id" in fields else 1)
    assert {reason: skipped.count for reason, skipped in report.parts.items()} == Counter(reasons)
    assert not report.instances and not report.images


def test_numbers_as_text_or_with_a_point_are_numbers():
    for category_id in (3, "3", 3.0, " 3 "):
        assert parse(annotation(category_id=category_id)).category_id == 3
    assert parse(annotation(7.0)).id == 7 and isinstance(parse(annotation(7.0)).id, int)
    assert parse(annotation("7")).id == "7"


def test_an_annotation_that_is_refused_counts_once():
    report = SkipReport()
    assert parse_instances([{"segmentation": [[1, 1, 9, 9, 5, 5], [2, 2]]}], "sa_1", WIDTH, HEIGHT, report) == ()
    assert report.num_instances == 1 and not report.parts


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_agree_with_the_mask(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 80, 2)
    mask = rng.random((height, width)) < rng.choice([0.01, 0.5, 0.99])
    assert run_lengths(rle(mask)["counts"]).tolist() == uncompressed_rle(mask)["counts"]


def test_long_runs_agree_with_pycocotools():
    runs = [70_000, 3, 1_000_000, 90_000, 2, 1, 4_000_000, 5]
    size = [1000, sum(runs) // 1000]
    runs[-1] += size[0] * size[1] - sum(runs) if sum(runs) <= size[0] * size[1] else 0
    runs[0] -= sum(runs) - size[0] * size[1]
    encoded = coco_mask.frPyObjects({"size": size, "counts": runs}, *size)
    assert run_lengths(encoded["counts"]).tolist() == runs


def test_each_bad_annotation_is_counted_and_the_good_ones_stay_in_order():
    report = SkipReport()
    annotations = [annotation(3), annotation(1), annotation(3), 5, annotation(9, np.zeros((HEIGHT, WIDTH)))]
    instances = parse_instances(annotations, "sa_1", WIDTH, HEIGHT, report)
    assert [instance.id for instance in instances] == [3, 1]
    assert report.to_dict()["instances"] == {
        "annotation malformed": {"count": 1, "examples": ["sa_1, annotation number 3"]},
        "duplicate annotation id": {"count": 1, "examples": ["sa_1, annotation 3"]},
        "mask of zero area": {"count": 1, "examples": ["sa_1, annotation 9"]},
    }
    assert not report.images
