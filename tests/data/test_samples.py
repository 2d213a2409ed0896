"""Test that samples decode their masks, and that reports merge to the same counts in any order."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import samlight_hf
from samlight_hf import data
from samlight_hf.data import ImageDataset, Instance, Sample, SampleError, SkipReason, SkipReport

from .files import HEIGHT, WIDTH, box_mask, rle


def instance(mask, **fields):
    return Instance(1, rle(mask), (0.0, 0.0, 1.0, 1.0), 1.0, **fields)


@pytest.mark.parametrize("kind", [str, bytes])
def test_an_instance_decodes_its_mask(kind):
    mask = box_mask()
    encoded = rle(mask)
    encoded["counts"] = kind(encoded["counts"], "ascii") if kind is bytes else encoded["counts"]
    decoded = Instance(1, encoded, (5.0, 4.0, 10.0, 8.0), 80.0).mask()
    assert decoded.dtype == bool and decoded.shape == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(decoded, mask)


def test_a_sample_decodes_all_masks():
    masks = [box_mask(x=1), box_mask(x=20, width=3)]
    image = Image.new("RGB", (WIDTH, HEIGHT))
    sample = Sample("a", image, tuple(map(instance, masks)), WIDTH, HEIGHT)
    np.testing.assert_array_equal(sample.masks(), np.stack(masks))
    assert sample.masks().dtype == bool
    assert Sample("b", image, (), WIDTH, HEIGHT).masks().shape == (0, HEIGHT, WIDTH)


def report(images, instances):
    result = SkipReport()
    for reason, example in images:
        result.add_image(reason, example)
    for reason, example in instances:
        result.add_instances(reason, example)
    return result


def test_merging_gives_the_same_in_any_order():
    images = [(SkipReason.BROKEN_IMAGE, f"image {i}") for i in range(9)] + [(SkipReason.MISSING_JSON, "x")]
    instances = [(SkipReason.ZERO_AREA, f"annotation {i % 3}") for i in range(7)]
    whole = report(images, instances)
    first, second = report(images[:4], instances[5:]), report(images[4:], instances[:5])
    there = report([], []).merge(first).merge(second)
    back = report([], []).merge(second).merge(first)
    assert there == back == whole
    assert (whole.num_images, whole.num_instances) == (10, 7)
    assert whole.images[SkipReason.BROKEN_IMAGE].examples == [f"image {i}" for i in range(5)]


def test_a_merged_report_shares_nothing_with_its_parts():
    part = report([(SkipReason.MISSING_JSON, "a")], [])
    whole = SkipReport().merge(part)
    whole.add_image(SkipReason.MISSING_JSON, "b")
    assert part.num_images == 1


def test_a_report_survives_json():
    original = report([(SkipReason.MISSING_JSON, "a"), ("a reason of one's own", "b")], [(SkipReason.RLE_SIZE, "c")])
    assert SkipReport.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    assert original.to_dict()["instances"] == {"RLE size disagrees with the image": {"count": 1, "examples": ["c"]}}


def test_parts_of_instances_are_no_skipped_instances():
    skipped = SkipReport()
    skipped.add_part(SkipReason.BAD_BOX, "sa_1", 2)
    copy = SkipReport.from_dict(json.loads(json.dumps(skipped.to_dict())))
    assert copy == skipped and skipped and skipped.num_instances == skipped.num_images == 0
    assert SkipReport().merge(skipped).merge(copy).parts[SkipReason.BAD_BOX].count == 4
    assert skipped.summary().splitlines() == [
        "Skipped 0 images and 0 instances, and parts of 2:",
        f"  2 parts: {SkipReason.BAD_BOX} (sa_1, ...)",
    ]
    earlier = {"pictures": {}, "instances": {"x": {"count": 1, "examples": ["a"]}}}  # a report written without parts
    assert SkipReport.from_dict(earlier).num_instances == 1


def test_more_than_five_percent_are_too_many():
    five = report([(SkipReason.MISSING_JSON, str(i)) for i in range(5)], [])
    assert not five.too_many(100)
    assert five.too_many(99)
    assert not SkipReport().too_many(0)


def test_the_summary_has_counts_reasons_and_examples():
    skipped = report([(SkipReason.BROKEN_IMAGE, f"sa_{i}") for i in range(6)], [(SkipReason.ZERO_AREA, "sa_9")])
    lines = skipped.summary(100).splitlines()
    assert lines[0].startswith("WARNING") and "5%" in lines[0]
    assert lines[1:] == [
        "Skipped 6 of 100 images (6.0%) and 1 instance:",
        "  6 images: image damaged or truncated (sa_0, sa_1, sa_2, sa_3, sa_4, ...)",
        "  1 instance: mask of zero area (sa_9)",
    ]
    assert skipped.summary(1000).startswith("Skipped 6 of 1000")
    assert skipped.summary().startswith("Skipped 6 images and 1 instance")
    assert SkipReport().summary(5) == "Nothing was skipped."


def test_errors_cross_process_borders():
    error = pickle.loads(pickle.dumps(SampleError(SkipReason.BROKEN_IMAGE, "sa_1")))
    assert (error.reason, error.where) == (SkipReason.BROKEN_IMAGE, "sa_1")
    assert str(error) == "sa_1: image damaged or truncated"


def test_the_old_name_of_the_base_class_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match="PictureDataset is now called ImageDataset"):
        from samlight_hf.data import PictureDataset
    assert PictureDataset is ImageDataset
    assert not any("Picture" in name for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pictures'"):
        _ = data.Pictures


def test_the_readers_import_nothing_optional():
    """pycocotools is imported when masks are decoded. An empty samlight_hf module avoids importing transformers."""
    code = (
        "import sys, types; package = sys.modules['samlight_hf'] = types.ModuleType('samlight_hf'); "
        f"package.__path__ = {list(samlight_hf.__path__)}; import samlight_hf.data; "
        "print([m for m in ('torch', 'evaluate', 'datasets', 'pycocotools') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
