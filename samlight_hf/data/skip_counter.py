"""Count skipped data in shared memory: all worker processes write, the main process reads."""

import math
from collections.abc import Callable

import torch
from torch.utils.data import get_worker_info

from .samples import MAX_SKIPPED_SHARE, SkipReason, SkipReport


REASONS = tuple(SkipReason)

# The share of unusable images is judged only after this many, or after all of a smaller set.
MIN_READ = 100

# In place of the index of a source: what cannot be used is a cut-out.
CUTOUTS = -1

# One row for the main process and each of its workers.
NUM_ROWS = 257


class SkipCounter:
    """Counts of skipped data by reason, with one example of each, in memory that forked and spawned workers share.

    Each worker writes to its own row, so no lock is needed. An image that is read twice counts twice.
    `NOTHING_IN_VIEW` is counted but never makes `check` raise: it is a fault of the random crop, not of the data.

    Args:
        max_skipped: share of unusable images among those read, from 0 to 1, above which `check` raises. Until all
            images have been read, `check` allows for chance: the unusable ones may come first.
        num_images: number of all images; infinite if unknown.

    Raises:
        ValueError: if `max_skipped` is out of range.
    """

    def __init__(self, max_skipped: float = MAX_SKIPPED_SHARE, num_images: float = math.inf):
        if not 0 <= max_skipped <= 1:
            raise ValueError(f"max_skipped={max_skipped!r} must be from 0 to 1.")
        self.max_skipped, self.num_images = max_skipped, num_images
        self._num_read = torch.zeros(NUM_ROWS, dtype=torch.int64).share_memory_()
        # (row; kind: image, instance or part; reason; count, and source and index of the first image)
        self._skipped = torch.zeros(NUM_ROWS, 3, len(REASONS), 3, dtype=torch.int64).share_memory_()

    def add(self, report: SkipReport, source: int, image: int):
        """Count one image as read, and add its report.

        Args:
            report: the data skipped while reading the image.
            source, image: index of the dataset, and of the image in it; or `CUTOUTS` and the index of a cut-out.
        """
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
        """Number of images read so far by all workers."""
        return int(self._num_read.sum())

    def report(self, name: Callable[[int, int], str]) -> SkipReport:
        """Return the report of all workers so far.

        Args:
            name: returns the name of an image for the indices of its source and of the image.
        """
        report = SkipReport()
        for row, kind, reason in torch.nonzero(self._skipped[..., 0]).tolist():
            count, source, image = self._skipped[row, kind, reason].tolist()
            add = (report.add_image, report.add_instances, report.add_part)[kind]
            add(REASONS[reason], name(source, image), count)
        return report

    def check(self, name: Callable[[int, int], str]):
        """Raise ValueError if too many of the images read so far were skipped. `name`: as in `report`."""
        num_read = self.num_read
        if num_read < min(MIN_READ, self.num_images):
            return
        blamed = self._skipped[:, 0, :, 0].sum(0)
        blamed[REASONS.index(SkipReason.NOTHING_IN_VIEW)] = 0
        # Four standard deviations, because the check repeats after each skipped image.
        chance = (
            4 * math.sqrt(num_read * self.max_skipped * (1 - self.max_skipped)) if num_read < self.num_images else 0
        )
        if int(blamed.sum()) > self.max_skipped * num_read + chance:
            raise ValueError(
                f"{int(blamed.sum())} of the {num_read} images read so far cannot be used, more than "
                f"max_skipped={self.max_skipped:.0%}. Mend the data, or raise max_skipped if this is expected. "
                f"{self.report(name).summary()}"
            )
