"""Small holes are filled and small parts dropped, compared with a flood fill by hand."""

import numpy as np
import pytest
import torch

from samlight_hf.masks.boxes import mask_edges
from samlight_hf.masks.device_rle import encode_changes
from samlight_hf.masks.regions import clean_mask, clean_masks
from samlight_hf.masks.results import GeneratedMasks, MaskResult
from samlight_hf.masks.rle import RunLengthMasks, mask_changes

from .test_formats import RING, TOUCHING, mask_of, random_masks


pytest.importorskip("cv2", reason="needs OpenCV, of the extra polygons")


def components(pixels: np.ndarray, steps: list[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    """Return the connected pixels that are True, by a flood fill."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(pixels))))
    found = []
    while left:
        waiting, component = [left.pop()], set()
        while waiting:
            y, x = waiting.pop()
            component.add((y, x))
            near = {(y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            waiting += near
        found.append(component)
    return found


SIDES = [(0, 1), (1, 0), (0, -1), (-1, 0)]
CORNERS = [(1, 1), (1, -1), (-1, 1), (-1, -1)]


def cleaned_by_hand(mask: np.ndarray, min_hole_area: int, min_region_area: int) -> np.ndarray:
    mask = mask.copy()
    height, width = mask.shape
    for hole in components(~mask, SIDES):
        reaches_border = any(y in (0, height - 1) or x in (0, width - 1) for y, x in hole)
        if not reaches_border and len(hole) < min_hole_area:
            mask[tuple(zip(*hole))] = True
    regions = components(mask, SIDES + CORNERS)
    for region in regions:
        if len(region) < min(min_region_area, max(map(len, regions))):
            mask[tuple(zip(*region))] = False
    return mask


@pytest.mark.parametrize("limits", [(0, 0), (1, 1), (4, 0), (0, 4), (6, 10), (400, 400)], ids=str)
def test_small_holes_and_parts_by_hand(limits):
    for mask in [RING, TOUCHING, *random_masks(12)]:
        before, cleaned = mask.copy(), clean_mask(mask, *limits)
        expected = cleaned_by_hand(mask, *limits)
        largest = [len(region) for region in components(expected, SIDES + CORNERS)]
        if largest.count(max(largest, default=0)) > 1 and limits[1]:  # of equal parts either may stay
            assert cleaned.sum() <= expected.sum()
        else:
            assert np.array_equal(cleaned, expected), mask
        assert np.array_equal(mask, before)


def test_what_is_filled_and_what_is_not():
    mask = mask_of("#####. #...#. #.#.#. #...#. #####. .....# ")
    assert clean_mask(mask, 8).sum() == mask.sum() and clean_mask(mask, 8) is mask
    assert clean_mask(mask, 9)[:5, :5].all()  # and the island in the hole is a part of it
    assert clean_mask(mask, 0, 2)[2, 2] == 0 and clean_mask(mask, 0, 2)[5, 5]  # touches at a corner
    corner = mask_of("####. #..#. ####.")
    assert not clean_mask(corner, 100)[:, 4].any() and clean_mask(corner, 100)[1, 1]
    assert not clean_mask(np.zeros((3, 3), dtype=bool), 9, 9).any()
    assert clean_mask(mask_of("#.# ... ..."), 0, 9).sum() == 1  # the largest stays


def test_results_keep_their_kind_order_and_scores():
    masks = np.zeros((3, 12, 12), dtype=bool)
    masks[0, 1:9, 1:9] = masks[1, :3, :3] = masks[1, 10, 10] = True
    masks[0, 4, 4] = False
    plain = MaskResult(masks, np.array([0.9, 0.8, 0.7], dtype=np.float32), mask_edges(masks))
    columns = plain.scores, plain.boxes_xyxy, plain.scores, np.zeros((3, 2)), np.zeros((3, 4))
    generated = GeneratedMasks(RunLengthMasks.from_masks(masks), *columns)
    known = encode_changes(12, 12, *mask_changes(torch.from_numpy(masks)))  # as from a GPU, with COCO's counts
    for result in (plain, generated, GeneratedMasks(known, *columns)):
        cleaned = clean_masks(result, 5, 5)
        assert type(cleaned) is type(result) and len(cleaned) == 3
        assert [int(mask.sum()) for mask in cleaned.masks] == [64, 9, 0]
        assert cleaned.boxes_xyxy.tolist() == [[1, 1, 9, 9], [0, 0, 3, 3], [0, 0, 0, 0]]
        assert np.array_equal(cleaned.scores, plain.scores)
        if isinstance(result, GeneratedMasks):
            assert cleaned.masks.to_coco() == RunLengthMasks.from_masks(cleaned.masks.to_masks()).to_coco()
        assert len(clean_masks(result[:0], 5, 5)) == 0
    assert plain.masks[0, 4, 4] == 0 and plain.boxes_xyxy[1].tolist() == [0, 0, 11, 11]  # as they were
