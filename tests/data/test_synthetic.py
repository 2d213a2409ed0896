import pickle

import numpy as np
import pytest
from scipy import ndimage

from samlight_hf.data import SyntheticScenes


def scenes(*indices, **settings):
    dataset = SyntheticScenes(100, **settings)
    return [dataset[i] for i in indices]


def test_a_scene_is_a_function_of_seed_and_index():
    dataset = SyntheticScenes(5, 64, seed=3)
    copy = pickle.loads(pickle.dumps(dataset))
    for i in (4, 0, 4):
        np.testing.assert_array_equal(dataset[i].image, copy[i].image)
        np.testing.assert_array_equal(dataset[i].masks(), copy[i].masks())
        assert dataset[i].id == copy[i].id
    np.testing.assert_array_equal(dataset[-1].image, dataset[4].image)
    different = [np.asarray(SyntheticScenes(5, 64, seed)[i].image).tobytes() for seed in (3, 4) for i in range(5)]
    assert len(set(different)) == 10
    with pytest.raises(IndexError):
        dataset[5]


def test_masks_are_disjoint_and_none_is_empty():
    for scene in scenes(*range(60), image_size=96):
        masks = scene.masks()
        assert 1 <= len(masks) <= 10
        assert masks.sum(0).max() == 1  # masks have visible parts only, so they are disjoint
        assert masks.any((1, 2)).all()
        for instance, mask in zip(scene.instances, masks):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            tight = (columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])
            assert instance.bbox_xywh == tight and instance.area == mask.sum()


def test_filling_the_box_is_a_bad_answer():
    instances = [i for scene in scenes(*range(100), image_size=96) for i in scene.instances]
    fill = np.mean([i.area / (i.bbox_xywh[2] * i.bbox_xywh[3]) for i in instances])
    assert 0.3 < fill < 0.65


@pytest.mark.parametrize("between_shapes", [False, True])
def test_edges_are_where_the_masks_change(between_shapes):
    """The image changes much more across outlines than elsewhere, also where one shape covers another."""
    across, elsewhere = [], []
    for scene in scenes(*range(60), image_size=96):
        labels = sum((i + 1) * mask for i, mask in enumerate(scene.masks()))
        step = np.abs(np.diff(np.asarray(scene.image, float), axis=1)).sum(2)
        outline = np.diff(labels, axis=1) != 0
        elsewhere.append(step[~ndimage.binary_dilation(outline, iterations=2)].mean())
        if between_shapes:
            outline &= (labels[:, 1:] > 0) & (labels[:, :-1] > 0)
        across += step[outline].tolist()
    assert len(across) > 400 and np.mean(across) > 2.0 * np.mean(elsewhere)


def test_no_colour_tells_objects_from_background():
    """The mean colours of shapes and of backgrounds come from the same range."""
    inside, outside = [], []
    for scene in scenes(*range(100), image_size=48):
        pixels, masks = np.asarray(scene.image, float), scene.masks()
        inside.append(pixels[masks.any(0)].mean(0))
        outside.append(pixels[~masks.any(0)].mean(0))
    assert np.abs(np.mean(inside, 0) - np.mean(outside, 0)).max() < 15
    assert np.std(outside, 0).min() > 40


@pytest.mark.parametrize("settings", [{"num_images": 0}, {"image_size": 8}, {"seed": -1}])
def test_settings_that_do_not_fit(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SyntheticScenes(**{"num_images": 3, **settings})
