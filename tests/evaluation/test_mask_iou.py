"""IoU and boundary IoU against hand-computed cases, pycocotools and explicit erosion; the metric through `evaluate`."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from scipy import ndimage

from samlight_hf.evaluation.metrics import mask_iou as metric_folder
from samlight_hf.evaluation.metrics.mask_iou.iou import (
    boundary_iou,
    boundary_iou_matrix,
    mask_boundary,
    mask_iou,
    mask_iou_matrix,
)


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def coco_iou(predictions, references):
    return coco_mask.iou(list(map(encode, predictions)), list(map(encode, references)), [0] * len(references))


def random_masks(rng, count, height=None, width=None):
    """Blobs, noise, full and empty masks."""
    height, width = height or rng.integers(1, 120), width or rng.integers(1, 120)
    noise = rng.random((count, height, width))
    blobs = ndimage.gaussian_filter(noise, (0, 4, 4)) > 0.5
    masks = np.where(rng.random((count, 1, 1)) < 0.6, blobs, noise < rng.random((count, 1, 1)))
    masks[rng.random(count) < 0.1] = False
    masks[rng.random(count) < 0.1] = True
    return masks


def eroded_boundary(mask, ratio=0.02):
    """Compute the boundary by its definition: repeated 3x3 erosion, with background outside the image."""
    steps = max(1, round(ratio * np.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
    inner = mask
    for _ in range(steps):
        inner = ndimage.binary_erosion(inner, np.ones((3, 3)), border_value=0)
    return mask & ~inner


LIBRARIES = pytest.mark.parametrize("library", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


@LIBRARIES
def test_hand_computed_iou(library):
    prediction = library(np.array([[1, 1, 0], [1, 1, 0]], bool))
    reference = library(np.array([[0, 1, 1], [0, 0, 0]], bool))
    assert float(mask_iou(prediction, reference)) == 1 / 5
    assert float(mask_iou(prediction, prediction)) == 1
    assert float(mask_iou(prediction, ~prediction)) == 0


@LIBRARIES
def test_two_empty_masks_have_iou_zero_as_in_pycocotools(library):
    empty = np.zeros((4, 5), bool)
    assert coco_iou([empty], [empty]).item() == 0
    assert float(mask_iou(library(empty), library(empty))) == 0
    assert float(boundary_iou(library(empty), library(empty))) == 0
    assert mask_iou_matrix(library(empty[None]), library(empty[None])).tolist() == [[0]]


@LIBRARIES
@pytest.mark.parametrize("seed", range(15))
def test_iou_equals_pycocotools_exactly(library, seed):
    rng = np.random.default_rng(seed)
    masks = random_masks(rng, 12)
    predictions, references = masks[:7], masks[7:]
    expected = coco_iou(predictions, references)
    matrix = mask_iou_matrix(library(predictions), library(references))
    assert str(matrix.dtype).endswith("float64")
    np.testing.assert_array_equal(np.asarray(matrix), expected)
    np.testing.assert_array_equal(
        np.asarray(mask_iou(library(predictions[:5]), library(references))), expected.diagonal()
    )
    broadcast = mask_iou(library(predictions)[:, None], library(references)[None])
    np.testing.assert_array_equal(np.asarray(broadcast), expected)


@LIBRARIES
@pytest.mark.parametrize("seed", range(15))
def test_boundary_equals_repeated_erosion(library, seed):
    rng = np.random.default_rng(seed)
    masks = random_masks(rng, 8)
    for ratio in (0.02, 0.005, 0.1):
        expected = np.stack([eroded_boundary(mask, ratio) for mask in masks])
        np.testing.assert_array_equal(np.asarray(mask_boundary(library(masks), ratio)), expected)
        matrix = boundary_iou_matrix(library(masks[:4]), library(masks[4:]), ratio)
        np.testing.assert_array_equal(np.asarray(matrix), coco_iou(expected[:4], expected[4:]))
        pairs = boundary_iou(library(masks[:4]), library(masks[4:]), ratio)
        np.testing.assert_array_equal(np.asarray(pairs), np.asarray(matrix).diagonal())


def test_hand_computed_boundary_at_the_border_of_the_image():
    full = np.ones((30, 40), bool)  # diagonal 50, distance 1
    boundary = mask_boundary(full)
    assert boundary.sum() == 30 * 40 - 28 * 38
    assert boundary[0].all() and not boundary[1, 1:-1].any()
    assert mask_boundary(full, 0.06).sum() == 30 * 40 - 24 * 34  # distance 3
    # With a window as large as the image one pixel is left inside, and none with a larger one.
    assert mask_boundary(np.ones((3, 3), bool)).sum() == 8
    assert mask_boundary(np.ones((2, 3), bool)).all()


def test_boundary_iou_sees_what_iou_forgives():
    reference, prediction = np.zeros((2, 100, 100), bool)
    reference[10:90, 10:90] = True  # distance 3 from a diagonal of 141
    prediction[12:92, 10:90] = True
    ring = 80**2 - 74**2
    # Left and right, 3 columns each, 78 rows are in both; of the upper edges and of the lower ones, 1 row each.
    shared = 2 * 3 * 78 + 2 * 74
    assert boundary_iou(prediction, reference) == shared / (2 * ring - shared)
    assert mask_iou(prediction, reference) == 78 / 82


def test_column_major_masks_and_inputs_left_alone():
    masks = random_masks(np.random.default_rng(0), 6, 50, 70)
    column_major = np.ascontiguousarray(masks.transpose(0, 2, 1)).transpose(0, 2, 1)
    before = masks.copy()
    np.testing.assert_array_equal(mask_iou(column_major[:3], masks[3:]), mask_iou(masks[:3], masks[3:]))
    np.testing.assert_array_equal(mask_boundary(column_major), mask_boundary(masks))
    np.testing.assert_array_equal(column_major, before)


@LIBRARIES
def test_no_masks_give_no_values(library):
    none, two = library(np.zeros((0, 5, 6), bool)), library(np.zeros((2, 5, 6), bool))
    assert tuple(mask_iou(none, none).shape) == (0,)
    assert tuple(mask_iou_matrix(none, two).shape) == (0, 2)
    assert tuple(boundary_iou_matrix(two, none).shape) == (2, 0)


def test_counts_stay_exact_where_float32_is_not():
    masks = np.ones((1, 4100, 4100), bool)  # more than 2**24 pixels
    other = masks.copy()
    other[0, 0, 0] = False
    assert mask_iou_matrix(masks, other)[0, 0] == (4100**2 - 1) / 4100**2


def test_autocast_does_not_round_the_counts():
    masks = torch.from_numpy(random_masks(np.random.default_rng(1), 6, 90, 70))
    with torch.autocast("cpu", torch.bfloat16):
        inside = mask_iou_matrix(masks, masks)
    assert torch.equal(inside, mask_iou_matrix(masks, masks))


@pytest.mark.parametrize(
    ("prediction", "reference", "words"),
    [
        (np.zeros((4, 5), bool), np.zeros((5, 4), bool), "(4, 5)"),
        (np.zeros((4, 5)), np.zeros((4, 5), bool), "float64"),
        (torch.zeros(4, 5), torch.zeros(4, 5).bool(), "float32"),
        (np.zeros((4, 5), bool), torch.zeros(4, 5).bool(), "both"),
        ([[True]], [[True]], "list"),
        (np.zeros(5, bool), np.zeros(5, bool), "(..., H, W)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(prediction, reference, words):
    for function in (mask_iou, boundary_iou, mask_iou_matrix, boundary_iou_matrix):
        with pytest.raises(ValueError) as raised:
            function(prediction, reference)
        assert words in str(raised.value)


def test_other_arguments_that_are_refused():
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        mask_iou_matrix(np.zeros((4, 5), bool), np.zeros((4, 5), bool))
    for ratio in (0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="dilation_ratio"):
            mask_boundary(np.zeros((4, 5), bool), ratio)


@pytest.mark.gpu
def test_cuda_equals_numpy():
    masks = random_masks(np.random.default_rng(2), 8, 200, 150)
    tensors = torch.from_numpy(masks).cuda()
    for function in (mask_iou, boundary_iou, mask_iou_matrix, boundary_iou_matrix):
        result = function(tensors[:4], tensors[4:])
        np.testing.assert_array_equal(result.cpu().numpy(), function(masks[:4], masks[4:]))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load the metric from a copy of its folder, where it cannot import the package's files."""
    evaluate = pytest.importorskip("evaluate")
    folder = tmp_path_factory.mktemp("metrics") / "mask_iou"
    shutil.copytree(metric_folder.PATH, folder)
    cache = str(tmp_path_factory.mktemp("cache"))
    return lambda **options: evaluate.load(str(folder), cache_dir=cache, **options)


