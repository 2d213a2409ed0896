"""Masks of packed logits are those of all logits, pixel for pixel."""

import pytest
import torch

from samlight_hf.inference.packed_logits import NeededTiles, Place, columns_of, unpack_logits
from samlight_hf.kernels.upscaled_masks import Frame, changes_reference, masks_reference, measure_reference


FRAMES = {
    "landscape": Frame((128, 128), (84, 128), (84, 128), (0, 0), (84, 128)),
    "a larger image": Frame((128, 128), (128, 90), (310, 218), (0, 0), (310, 218)),
    "a smaller image": Frame((128, 128), (100, 128), (39, 50), (0, 0), (39, 50)),
    "a crop": Frame((128, 128), (128, 110), (71, 61), (20, 30), (120, 140)),
    "logits larger than the input": Frame((40, 40), (30, 40), (90, 120), (0, 0), (90, 120)),
}


def spots(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Return logits of one or two small spots in each mask, one mask everywhere, and one without a pixel."""
    generator = torch.Generator().manual_seed(seed)
    y, x = (torch.arange(length)[:, None] if axis == 0 else torch.arange(length) for axis, length in enumerate(size))
    logits = torch.full((count, *size), -torch.inf)
    for _ in range(2):
        centre, radius = torch.rand(count, 2, generator=generator), 0.5 + 8 * torch.rand(count, generator=generator)
        distance = ((y - size[0] * centre[:, :1, None]) ** 2 + (x - size[1] * centre[:, 1:, None]) ** 2).sqrt()
        logits = torch.maximum(logits, radius[:, None, None] - distance)
    logits += 0.2 * torch.randn(logits.shape, generator=generator)
    logits[0], logits[1] = 3.0, -3.0
    return logits


def pack_logits(logits, boxes, frame, kept):
    return NeededTiles(logits, boxes.float(), kept, Place.make(frame, *logits.shape[1:])).pack()


@pytest.mark.parametrize("size", [(64, 64), (64, 32), (30, 40)], ids=str)  # in tiles, and as one tile
@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_masks_are_the_same(frame, threshold, size):
    (top, left), parts, expected = frame.corner, [], []
    for seed, chosen in enumerate(([5, 0, 30, 1], [], [7, 39, 2])):
        logits = spots(40, size, seed)
        boxes = measure_reference(logits, frame, (threshold, 9.0, -9.0))[:, 2:] + torch.tensor([left, top, left, top])
        kept = torch.ones(40, dtype=torch.bool)
        kept[[3, 38]] = False
        packed = pack_logits(logits, boxes, frame, kept)
        assert packed.masks.unique().tolist() == kept.nonzero().squeeze(1).tolist()
        if size[0] == 64:
            assert packed.nbytes < (0.5 if size == (64, 64) else 0.7) * logits.nbytes
        places = torch.full((40,), 7)
        places[chosen] = torch.arange(len(chosen)) + sum(map(len, expected))
        parts.append((packed, places))
        expected.append(logits[chosen])
        columns = columns_of(boxes, frame, size[1])
        for mask, (first, last) in zip(logits, columns.tolist()):  # others do not matter
            changed = mask.clone()
            changed[:, :first], changed[:, last + 1 :] = -9.0, -9.0
            assert torch.equal(*(masks_reference(each[None], frame, threshold) for each in (mask, changed)))
    actual, expected = unpack_logits(parts, 7), torch.cat(expected)
    assert actual.shape == expected.shape
    assert torch.equal(masks_reference(actual, frame, threshold), masks_reference(expected, frame, threshold))
    assert all(
        map(torch.equal, changes_reference(actual, frame, threshold), changes_reference(expected, frame, threshold))
    )
    held = actual > torch.finfo(actual.dtype).min
    assert torch.equal(actual[held], expected[held])


def test_no_mask():
    frame = FRAMES["landscape"]
    packed = pack_logits(spots(4, (64, 64), 0), torch.zeros(4, 4), frame, torch.zeros(4, dtype=torch.bool))
    assert packed.nbytes == 0
    assert unpack_logits([(packed, torch.zeros(4, dtype=torch.int64))], 0).shape == (0, 64, 64)
