"""Spans and polygons against the same operations on pixels, on random masks of all kinds."""

import numpy as np
import pytest

from samlight_hf.masks.rle import RunLengthMasks
from samlight_hf.masks.spans import SpanMask, run_length_masks
from samlight_hf.masks.tracing import trace


def spans_of(mask: np.ndarray, corner=(0, 0), height=None) -> SpanMask:
    runs = RunLengthMasks.from_masks(mask[None]).runs_of(0)
    return SpanMask.from_runs(runs, mask.shape[0], corner, height or mask.shape[0])


def random_masks(count: int):
    random = np.random.default_rng(0)
    for number in range(count):
        mask = random.random(random.integers(1, 12, 2)) < random.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        yield random, np.kron(mask, np.ones((2, 3), bool)) if number % 3 == 0 else mask


def test_operations_are_those_on_pixels():
    for random, mask in random_masks(200):
        height, width = mask.shape
        other = random.random((height, width)) < 0.5
        spans, others, whole = spans_of(mask), spans_of(other), (0, 0, width, height)
        assert spans.area == mask.sum()
        np.testing.assert_array_equal(spans.pixels(whole), mask)
        np.testing.assert_array_equal(SpanMask.union([spans, others]).pixels(whole), mask | other)
        assert spans.intersection(others) == (mask & other).sum()
        x1, x2 = sorted(random.integers(0, width + 1, 2))
        y1, y2 = sorted(random.integers(0, height + 1, 2))
        assert spans.clip((x1, y1, x2, y2)).area == mask[y1:y2, x1:x2].sum()
        np.testing.assert_array_equal(spans.pixels((x1, y1, x2, y2)), mask[y1:y2, x1:x2])
        for step in (1, 2, 3):
            small = mask[::step, ::step]
            if small.size:
                np.testing.assert_array_equal(spans.thinned(step).pixels((0, 0, small.shape[1], small.shape[0])), small)
        if mask.any():
            rows, columns = np.nonzero(mask)
            assert spans.box_xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            x1, y1, x2, y2 = spans.box_xyxy
            np.testing.assert_array_equal(spans.pixels(), mask[y1:y2, x1:x2])


def test_run_lengths_are_those_of_the_mask():
    for _, mask in random_masks(100):
        again = run_length_masks([spans_of(mask), spans_of(~mask)], *mask.shape)
        assert again.to_coco() == RunLengthMasks.from_masks(np.stack([mask, ~mask])).to_coco()


def test_a_tile_lies_at_its_corner_of_an_image_beyond_32_bits():
    mask = np.array([[True, False], [True, True]])
    spans = spans_of(mask, corner=(99_998, 50_000), height=100_000)
    assert spans.box_xyxy == (99_998, 50_000, 100_000, 50_002)
    runs = spans.runs(width=100_000)
    assert runs.sum() == 100_000 * 100_000
    assert runs[1::2].sum() == 3
    (polygon,) = trace(spans)
    assert {tuple(vertex) for vertex in polygon[0].tolist()} == {
        (99_998, 50_000), (99_999, 50_000), (99_999, 50_001), (100_000, 50_001), (100_000, 50_002), (99_998, 50_002),
    }  # fmt: skip


def filled(rings: list[np.ndarray], shape) -> np.ndarray:
    """Count for each pixel the outer rings around it less the holes."""
    count = np.zeros(shape, dtype=int)
    for number, ring in enumerate(rings):
        inside = np.zeros(shape, dtype=bool)
        for (x, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0)):
            assert x == x2 or y1 == y2
            if x == x2:
                inside[min(y1, y2) : max(y1, y2), x:] ^= True
        count += inside if number == 0 else -inside.astype(int)
    return count


def test_polygons_are_the_mask():
    for _, mask in random_masks(150):
        polygons = trace(spans_of(mask))
        total = sum((filled(rings, mask.shape) for rings in polygons), np.zeros(mask.shape, dtype=int))
        np.testing.assert_array_equal(total, mask)
        for ring in (ring for rings in polygons for ring in rings):
            assert len(np.unique(ring, axis=0)) == len(ring)  # it touches itself nowhere


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        ([[1, 0], [0, 1]], [1, 1]),  # apart, although they touch
        ([[1, 1, 1], [1, 0, 1], [1, 1, 1]], [2]),
        ([[0, 1, 1], [1, 0, 1], [1, 1, 1]], [2]),  # a hole that touches the outside at a corner
        ([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]], [3]),  # two holes that touch
    ],
)
def test_rings_of_each_polygon(mask, shape):
    assert [len(rings) for rings in trace(spans_of(np.array(mask, dtype=bool)))] == shape