def test_the_metric_takes_all_kinds_of_masks(load):
    rng = np.random.default_rng(3)
    predictions, references = random_masks(rng, 4, 40, 50), random_masks(rng, 4, 40, 50)
    expected = coco_iou(predictions, references).diagonal().tolist()
    metric = load()
    assert metric.name == "mask_iou"
    text = [{**rle, "counts": rle["counts"].decode()} for rle in map(encode, references)]
    runs = [{"size": [40, 50], "counts": _runs(mask)} for mask in predictions]
    for given in (
        (predictions, references),
        (predictions.tolist(), references.astype(int).tolist()),
        (torch.from_numpy(predictions), torch.from_numpy(references).float()),
        (list(map(encode, predictions)), text),
        (runs, references),
    ):
        result = metric.compute(predictions=given[0], references=given[1], per_instance=True)
        assert result["ious"] == expected
        assert result["boundary_ious"] == boundary_iou(predictions, references).tolist()
        assert result["mean_iou"] == np.mean(expected)
        assert result["boundary_iou"] == np.mean(result["boundary_ious"])


def _runs(mask):
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def test_batches_and_single_masks_of_any_size_add_up(load):
    rng = np.random.default_rng(4)
    images = [random_masks(rng, 6) for _ in range(5)]
    metric = load()
    for masks in images[:4]:
        metric.add_batch(predictions=masks[:3], references=masks[3:])
    metric.add_batch(predictions=[], references=[])
    for prediction, reference in zip(images[4][:3], images[4][3:]):
        metric.add(prediction=prediction, reference=reference)
    result = metric.compute(per_instance=True)
    expected = [iou for masks in images for iou in coco_iou(masks[:3], masks[3:]).diagonal()]
    assert result["ious"] == expected and result["num_instances"] == 15


