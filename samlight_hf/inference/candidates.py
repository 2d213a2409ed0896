"""Candidate masks, stored as logits, their smallest form, until the suppression of duplicates has chosen among them."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from ..kernels.upscaled_masks import Frame, changes
from ..masks.rle import RunLengthMasks, select_changes


class Table(NamedTuple):
    """Scores and places of n masks, in pixels of the image.

    Attributes:
        scores: float32 (n,), predicted IoU.
        stability: float32 (n,).
        boxes: float32 (n, 4), the first and the last pixel, XYXY.
        points: float32 (n, 2), the prompts.
    """

    scores: torch.Tensor
    stability: torch.Tensor
    boxes: torch.Tensor
    points: torch.Tensor

    @classmethod
    def of(cls, columns: torch.Tensor) -> "Table":
        """Split float32 (n, 8) into the columns of a table."""
        return cls(columns[:, 0], columns[:, 1], columns[:, 2:6], columns[:, 6:])


class _Part(NamedTuple):
    columns: torch.Tensor  # float32 (n, 8), see `Table`
    frame: Frame
    logits: torch.Tensor | None  # (n, h, w), or None once they were converted to outlines
    outlines: tuple[torch.Tensor, torch.Tensor] | None  # the masks as `changes`, instead of logits


class Candidates:
    """Masks of one image that have passed all filters but the suppression of duplicates, on the device.

    Logits become outlines (the positions where a mask changes) for the chosen masks only. If logits of more than
    `max_bytes` wait, all of them do.

    Args:
        size: (height, width) of the image.
        threshold: Pixels with logits above it are inside a mask.
        max_bytes: The memory that logits may take.
        use_triton: Use Triton kernels where they run.
    """

    def __init__(self, size: tuple[int, int], threshold: float, max_bytes: float, use_triton: bool):
        self.size, self.threshold, self.max_bytes, self.use_triton = size, threshold, max_bytes, use_triton
        self._parts: list[_Part] = []
        self._scores: list[torch.Tensor] = []
        self._waiting_bytes = 0

    def note_scores(self, scores: torch.Tensor):
        """Store the predicted IoU (P, M) of all masks of a batch, for `have_numbers`."""
        self._scores.append(scores)

    def have_numbers(self) -> bool:
        """Return whether no score is NaN. Waits for the device."""
        return not self._scores or not bool(torch.cat(self._scores).isnan().any())

    def add(self, table: Table, frame: Frame, logits: torch.Tensor, step: int):
        """Add masks.

        Args:
            table: Scores and places of the n masks.
            frame: The place of the logits in the image.
            logits: (n, h, w), as the decoder gives them.
            step: The number of masks that may be at the image's size at once.
        """
        columns = torch.cat([table.scores[:, None], table.stability[:, None], table.boxes, table.points], dim=1)
        self._parts.append(_Part(columns, frame, logits, None))
        self._waiting_bytes += logits.numel() * logits.element_size()
        if self._waiting_bytes > self.max_bytes:
            self._parts = [self._outlined(part, step) for part in self._parts]
            self._waiting_bytes = 0

    def _outlined(self, part: _Part, step: int) -> _Part:
        if part.logits is None:
            return part
        outlines = changes(part.logits, part.frame, self.threshold, step, self.use_triton)
        return part._replace(logits=None, outlines=outlines)

    def columns(self) -> torch.Tensor | None:
        """Return float32 (n, 8) of all masks, see `Table`, or None if there is no mask."""
        return torch.cat([part.columns for part in self._parts]) if self._parts else None

    def frames(self) -> tuple[list[Frame], np.ndarray]:
        """Return the frame and the number of masks of each part."""
        return [part.frame for part in self._parts], np.array([len(part.columns) for part in self._parts], dtype=int)

    def outlines(self, kept: np.ndarray, step: int) -> RunLengthMasks:
        """Return the masks with the indices `kept` (k,), in that order; see `add` for `step`."""
        order: list[int] = []  # the place in `kept` of each mask of `outlines`
        outlines: list[tuple[torch.Tensor, torch.Tensor]] = []
        waiting: dict[Frame, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        start = 0
        for part in self._parts:
            places = np.flatnonzero((kept >= start) & (kept < start + len(part.columns)))
            own = kept[places] - start
            start += len(part.columns)
            if part.logits is not None:
                waiting[part.frame] += [(place, part.logits[i]) for place, i in zip(places.tolist(), own.tolist())]
            elif len(places):
                assert part.outlines is not None
                positions, counts = part.outlines
                outlines.append(select_changes(positions, counts, torch.from_numpy(own).to(part.columns.device)))
                order += places.tolist()
        at_once = 256 if self.use_triton else step
        for frame, masks in waiting.items():
            for first in range(0, len(masks), at_once):
                batch = masks[first : first + at_once]
                logits = torch.stack([logits for _, logits in batch])
                outlines.append(changes(logits, frame, self.threshold, step, self.use_triton))
                order += [place for place, _ in batch]
        if not outlines:
            nothing = np.zeros(0, dtype=np.int32)
            return RunLengthMasks.from_changes(*self.size, nothing, nothing)
        all_positions, all_counts = (torch.cat(tensors).cpu().numpy() for tensors in zip(*outlines))
        return RunLengthMasks.from_changes(*self.size, all_positions, all_counts)[np.argsort(order)]
