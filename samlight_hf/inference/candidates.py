"""Candidate masks, stored as logits, their smallest form, until the suppression of duplicates has chosen among them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..kernels.upscaled_masks import Frame, changes
from ..masks.rle import select_changes
from .packed_logits import NeededTiles, PackedLogits, Place, columns_of, unpack_logits


class Table(NamedTuple):
    """Scores and places of n masks, in pixels of the image.

    Attributes:
        scores: float32 (n,), predicted IoU.
        points: float32 (n, 2), the prompts.
        stability: float32 (n,).
        boxes: float32 (n, 4), the first and the last pixel, XYXY.
    """

    scores: torch.Tensor
    points: torch.Tensor
    stability: torch.Tensor
    boxes: torch.Tensor

    @classmethod
    def of(cls, columns: torch.Tensor) -> "Table":
        """Split float32 (n, 8) into the columns of a table."""
        return cls(columns[:, 0], columns[:, 1:3], columns[:, 3], columns[:, 4:])


class _Part(NamedTuple):
    columns: torch.Tensor  # float32 (n, 8), see `Table`
    kept: torch.Tensor  # bool (n,), the masks that are candidates
    frame: Frame
    logits: PackedLogits | None  # of the kept masks, or None once they were converted to outlines
    outlines: tuple[torch.Tensor, torch.Tensor] | None  # all masks as `changes`, empty if not kept, instead of logits


class Candidates:
    """Masks of one image that have passed all filters but the suppression of duplicates, on the device.

    Logits become outlines (the positions where a mask changes) for the chosen masks only. Those that do not fit into
    `max_bytes` do at once. Masks that a filter has left out keep their number, so that nothing waits to learn
    how many are left.

    Args:
        size: (height, width) of the image.
        threshold: Pixels with logits above it are inside a mask.
        max_bytes: The memory that logits may take.
        use_triton: Use Triton kernels where they run.
        device: Of the masks.

    Attributes:
        have_numbers: Whether no predicted IoU is NaN, as far as the caller knows.
    """

    def __init__(
        self, size: tuple[int, int], threshold: float, max_bytes: float, use_triton: bool, device: torch.device
    ):
        self.size, self.threshold, self.max_bytes, self.use_triton = size, threshold, max_bytes, use_triton
        self.device, self.have_numbers = device, True
        self._parts: list[_Part] = []
        self._waiting_bytes = 0
        self._unsettled: tuple[_Part, NeededTiles, int] | None = None

    def add(self, columns: torch.Tensor, kept: torch.Tensor, place: Place, logits: torch.Tensor, step: int):
        """Add masks, without waiting for the device. Their logits are kept as they are until `settle` or the next call.

        Args:
            columns: float32 (n, 8), see `Table`.
            kept: bool (n,), the masks that are candidates.
            place: The place of the logits in the image.
            logits: (n, h, w), as the decoder gives them.
            step: The number of masks that may be at the image's size at once.
        """
        self.settle()
        part = _Part(columns, kept, place.frame, None, None)
        self._unsettled = part, NeededTiles(logits, Table.of(columns).boxes, kept, place), step

    def settle(self):
        """Reduce the logits of the masks that were added last; waits for the device until these were measured.

        It waits again where logits become outlines.
        """
        if self._unsettled is None:
            return
        part, needed, step = self._unsettled
        packed = needed.pack()
        del needed
        # Without the memory for what follows the masks are not lost.
        self._unsettled = None  # and the logits that it holds
        self._parts.append(part._replace(logits=packed))
        if self._waiting_bytes + packed.nbytes > self.max_bytes:
            del packed
            self._parts[-1] = self._outlined(self._parts[-1], step)
        else:
            self._waiting_bytes += packed.nbytes

    def _outlined(self, part: _Part, step: int) -> _Part:
        """Convert the logits of a part to outlines."""
        numbers = part.kept.nonzero().squeeze(1)
        counts, positions = torch.zeros(len(part.kept), dtype=torch.int32, device=numbers.device), []
        for some in numbers.split(self._unpacked_at_once(step)):
            some_positions, counts[some] = self._outlines_of([part], some, step)
            positions.append(some_positions)
        return part._replace(logits=None, outlines=(torch.cat(positions), counts))

    def _unpacked_at_once(self, step: int) -> int:
        return 160 if self.use_triton else max(16, step)  # those of 1024 x 683 pixels are one launch of `changes`

    def _outlines_of(
        self, parts: Sequence[_Part], numbers: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masks with these numbers among those of `parts`, which have one frame, as `changes`."""
        frame, count = parts[0].frame, len(numbers)
        places = torch.full((sum(len(part.columns) for part in parts),), count, device=numbers.device)
        places[numbers] = torch.arange(count, device=numbers.device)
        places_of_parts = places.split([len(part.columns) for part in parts])
        packed = [(part.logits, own) for part, own in zip(parts, places_of_parts) if part.logits is not None]
        logits = unpack_logits(packed, count)
        boxes = Table.of(torch.cat([part.columns for part in parts])[numbers]).boxes
        columns = columns_of(boxes, frame, logits.shape[2])
        return changes(logits, frame, self.threshold, step, self.use_triton, columns)

    def columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the candidates as float32 (n, 8), see `Table`, and their numbers (n,). Waits for the device."""
        if not self._parts:
            numbers = torch.zeros(0, dtype=torch.int64, device=self.device)
            return torch.zeros(0, 8, dtype=torch.float32, device=self.device), numbers
        numbers = torch.cat([part.kept for part in self._parts]).nonzero().squeeze(1)
        return torch.cat([part.columns for part in self._parts])[numbers], numbers

    def frames(self) -> tuple[list[Frame], np.ndarray]:
        """Return the frame and the number of masks of each part."""
        return [part.frame for part in self._parts], np.array([len(part.columns) for part in self._parts], dtype=int)

    def outlines(self, chosen: torch.Tensor, step: int, at_once: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chosen masks as `changes`.

        Args:
            chosen: int64 (k,), their numbers, in the order of the result.
            step: See `add`.
            at_once: With Triton kernels, a number of masks whose logits fit into the memory that is free now.
        """
        if not len(chosen):
            nothing = torch.zeros(0, dtype=torch.int32, device=chosen.device)
            return nothing, nothing
        at_once = max(self._unpacked_at_once(step), at_once if self.use_triton else 0)
        all_wait = all(part.logits is not None for part in self._parts)
        if len(chosen) <= at_once and all_wait and len({part.frame for part in self._parts}) == 1:
            return self._outlines_of(self._parts, chosen, step)
        return self._outlines_in_parts(chosen.cpu().numpy(), step)

    def _outlines_in_parts(self, chosen: np.ndarray, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute `outlines` of masks that are stored in several ways or are too many for one step."""
        order: list[int] = []  # the place in `chosen` of each mask of `outlines`
        outlines: list[tuple[torch.Tensor, torch.Tensor]] = []
        waiting: dict[Frame, list[tuple[_Part, np.ndarray, np.ndarray]]] = defaultdict(list)
        start, device = 0, self._parts[0].columns.device
        for part in self._parts:
            places = np.flatnonzero((chosen >= start) & (chosen < start + len(part.columns)))
            own = chosen[places] - start
            start += len(part.columns)
            if not len(places):
                continue
            if part.logits is not None:
                waiting[part.frame].append((part, own, places))
            else:
                assert part.outlines is not None
                positions, counts = part.outlines
                outlines.append(select_changes(positions, counts, torch.from_numpy(own).to(device)))
                order += places.tolist()
        for parts in waiting.values():
            for batch in _batches(parts, self._unpacked_at_once(step)):
                starts = np.cumsum([0, *(len(part.columns) for part, _, _ in batch)])
                numbers = np.concatenate([own + first for (_, own, _), first in zip(batch, starts)])
                on_device = torch.from_numpy(numbers).to(device)
                outlines.append(self._outlines_of([part for part, _, _ in batch], on_device, step))
                order += [place for _, _, places in batch for place in places.tolist()]
        all_positions, all_counts = (torch.cat(tensors) for tensors in zip(*outlines))
        return select_changes(all_positions, all_counts, torch.from_numpy(np.argsort(order)).to(device))


def _batches(
    parts: list[tuple[_Part, np.ndarray, np.ndarray]], most: int
) -> Iterator[list[tuple[_Part, np.ndarray, np.ndarray]]]:
    """Yield batches of at most `most` masks, in order; each part has numbers of masks and their places."""
    batch, free = [], most
    for part, own, places in parts:
        while len(own):
            batch.append((part, own[:free], places[:free]))
            own, places, free = own[free:], places[free:], free - len(batch[-1][1])
            if not free:
                yield batch
                batch, free = [], most
    if batch:
        yield batch
