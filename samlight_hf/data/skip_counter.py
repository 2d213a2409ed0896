"""Counts of skipped images that all worker processes write and the main process reads."""

import math
from collections.abc import Callable

import torch
from torch.utils.data import get_worker_info

from .samples import MAX_SKIPPED_SHARE, SkipReason, SkipReport


REASONS = tuple(SkipReason)

# Fewer images than these say nothing about the share of bad ones.
MIN_READ = 100

# One row for the main process and each of its workers.
NUM_ROWS = 257


class SkipCounter:
    """Counts by reason, with one example of each, in shared memory: forked and spawned workers write to the same.

    Each worker writes to a row of its own, so that no lock is needed. An image that is read again counts again.
    `NOTHING_IN_VIEW` is counted but not held against the data: only the view is to blame.

    Args:
        max_skipped: the share of the images read above which `check` raises. Until all have been read, by more than chance
            explains: bad ones may come first.
        num_images: how many there are, where that is known.
    """

    def __init__(self, max_skipped: float = MAX_SKIPPED_SHARE, num_images: float = math.inf):
        if not 0 <= max_skipped <= 1:
            raise ValueError(f"max_skipped={max_skipped!r} must be from 0 to 1.")
        self.max_skipped, self.num_images = max_skipped, num_images
        self._num_read = torch.zeros(NUM_ROWS, dtype=torch.int64).share_memory_()
        # (row, 0 for images, 1 for instances or 2 for parts, reason, count and the first one's source and image)
        self._skipped = torch.zeros(NUM_ROWS, 3, len(REASONS), 3, dtype=torch.int64).share_memory_()

    def add(self, report: SkipReport, source: int, image: int):
        """Counts one image as read, with what was skipped of it."""
        worker = get_worker_info()
        row = 0 if worker is None else worker.id % (NUM_ROWS - 1) + 1
        self._num_read[row] += 1
        for kind, reasons in enumerate((report.images, report.instances, report.parts)):
            for reason, skipped in reasons.items():
                slot = self._skipped[row, kind, REASONS.index(SkipReason(reason))]
                if not slot[0]:
                    slot[1], slot[2] = source, image
                slot[0] += skipped.count

    @property
    def num_read(self) -> int:
        """Images read so far by all workers."""
        return int(self._num_read.sum())

    def report(self, name: Callable[[int, int], str]) -> SkipReport:
        """What was skipped so far. `name` gives the name of an image for its source and its number."""
        report = SkipReport()
        for row, kind, reason in torch.nonzero(self._skipped[..., 0]).tolist():
            count, source, image = self._skipped[row, kind, reason].tolist()
            add = (report.add_image, report.add_instances, report.add_part)[kind]
            add(REASONS[reason], name(source, image), count)
        return report

    def check(self, name: Callable[[int, int], str]):
        """Raises ValueError where too many of the images read were skipped."""
        num_read = self.num_read
        if num_read < MIN_READ:
            return
        blamed = self._skipped[:, 0, :, 0].sum(0)
        blamed[REASONS.index(SkipReason.NOTHING_IN_VIEW)] = 0
        # Four standard deviations: it is looked at after each image that is skipped.
        chance = (
            4 * math.sqrt(num_read * self.max_skipped * (1 - self.max_skipped)) if num_read < self.num_images else 0
        )
        if int(blamed.sum()) > self.max_skipped * num_read + chance:
            raise ValueError(
                f"{int(blamed.sum())} of the {num_read} images read so far cannot be used, more than "
                f"max_skipped={self.max_skipped:.0%}. Mend the data, or raise max_skipped if this is as it should be. "
                f"{self.report(name).summary()}"
            )
