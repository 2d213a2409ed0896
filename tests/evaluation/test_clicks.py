import numpy as np
import pytest

from samlight_hf.evaluation.clicks import deepest_point, next_click


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