def test_means_by_the_size_of_the_reference(load):
    def square(side):
        mask = np.zeros((120, 120), bool)
        mask[:side, :side] = True
        return mask

    sides = [31, 32, 95, 96, 0]
    references = [square(side) for side in sides]
    predictions = [square(31), square(16), square(95), square(48), square(5)]
    result = load().compute(predictions=predictions, references=references, boundary=False, per_instance=True)
    assert result["areas"] == [961, 1024, 9025, 9216, 0]
    assert result["ious"] == [1, 0.25, 1, 0.25, 0]
    assert (result["mean_iou_small"], result["num_small"]) == (0.5, 2)
    assert (result["mean_iou_medium"], result["num_medium"]) == (0.625, 2)
    assert (result["mean_iou_large"], result["num_large"]) == (0.25, 1)
    assert (result["mean_iou"], result["num_instances"], result["num_empty_references"]) == (0.5, 5, 1)
    assert "boundary_iou" not in result and "boundary_ious" not in result


def test_sizes_without_instances_have_no_mean(load):
    mask = [[1, 1], [0, 0]]
    result = load().compute(predictions=[mask], references=[mask])
    assert result["mean_iou_large"] is None and result["num_large"] == 0
    assert "ious" not in result


GOOD = np.zeros((5, 6))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((5, 7)), "[5, 7]"),
        (np.full((5, 6), 0.3), "threshold"),
        (np.full((5, 6), np.nan), "threshold"),
        ([[1, 0], [1]], "different lengths"),
        (np.zeros((1, 5, 6)), "(1, 5, 6)"),
        (None, "shape ()"),
        ({"size": [5, 6], "counts": "0"}, "add up"),
        ({"size": [5, 6], "counts": "0n0oooo"}, "add up"),
        ({"size": [4, 6], "counts": "0n0"}, "add up"),
        ({"size": [6, 6], "counts": "0n0"}, "add up"),
        ({"size": [5, 6], "counts": ""}, "add up"),
        ({"size": [5, 6], "counts": "~"}, "add up"),
        ({"size": [5, 6], "counts": [29]}, "add up"),
        ({"size": [5, 6], "counts": [35, -5]}, "Not a COCO RLE"),
        ({"size": [5, 6]}, "Not a COCO RLE"),
        ({"counts": "0n0"}, "Not a COCO RLE"),
    ],
)
def test_the_metric_refuses_what_it_cannot_compare(load, mask, words):
    metric = load()
    with pytest.raises(ValueError) as raised:
        metric.add_batch(predictions=[mask], references=[GOOD])
    assert words in str(raised.value)
    assert metric.compute(predictions=[GOOD], references=[GOOD])["num_instances"] == 1


def test_one_pixel_rle(load):
    rle = encode(np.ones((1, 1)))
    assert load().compute(predictions=[rle], references=[rle])["mean_iou"] == 1


def test_the_metric_refuses_unequal_numbers_and_nothing(load):
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        load().compute(predictions=[GOOD], references=[GOOD, GOOD])
    with pytest.raises(ValueError):
        load().compute(predictions=[], references=[])


def test_the_functions_need_nothing_but_numpy():
    code = "import sys, iou; print([m for m in ('torch', 'evaluate', 'datasets', 'pycocotools') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=metric_folder.PATH
    )
    assert result.stdout.strip() == "[]"
