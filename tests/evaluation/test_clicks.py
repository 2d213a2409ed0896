from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from samlight_hf.data import clicks
from samlight_hf.data.clicks import deepest_of, deepest_point, deepest_point_reference
from samlight_hf.evaluation import clicks as clicks_module
from samlight_hf.evaluation.clicks import next_click, next_clicks
from samlight_hf.kernels.deepest_pixels import deepest_pixels_reference


PHOTOGRAPHS = Path(__file__).parents[2] / "examples" / "images"


def brute_force_depth(mask: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to the nearest one outside the mask or outside the image."""
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    depth = np.zeros(mask.shape)
    for row, column in np.argwhere(mask):
        depth[row, column] = np.sqrt(((outside - (row + 1, column + 1)) ** 2).sum(1)).min()
    return depth


@pytest.mark.parametrize("seed", range(20))
def test_deepest_point_by_brute_force(seed):
    generator = np.random.default_rng(seed)
    mask = generator.random((17, 23)) < generator.uniform(0.05, 1.0)
    depth = brute_force_depth(mask)
    (x, y), found = deepest_point(mask)
    assert found == pytest.approx(depth.max())
    assert depth[y, x] == pytest.approx(depth.max())
    assert (y, x) == np.unravel_index(np.argmax(depth), depth.shape)


def test_the_border_of_the_image_is_outside():
    """Without padding, the deepest point of an image-filling mask would be anywhere; with it, the middle."""
    assert deepest_point(np.ones((5, 9), bool)) == ((2, 2), 3.0)


def test_a_hole_is_not_clicked():
    """The center of the box, (x1 + x2) / 2, lies in the hole of a ring; the click does not."""
    mask = np.zeros((21, 21), bool)
    mask[2:19, 2:19] = True
    mask[6:15, 6:15] = False
    (x, y), _ = deepest_point(mask)
    assert mask[y, x]
    assert not mask[10, 10]


def test_empty_mask():
    assert deepest_point(np.zeros((4, 5), bool)) == ((0, 0), 0.0)


def test_next_click_goes_to_the_larger_error():
    target = np.zeros((20, 20), bool)
    target[5:15, 5:15] = True
    predicted = target.copy()
    predicted[5:15, 5:12] = False  # 7 columns missing
    predicted[0:3, 0:3] = True  # 3x3 excess
    (x, y), label = next_click(predicted, target)
    assert label == 1
    assert target[y, x] and not predicted[y, x]
    predicted = target.copy()
    predicted[0:5, 0:20] = True
    (x, y), label = next_click(predicted, target)
    assert label == 0
    assert predicted[y, x] and not target[y, x]


def test_next_click_on_a_perfect_mask_confirms_it():
    target = np.zeros((9, 9), bool)
    target[2:7, 2:7] = True
    assert next_click(target, target) == ((4, 4), 1)


def smooth(generator: np.random.Generator, size: tuple[int, int], sigma: float) -> np.ndarray:
    return gaussian_filter(generator.normal(size=size), sigma) > 0


def masks_of_every_size(seed: int) -> list[np.ndarray]:
    """Blobs, bands along their contours, rectangles with many equally deep pixels, discs and noise."""
    generator = np.random.default_rng(seed)
    size = tuple(generator.integers(1, 300, 2))
    blob = smooth(generator, size, generator.uniform(1, 25))
    band = blob ^ np.roll(blob, generator.integers(1, 5), axis=generator.integers(2))
    rectangles = np.zeros(size, bool)
    for _ in range(3):
        (top, bottom), (left, right) = (sorted(generator.integers(0, length + 1, 2)) for length in size)
        rectangles[top:bottom, left:right] ^= True
    y, x = np.mgrid[: size[0], : size[1]]
    disc = np.hypot(y - size[0] / 2, x - size[1] / 3) < generator.uniform(1, min(size))
    return [blob, band, rectangles, disc, generator.random(size) < generator.uniform(0.05, 1)]


@pytest.mark.parametrize("seed", range(25))
def test_the_fast_search_finds_the_pixel_of_the_slow_one(seed):
    for mask in masks_of_every_size(seed):
        assert deepest_point(mask) == deepest_point_reference(mask)
        assert deepest_point(np.asfortranarray(mask)) == deepest_point_reference(mask)


def test_the_same_pixel_in_regions_of_photographs():
    for path in sorted(PHOTOGRAPHS.glob("*.jpg")):
        gray = gaussian_filter(np.asarray(Image.open(path).convert("L"), dtype=float), 2)
        for low in (0, 64, 128, 192):
            mask = (gray >= low) & (gray < low + 64)
            assert deepest_point(mask) == deepest_point_reference(mask)


@pytest.mark.parametrize("name", ["small box", "neighbours", "boundary", "all depths"])
def test_which_way_is_taken(name, monkeypatch):
    """Masks of each kind are measured in the way made for them, and only that one."""
    y, x = np.mgrid[:300, :300]
    disc = np.hypot(y - 150, x - 150) < 100
    comb = np.zeros((300, 300), bool)
    comb[:, np.arange(300) % 30 > 0] = True  # ten strips, all of whose middle lines are equally deep
    mask = {"small box": disc[60:100, 60:100], "neighbours": disc ^ (np.hypot(y - 150, x - 150) < 95)}.get(name, disc)
    mask = comb if name == "all depths" else mask
    taken = []
    for function, title in (("_by_neighbours", "neighbours"), ("_by_boundary", "boundary")):
        own = getattr(clicks._Inside, function)
        monkeypatch.setattr(clicks._Inside, function, lambda self, own=own, t=title: taken.append(t) or own(self))
    measured = clicks._all_squared_depths
    monkeypatch.setattr(clicks, "_all_squared_depths", lambda mask: taken.append("all depths") or measured(mask))
    assert deepest_point(mask) == deepest_point_reference(mask)
    expected = {"small box": ["all depths"], "all depths": ["boundary", "all depths"]}
    assert taken == expected.get(name, [name])


def test_of_equally_deep_masks_the_first():
    mask = np.zeros((20, 30), bool)
    mask[4:9, 4:9] = True
    other = np.roll(mask, 10, axis=1)
    assert deepest_of([mask, other]) == (0, (6, 6), 3.0)
    assert deepest_of([other, mask]) == (0, (16, 6), 3.0)
    assert deepest_of([np.zeros_like(mask), mask]) == (1, (6, 6), 3.0)
    larger = np.ones((9, 9), bool)
    assert deepest_of([mask, larger]) == (1, (4, 4), 5.0)


def next_click_reference(predicted: np.ndarray, target: np.ndarray) -> tuple[tuple[int, int], int]:
    missing, excess = deepest_point_reference(target & ~predicted), deepest_point_reference(predicted & ~target)
    if max(missing[1], excess[1]) == 0:
        return deepest_point_reference(target)[0], 1
    return (missing[0], 1) if missing[1] >= excess[1] else (excess[0], 0)


def predictions_and_targets(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks (12, H, W): blobs and predictions that differ in every kind of way, and empty ones of each."""
    generator = np.random.default_rng(seed)
    targets = np.stack([smooth(generator, (150, 210), 12) & smooth(generator, (150, 210), 20) for _ in range(12)])
    predicted = np.stack([np.roll(mask, generator.integers(-9, 9, 2), (0, 1)) for mask in targets])
    predicted[:4] ^= smooth(generator, (150, 210), 5)
    predicted[4], predicted[5], targets[6] = False, targets[5], False
    targets[7] = predicted[7] = False
    return predicted, targets


@pytest.mark.parametrize("seed", range(3))
def test_clicks_of_all_instances_are_those_of_each(seed):
    predicted, targets = predictions_and_targets(seed)
    points, labels = next_clicks(torch.from_numpy(predicted), torch.from_numpy(targets))
    found = [((x, y), label) for (x, y), label in zip(points.tolist(), labels.tolist())]
    assert found == [next_click_reference(*pair) for pair in zip(predicted, targets)]
    assert {0, 1} == set(labels.tolist())


def test_no_instances():
    points, labels = next_clicks(torch.zeros(0, 4, 5, dtype=torch.bool), torch.zeros(0, 4, 5, dtype=torch.bool))
    assert points.shape == (0, 2) and labels.shape == (0,)


def test_clicks_that_are_computed_at_once(monkeypatch):
    """On a CPU, with the kernels' reference in their place: small masks, of which one is right."""
    monkeypatch.setattr(clicks_module, "launch_deepest_pixels", deepest_pixels_reference)
    predicted, targets = (torch.from_numpy(masks[:, ::7, ::9].copy()) for masks in predictions_and_targets(0))
    found = clicks_module._next_clicks_at_once(predicted, targets)
    assert all(torch.equal(*pair) for pair in zip(found, next_clicks(predicted, targets), strict=True))
    is_right = (predicted == targets).flatten(1).all(dim=1)
    assert (is_right & targets.flatten(1).any(dim=1)).any() and {0, 1} == set(found[1][~is_right].tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_clicks_of_masks_on_a_gpu(seed, monkeypatch):
    """By distances on the GPU, and without them: the same clicks."""
    predicted, targets = (torch.from_numpy(masks) for masks in predictions_and_targets(seed))
    expected = next_clicks(predicted, targets)
    assert clicks_module.why_not_triton(targets.cuda()) is None
    for _ in range(2):
        found = next_clicks(predicted.cuda(), targets.cuda())
        assert all(each.is_cuda and torch.equal(each.cpu(), own) for each, own in zip(found, expected, strict=True))
        monkeypatch.setattr(clicks_module, "why_not_triton", lambda masks: "no kernel is wanted.")
