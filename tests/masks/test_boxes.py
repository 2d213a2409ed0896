"""Compare the boxes of masks, by every function, with a loop over pixels."""

import numpy as np
import pytest
import torch

from samlight_hf.masks.boxes import mask_boxes, mask_edges, mask_extent, xywh_to_xyxy


SHARES = (0.0, 0.02, 0.1, 0.5, 1.0)


def extent_by_loop(mask):
    pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    if not pixels:
        return None
    xs, ys = zip(*pixels)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (5, 6), (23, 17)], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_three_agree_with_a_loop(size, device):
    random = np.random.default_rng(size[0] * 100 + size[1])
    masks = np.stack([random.random(size) < share for share in SHARES for _ in range(5)])
    expected = [extent_by_loop(mask) for mask in masks]
    assert None in expected and (0, 0, size[1], size[0]) in expected
    assert [mask_extent(mask) for mask in masks] == expected
    assert [mask_extent(mask.astype(np.uint8) * 255) for mask in masks] == expected
    edges = mask_edges(masks)
    assert edges.dtype == np.float32 and edges.tolist() == [list(extent or (0, 0, 0, 0)) for extent in expected]
    boxes = mask_boxes(torch.from_numpy(masks).to(device))
    assert boxes.device.type == device and boxes.dtype == torch.int64
    assert boxes.tolist() == [[e[0], e[1], e[2] - 1, e[3] - 1] if e else [0, 0, 0, 0] for e in expected]


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=str)
def test_nothing_has_no_box(shape):
    masks = np.zeros(shape, dtype=bool)
    assert mask_edges(masks).tolist() == mask_boxes(torch.from_numpy(masks)).tolist() == [[0] * 4] * shape[0]
    assert mask_edges(masks).shape == (shape[0], 4)


def test_the_extent_cuts_out_the_mask():
    mask = np.zeros((8, 9), dtype=bool)
    mask[2:5, 3:7] = np.eye(3, 4, dtype=bool)
    x1, y1, x2, y2 = mask_extent(mask)
    assert np.array_equal(mask[y1:y2, x1:x2], np.eye(3, 4, dtype=bool)[:, :3])


def test_boxes_of_coco_become_corners():
    assert xywh_to_xyxy((3, 4, 10, 20)) == (3, 4, 13, 24)
