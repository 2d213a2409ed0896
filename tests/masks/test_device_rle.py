"""Run lengths and counts that are computed on a device equal those of a CPU, byte for byte."""

import numpy as np
import pytest
import torch

from samlight_hf.masks import device_rle
from samlight_hf.masks.device_rle import encode_changes
from samlight_hf.masks.rle import RunLengthMasks, mask_changes


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(1, 1), (1, 7), (9, 1), (5, 6), (70, 61), (900, 1100)]


def masks_of_all_kinds(height: int, width: int) -> np.ndarray:
    """Make masks with no, all, few, many and nearly all pixels, so that counts have one to all groups of bits."""
    random = np.random.default_rng(height * width)
    shares = (0.0, 1.0, 0.5, 0.0, 0.01, 1e-4, 0.99, 1.0, 0.0)
    masks = np.stack([random.random((height, width)) < share for share in shares])
    masks[3, -1, -1] = masks[5, 0, 0] = True
    return masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_they_are_those_of_a_cpu(size, device):
    masks = masks_of_all_kinds(*size)
    encoded = encode_changes(*size, *mask_changes(torch.from_numpy(masks).to(device)))
    expected = RunLengthMasks.from_masks(masks)
    assert encoded.compressed is not None and expected.compressed is None
    assert encoded.to_coco() == expected.to_coco()
    for name in ("runs", "offsets"):
        actual, wanted = getattr(encoded, name), getattr(expected, name)
        assert actual.dtype == wanted.dtype and np.array_equal(actual, wanted)
    for part in ([3, 0, 3], slice(1, 4), slice(9, None)):
        part = np.array(part) if isinstance(part, list) else part
        assert encoded[part].compressed is not None
        assert encoded[part].to_coco() == expected[part].to_coco()
        assert np.array_equal(encoded[part].to_masks(), masks[part])


@pytest.mark.parametrize("device", DEVICES)
def test_many_runs_are_encoded_in_parts(device, monkeypatch):
    """So that the memory that it takes has a limit."""
    masks, sizes = masks_of_all_kinds(70, 61), []
    expected, encode = RunLengthMasks.from_masks(masks), device_rle._encode

    def measured(height, width, positions, counts):
        sizes.append(len(positions))
        return encode(height, width, positions, counts)

    monkeypatch.setattr(device_rle, "_encode", measured)
    for at_once in (1, 30, 1000, 10**6):
        sizes.clear()
        monkeypatch.setattr(device_rle, "_CHANGES_AT_ONCE", at_once)
        encoded = encode_changes(70, 61, *mask_changes(torch.from_numpy(masks).to(device)))
        assert encoded.to_coco() == expected.to_coco() and np.array_equal(encoded.runs, expected.runs)
        assert np.array_equal(encoded.offsets, expected.offsets)
        most = np.diff(expected.offsets).max() - 1  # of a single mask
        assert sum(sizes) == len(expected.runs) - len(masks) and max(sizes) <= at_once + most
        assert len(sizes) == 1 if at_once == 10**6 else len(sizes) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_no_masks(device):
    encoded = encode_changes(3, 4, *mask_changes(torch.zeros(0, 3, 4, dtype=torch.bool, device=device)))
    assert encoded.to_coco() == [] and encoded.to_masks().shape == (0, 3, 4)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_but_for_the_results():
    changes = mask_changes(torch.from_numpy(masks_of_all_kinds(300, 401)).cuda())
    expected = encode_changes(300, 401, *changes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoded = encode_changes(300, 401, *changes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert encoded.to_coco() == expected.to_coco()
