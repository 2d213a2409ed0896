"""Masks of very large images as spans: the pixels of a mask in each column, without an array of the image's size.

The spans of a mask are int64 (n, 2): start and end of runs of pixels inside it, at positions x * (H + 1) + y of an
image of H rows, sorted and disjoint. A span lies in one column: position y = H belongs to no pixel, so that spans of
neighbouring columns never touch. Union, intersection and clipping are then operations on sorted numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .rle import RunLengthMasks


@dataclass(frozen=True)
class SpanMask:
    """One mask of a large image.

    Attributes:
        spans: int64 (n, 2), as the module describes.
        height: H, the number of rows of the image.
    """

    spans: np.ndarray
    height: int

    @classmethod
    def from_runs(cls, runs: np.ndarray, tile_height: int, corner_xy: tuple[int, int], height: int) -> "SpanMask":
        """Make spans from the run lengths of a mask of a tile.

        Args:
            runs: int (runs,), as `RunLengthMasks.runs_of` returns them.
            tile_height: the number of rows of the tile.
            corner_xy: the tile's upper left pixel in the image.
            height: the number of rows of the image.
        """
        bounds = np.cumsum(runs, dtype=np.int64)
        starts, ends = bounds[0 : len(bounds) - len(bounds) % 2 : 2], bounds[1::2]
        first, last = starts // tile_height, (ends - 1) // tile_height
        per_run = last - first + 1  # columns that a run of the tile goes through
        run = np.repeat(np.arange(len(starts)), per_run)
        column = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(per_run) - per_run, per_run)
        top = np.maximum(starts[run] - column * tile_height, 0)
        bottom = np.minimum(ends[run] - column * tile_height, tile_height)
        offset = (column + corner_xy[0]) * (height + 1) + corner_xy[1]
        return cls(np.stack([offset + top, offset + bottom], axis=1), height)

    @classmethod
    def union(cls, masks: Sequence["SpanMask"]) -> "SpanMask":
        """Return the union of one or more masks of one image."""
        if len(masks) == 1:
            return masks[0]
        spans = np.concatenate([mask.spans for mask in masks])
        spans = spans[np.argsort(spans[:, 0], kind="stable")]
        ends = np.maximum.accumulate(spans[:, 1])
        begins = np.ones(len(spans), dtype=bool)
        begins[1:] = spans[1:, 0] > ends[:-1]
        is_last = np.append(begins[1:], True) if len(spans) else begins
        return cls(np.stack([spans[begins, 0], ends[is_last]], axis=1), masks[0].height)

    def clip(self, box_xyxy: Sequence[int]) -> "SpanMask":
        """Return the part of the mask within a box, x1, y1, x2, y2 in pixels, x2 and y2 behind the last pixel."""
        x1, y1, x2, y2 = box_xyxy
        stride = self.height + 1
        first, last = np.searchsorted(self.spans[:, 0], [x1 * stride, x2 * stride])
        spans = self.spans[first:last]
        column = spans[:, 0] // stride * stride
        spans = np.stack([np.maximum(spans[:, 0], column + y1), np.minimum(spans[:, 1], column + y2)], axis=1)
        return SpanMask(spans[spans[:, 0] < spans[:, 1]], self.height)

    @property
    def area(self) -> int:
        """The number of pixels."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """The tight box as pixel edges; zeros for an empty mask."""
        if not len(self.spans):
            return 0, 0, 0, 0
        columns, tops = np.divmod(self.spans[:, 0], self.height + 1)
        bottoms = tops + self.spans[:, 1] - self.spans[:, 0]
        return int(columns[0]), int(tops.min()), int(columns[-1]) + 1, int(bottoms.max())

    def intersection(self, other: "SpanMask") -> int:
        """Return the number of pixels that are in both masks."""
        return self.area + other.area - SpanMask.union([self, other]).area

    def iou(self, other: "SpanMask") -> float:
        """Return the intersection over the union with another mask; one of the two has pixels."""
        union = SpanMask.union([self, other]).area
        return (self.area + other.area - union) / union

    def runs(self, width: int) -> np.ndarray:
        """Return COCO's run lengths of the mask in its image of `width` columns, int64, as in `RunLengthMasks`."""
        columns, tops = np.divmod(self.spans[:, 0], self.height + 1)
        starts = columns * self.height + tops
        ends = starts + self.spans[:, 1] - self.spans[:, 0]
        if len(starts):  # spans that touch across two columns are one run
            joined = starts[1:] == ends[:-1]
            starts, ends = starts[np.append(True, ~joined)], ends[np.append(~joined, True)]
        bounds = np.append(np.stack([starts, ends], axis=1).ravel(), self.height * width)
        runs = np.diff(bounds, prepend=0)
        return runs[:-1] if runs[-1] == 0 else runs

    def thinned(self, step: int) -> "SpanMask":
        """Return the mask in an image of every `step`-th row and column."""
        columns, tops = np.divmod(self.spans[:, 0], self.height + 1)
        starts, ends = (-(-edges // step) for edges in (tops, tops + self.spans[:, 1] - self.spans[:, 0]))
        kept = (columns % step == 0) & (starts < ends)
        height = -(-self.height // step)
        offset = columns[kept] // step * (height + 1)
        return SpanMask(np.stack([offset + starts[kept], offset + ends[kept]], axis=1), height)

    def pixels(self, box_xyxy: Sequence[int] | None = None) -> np.ndarray:
        """Return the pixels of a box, by default of the tight one: bool (y2 - y1, x2 - x1)."""
        x1, y1, x2, y2 = self.box_xyxy if box_xyxy is None else box_xyxy
        pixels = np.zeros((x2 - x1, y2 - y1), dtype=bool)
        for start, end in self.clip((x1, y1, x2, y2)).spans.tolist():
            column, top = divmod(start, self.height + 1)
            pixels[column - x1, top - y1 : top - y1 + end - start] = True
        return pixels.T


def run_length_masks(masks: Sequence[SpanMask], height: int, width: int) -> RunLengthMasks:
    """Return the masks of an image of height x width pixels as run lengths."""
    return RunLengthMasks.from_runs(height, width, [mask.runs(width) for mask in masks])
