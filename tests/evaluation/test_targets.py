import pickle

import numpy as np
import pytest
import torch

from samlight_hf.data import Instance, Sample
from samlight_hf.data.clicks import deepest_point_reference
from samlight_hf.evaluation.targets import Targets
from tests.data.files import box_mask, rle


def masks_of_every_kind(height: int = 7, width: int = 5) -> np.ndarray:
    """Masks with odd and even numbers of runs that begin, end, or do both with their first and last pixel."""
    generator = np.random.default_rng(0)
    corner = np.zeros((2, height, width), dtype=bool)
    corner[0, 0, 0] = corner[1, -1, -1] = True
    noise = generator.random((6, height, width)) < 0.5
    return np.concatenate(
        [corner, noise, np.ones((1, height, width), bool), box_mask(1, 2, 2, 3, (height, width))[None]]
    )


@pytest.fixture
def sample():
    masks = masks_of_every_kind()
    instances = tuple(Instance(number, rle(mask), (0, 0, 5, 7), float(mask.sum())) for number, mask in enumerate(masks))
    return Sample("a", None, instances, masks.shape[2], masks.shape[1])


def test_masks_are_those_that_were_encoded(sample):
    masks = Targets.of(sample, sample.instances).masks(torch.device("cpu"))
    assert masks.is_contiguous()
    assert np.array_equal(masks.numpy(), masks_of_every_kind())
    assert np.array_equal(masks.numpy(), sample.masks())  # as pycocotools decodes them


def test_a_slice_and_a_copy_of_another_process(sample):
    targets = pickle.loads(pickle.dumps(Targets.of(sample, sample.instances)))
    for chosen in (slice(0, 3), slice(3, 8), slice(8, 20)):
        part = targets[chosen]
        assert [instance.id for instance in part.instances] == list(range(10))[chosen]
        assert np.array_equal(part.masks(torch.device("cpu")).numpy(), masks_of_every_kind()[chosen])
        assert part.first_clicks is None
    assert len(Targets.of(sample, ())) == 0


def test_first_clicks_are_the_deepest_points_of_the_masks(sample):
    targets = pickle.loads(pickle.dumps(Targets.of(sample, sample.instances, with_clicks=True)))
    expected = [deepest_point_reference(mask)[0] for mask in masks_of_every_kind()]
    assert [tuple(point) for point in targets.first_clicks.tolist()] == expected
    assert [tuple(point) for point in targets[3:8].first_clicks.tolist()] == expected[3:8]
    assert Targets.of(sample, (), with_clicks=True).first_clicks.shape == (0, 2)


@pytest.mark.gpu
def test_masks_on_a_gpu(sample):
    masks = Targets.of(sample, sample.instances).masks(torch.device("cuda"))
    assert np.array_equal(masks.cpu().numpy(), masks_of_every_kind())
