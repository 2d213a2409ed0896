"""Check that run lengths equal those of pycocotools byte for byte, and decode to the masks they were made from."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from samlight_hf.masks import rle
from samlight_hf.masks.rle import (
    RunLengthMasks,
    compress_runs,
    encode_rle,
    mask_changes,
    run_lengths,
    select_changes,
    text_rle,
)


SIZES = [(1, 1), (1, 7), (9, 1), (5, 6), (70, 61)]


def random_masks(height, width):
    """Make masks with no, all, few, many and nearly all pixels, so that runs begin inside and outside."""
    random = np.random.default_rng(height * width)
    shares = (0.0, 1.0, 0.01, 0.5, 0.99)
    return np.stack([random.random((height, width)) < share for share in shares])


@pytest.mark.parametrize("size", SIZES)
def test_masks_come_back(size):
    masks = random_masks(*size)
    encoded = RunLengthMasks.from_masks(masks)
    assert np.array_equal(encoded.to_masks(), masks)
    assert np.array_equal(np.stack(list(encoded)), masks)
    assert encoded.areas.tolist() == masks.sum(axis=(1, 2)).tolist()
    assert [encoded.runs_of(i).sum() for i in range(len(masks))] == [size[0] * size[1]] * len(masks)


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_those_of_pycocotools(size):
    masks = random_masks(*size)
    encoded = RunLengthMasks.from_masks(torch.from_numpy(masks))
    for mask, packed, plain in zip(masks, encoded.to_coco(), encoded.to_coco(compressed=False), strict=True):
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert packed == {"size": list(size), "counts": expected["counts"].decode()}
        assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(plain, *size)), mask)
        assert run_lengths(packed["counts"]).tolist() == plain["counts"]


@pytest.mark.parametrize("size", SIZES)
def test_one_mask_of_any_type_is_encoded_as_pycocotools_does(size):
    for mask in random_masks(*size):
        expected = text_rle(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))))
        for numbers in (mask, mask.astype(np.uint8), mask.astype(np.float32)):
            assert encode_rle(numbers) == expected


@pytest.mark.parametrize("counts", ["", "\x01", "P", b"p0", "PPPPPPP0", "é"])
def test_counts_that_no_encoder_writes_are_refused(counts):
    with pytest.raises(ValueError):
        run_lengths(counts)


def test_long_runs_and_large_steps_are_compressed_and_read_back():
    runs = np.array([0, 1, 2**30, 5, 3, 2**31 - 1, 15, 16, 31, 32])
    assert run_lengths(compress_runs(runs, np.array([0, len(runs)]))[0]).tolist() == runs.tolist()


def test_selection():
    masks = random_masks(5, 6)
    encoded = RunLengthMasks.from_masks(masks)
    for part in (np.array([3, 0, 3]), slice(1, 4), slice(None, None, -2), np.array([True, False, True, True, False])):
        assert np.array_equal(encoded[part].to_masks(), masks[part])
    assert np.array_equal(encoded[-1], masks[-1])
    with pytest.raises(IndexError):
        encoded[5]


@pytest.mark.parametrize("nothing", [RunLengthMasks.from_masks(np.zeros((0, 3, 4), dtype=bool)), slice(5, None)])
def test_no_masks(nothing):
    if isinstance(nothing, slice):
        nothing = RunLengthMasks.from_masks(random_masks(3, 4))[nothing]
    assert len(nothing) == 0
    assert nothing.to_masks().shape == (0, 3, 4)
    assert nothing.to_coco() == nothing.to_coco(compressed=False) == list(nothing) == []
    assert nothing.areas.tolist() == []


def test_views_of_masks_are_encoded_too():
    masks = np.random.default_rng(0).random((3, 5, 7)) < 0.5
    for view in (masks[::-1], masks[:, :, ::-1], masks.transpose(0, 2, 1), masks[::2, 1:, ::3], masks[:0, ::-1]):
        assert RunLengthMasks.from_masks(view).to_coco() == RunLengthMasks.from_masks(view.copy()).to_coco()


@pytest.mark.parametrize("masks", [np.zeros((2, 3), dtype=bool), np.zeros((1, 2, 3), dtype=np.uint8)])
def test_what_is_no_stack_of_masks_is_refused(masks):
    with pytest.raises(ValueError, match="must be bool"):
        RunLengthMasks.from_masks(masks)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("selection", [[3, 0, 3, 1], [], [4]], ids=str)
def test_changes_are_selected_before_they_become_runs(selection, device):
    masks = random_masks(30, 41)
    changes = select_changes(
        *mask_changes(torch.from_numpy(masks).to(device)), torch.tensor(selection, dtype=torch.int64, device=device)
    )
    selected = RunLengthMasks.from_changes(30, 41, *(tensor.cpu().numpy() for tensor in changes))
    assert np.array_equal(selected.to_masks(), masks[selection])


@pytest.mark.gpu
def test_changes_on_a_gpu_are_those_on_the_cpu():
    masks = torch.from_numpy(random_masks(300, 401))
    for there, here in zip(mask_changes(masks.cuda()), mask_changes(masks), strict=True):
        assert torch.equal(there.cpu(), here)


def test_many_masks_are_compressed_as_each_alone(monkeypatch):
    """They are taken in parts, which must not show."""
    masks = np.concatenate([random_masks(30, 41), random_masks(30, 41)[:, ::-1]])
    encoded, alone = RunLengthMasks.from_masks(masks), [encode_rle(mask) for mask in masks]
    for runs_at_once in (1, 7, 500, 2**16):
        monkeypatch.setattr(rle, "_RUNS_AT_ONCE", runs_at_once)
        assert encoded.to_coco() == alone
