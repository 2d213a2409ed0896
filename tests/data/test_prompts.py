"""Test that objects, boxes and points are drawn where the pixels show them, and as the settings say."""

from collections import Counter

import numpy as np
import pytest
import torch

from samlight_hf.data import (
    Augmentation,
    PromptSampling,
    Sa1bDataset,
    SkipReason,
    SyntheticScenes,
)

from .examples import examples, id_of
from .files import annotation, box_mask, coloured_tar, jpeg, sa1b_json, write_tar


S, M = 128, 32


def test_prompts_differ_where_an_image_comes_again():
    made = examples(SyntheticScenes(1, 64), 2, num_views=1)
    assert id_of(made[0]) == id_of(made[1])
    assert not torch.equal(made[0]["boxes"], made[1]["boxes"])


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(), Augmentation(scale=(0.4, 2.5), flip=True), Augmentation(stretch=1.6, scale=(0.6, 1.6))],
    ids=str,
)
def test_masks_boxes_and_points_lie_where_the_object_is_seen(tmp_path, augmentation):
    """Each object has its own colour channel, so the pixels are its share of each cell."""
    sizes = [(97, 61), (150, 211), (333, 222), (64, 64)]
    tar = Sa1bDataset(coloured_tar(tmp_path / "a.tar", sizes))
    prompts = PromptSampling(3, box_noise=0.0, min_mask_cells=6)
    cell, ious = S // M, []
    for example in examples(tar, 40, S, mask_size=M, augmentation=augmentation, prompts=prompts):
        covered = example["pixel_values"].numpy() / 255
        for mask, box, point in zip(example["masks"].numpy(), example["boxes"].numpy(), example["points"].numpy()):
            column, row = (point / cell).astype(int)
            assert mask[row, column]
            own = covered[:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell].mean((1, 2)).argmax()
            expected = covered[own].reshape(M, cell, M, cell).mean((1, 3)) >= 0.5
            ious.append((mask & expected).sum() / (mask | expected).sum())
            columns, rows = np.flatnonzero((covered[own] > 0.5).any(0)), np.flatnonzero((covered[own] > 0.5).any(1))
            tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(box - tight).max() <= 2.5, (box, tight)
    assert len(ious) == 120 and np.mean(ious) > 0.96 and min(ious) > 0.75


def test_box_noise_is_as_large_as_said_and_keeps_every_box_whole():
    exact = np.tile([[100.0, 100.0, 300.0, 200.0]], (4000, 1))
    sampling = PromptSampling(4000)
    noisy = sampling.boxes(exact, (1024, 1024), 1024, np.random.default_rng(0))
    error = noisy - exact
    assert np.abs(error).max() <= 20 + 1e-3 and np.isclose(np.abs(error).max(), 20, atol=1e-3)
    np.testing.assert_allclose(error[:, 1].std(), 10, rtol=0.1)  # 10 % of the height, rarely limited
    assert 14 < error[:, 0].std() < 17  # 10 % of the width is 20: limited at one standard deviation
    tiny = np.tile([[0.0, 0.0, 1.0, 1.0]], (500, 1))
    boxes = PromptSampling(500, box_noise=5.0).boxes(tiny, (1024, 700), 1024, np.random.default_rng(1))
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0


def test_points_are_deepest_or_anywhere_inside():
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 2:9, 3:14] = True
    deepest = PromptSampling(1, deepest_share=1.0).points(mask, (64, 64), 64, np.random.default_rng(0))
    assert deepest[0, 1] == (2 + 3) * 4 + 1.5
    many = np.repeat(mask, 2000, 0)
    points = PromptSampling(2000, deepest_share=0.0).points(many, (64, 64), 64, np.random.default_rng(0))
    columns, rows = points.T.astype(int)
    assert mask[0, rows // 4, columns // 4].all()
    assert np.array_equal(np.unique(columns), np.arange(12, 56)) and np.array_equal(np.unique(rows), np.arange(8, 36))


def test_targets_repeat_only_where_there_are_too_few(tmp_path):
    tar = Sa1bDataset(coloured_tar(tmp_path / "a.tar", [(97, 61)]))
    for num_prompts, expected in ((2, {1: 2}), (3, {1: 3}), (7, {3: 1, 2: 2})):
        example = examples(tar, 1, S, augmentation=None, prompts=PromptSampling(num_prompts))[0]
        times = Counter(mask.numpy().tobytes() for mask in example["masks"])
        assert Counter(times.values()) == expected
        assert len(np.unique(example["boxes"], axis=0)) == num_prompts


def test_objects_too_small_to_see_are_left_out_and_not_held_against_the_data(tmp_path):
    dot = annotation(1, box_mask(width=2, height=2))
    members = {"sa_1.jpg": jpeg(), "sa_1.json": sa1b_json(dot, annotation(2, box_mask(x=18, width=12)))}
    members |= {f"dot_{i}.jpg": jpeg(seed=i) for i in range(3)} | {f"dot_{i}.json": sa1b_json(dot) for i in range(3)}
    made = examples(Sa1bDataset(write_tar(tmp_path / "a.tar", members)), 200, 32, mask_size=16, augmentation=None)
    assert all(example["masks"].flatten(1).sum(1).min() > 4 for example in made)
    assert set(made.skip_report().images) == {SkipReason.NOTHING_IN_VIEW}


def test_large_objects_come_more_often_with_area_power(tmp_path):
    masks = [box_mask(x=1, width=2, height=2), box_mask(x=10, width=4, height=4), box_mask(x=20, width=16, height=16)]
    content = sa1b_json(*(annotation(i, mask, **({"area": 16} if i == 1 else {})) for i, mask in enumerate(masks)))
    tar = Sa1bDataset(write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(), "a.json": content}))
    for power, expected in ((0.0, [1 / 3] * 3), (0.5, [2 / 22, 4 / 22, 16 / 22])):
        prompts = PromptSampling(1, min_mask_cells=1, area_power=power)
        made = examples(tar, 600, 64, mask_size=64, augmentation=None, prompts=prompts)
        areas = [int(example["masks"].sum()) for example in made]
        shares = [np.mean([area < 30 for area in areas]), np.mean([30 <= area < 100 for area in areas])]
        np.testing.assert_allclose(shares, expected[:2], atol=0.06)
