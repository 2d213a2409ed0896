"""Masks that may stay, kept as what is smallest: the decoder's logits, until it is known which of their outlines are wanted."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from ..kernels.upscaled_masks import Frame, changes
from ..masks.rle import RunLengthMasks, select_changes


class Table(NamedTuple):
    """What is known of n masks, in pixels of the image."""

    scores: torch.Tensor  # float32 (n,), predicted IoU
    stability: torch.Tensor  # float32 (n,)
    boxes: torch.Tensor  # float32 (n, 4), of the first and the last pixel
    points: torch.Tensor  # float32 (n, 2)

    @classmethod
    def of(cls, columns: torch.Tensor) -> "Table":
        """Of float32 (n, 8)."""
        return cls(columns[:, 0], columns[:, 1], columns[:, 2:6], columns[:, 6:])


class _Part(NamedTuple):
    columns: torch.Tensor  # float32 (n, 8), of `Table`
    frame: Frame
    logits: torch.Tensor | None  # (n, h, w), until there are too many of them
    outlines: tuple[torch.Tensor, torch.Tensor] | None  # of `changes`, then


class Candidates:
    """Masks of one image that all filters but the suppression of duplicates have kept, on the device.

    Outlines are computed of those that are kept in the end; of all, whenever logits of more than `max_bytes` wait.
    """

    def __init__(self, image: tuple[int, int], threshold: float, max_bytes: float, use_triton: bool):
        self.image, self.threshold, self.max_bytes, self.use_triton = image, threshold, max_bytes, use_triton
        self._parts: list[_Part] = []
        self._scores: list[torch.Tensor] = []
        self._waiting_bytes = 0

    def note_scores(self, scores: torch.Tensor):
        """The predicted IoU (P, M) of all masks of a batch, also of those that no filter keeps."""
        self._scores.append(scores)

    def have_numbers(self) -> bool:
        """False where a score is NaN. Waits for the device."""
        return not self._scores or not bool(torch.cat(self._scores).isnan().any())

    def add(self, table: Table, frame: Frame, logits: torch.Tensor, step: int):
        """Masks of `logits` (n, h, w), of which `step` may be at the image's size at once."""
        columns = torch.cat([table.scores[:, None], table.stability[:, None], table.boxes, table.points], dim=1)
        self._parts.append(_Part(columns, frame, logits, None))
        self._waiting_bytes += logits.numel() * logits.element_size()
        if self._waiting_bytes > self.max_bytes:
            self._parts = [part if part.logits is None else self._outlined(part, step) for part in self._parts]
            self._waiting_bytes = 0

    def _outlined(self, part: _Part, step: int) -> _Part:
        outlines = changes(part.logits, part.frame, self.threshold, step, self.use_triton)
        return part._replace(logits=None, outlines=outlines)

    def columns(self) -> torch.Tensor | None:
        """float32 (n, 8) of all masks, of which `Table` tells; None where there is no mask."""
        return torch.cat([part.columns for part in self._parts]) if self._parts else None

    def frames(self) -> tuple[list[Frame], np.ndarray]:
        """The frame of each part, and how many masks it has."""
        return [part.frame for part in self._parts], np.array([len(part.columns) for part in self._parts], dtype=int)

    def outlines(self, kept: np.ndarray, step: int) -> RunLengthMasks:
        """The masks `kept` (k,), in their order."""
        order, pieces, waiting, start = [], [], defaultdict(list), 0
        for part in self._parts:
            places = np.flatnonzero((kept >= start) & (kept < start + len(part.columns)))
            own = kept[places] - start
            start += len(part.columns)
            if part.logits is not None:
                waiting[part.frame] += [(place, part.logits[number]) for place, number in zip(places, own.tolist())]
            elif len(places):
                pieces.append(select_changes(*part.outlines, torch.from_numpy(own).to(part.columns.device)))
                order += places.tolist()
        at_once = 256 if self.use_triton else step
        for frame, masks in waiting.items():
            for first in range(0, len(masks), at_once):
                places, logits = zip(*masks[first : first + at_once])
                pieces.append(changes(torch.stack(logits), frame, self.threshold, step, self.use_triton))
                order += places
        if not pieces:
            nothing = np.zeros(0, dtype=np.int32)
            return RunLengthMasks.from_changes(*self.image, nothing, nothing)
        positions, counts = (torch.cat(tensors).cpu().numpy() for tensors in zip(*pieces))
        return RunLengthMasks.from_changes(*self.image, positions, counts)[np.argsort(order)]
