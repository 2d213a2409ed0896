"""The annotated masks of an image as run lengths, which are small to transfer and become pixels on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data import Instance, Sample
from ..data.clicks import deepest_point
from ..masks.rle import run_lengths
from .models import to_device


@dataclass(frozen=True, eq=False)
class Targets:
    """The masks of n instances of an image. A slice selects instances.

    Attributes:
        image: the sample's id.
        height: height of the image.
        width: width of the image.
        instances: the instances, in the order of the masks.
        runs: int32 (total,), numbers of pixels outside and inside in turn, column by column, mask after mask. Each mask
            has an even number of runs, so that every second run is inside.
        offsets: int64 (n + 1,): the runs of mask i are `runs[offsets[i]:offsets[i + 1]]`.
        first_clicks: int64 (n, 2), x and y of the deepest point of each mask; None if there are to be no clicks.
    """

    image: str
    height: int
    width: int
    instances: Sequence[Instance]
    runs: np.ndarray
    offsets: np.ndarray
    first_clicks: np.ndarray | None = None

    @classmethod
    def of(cls, sample: Sample, instances: Sequence[Instance], with_clicks: bool = False) -> "Targets":
        """Create the targets of some of the sample's instances."""
        runs = [run_lengths(instance.rle["counts"]) for instance in instances]
        runs = [np.append(lengths, [0] * (len(lengths) % 2)) for lengths in runs]
        offsets = np.cumsum([0, *map(len, runs)])
        flat: Any = np.concatenate(runs) if runs else []
        clicks = None
        if with_clicks:
            points = [deepest_point(instance.mask())[0] for instance in instances]
            clicks = np.array(points, dtype=np.int64).reshape(-1, 2)
        flat = np.asarray(flat, dtype=np.int32)
        return cls(sample.id, sample.height, sample.width, instances, flat, offsets, clicks)

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, chosen: slice) -> "Targets":
        start, stop, _ = chosen.indices(len(self))
        offsets = self.offsets[start : stop + 1]
        runs = self.runs[offsets[0] : offsets[-1]]
        clicks = None if self.first_clicks is None else self.first_clicks[start:stop]
        instances = self.instances[start:stop]
        return Targets(self.image, self.height, self.width, instances, runs, offsets - offsets[0], clicks)

    def masks(self, device: torch.device) -> torch.Tensor:
        """Return bool masks (n, H, W) on the device, without waiting for it."""
        runs = to_device(torch.from_numpy(self.runs), device)
        is_inside = torch.arange(len(runs), device=device) % 2 == 1
        size = len(self) * self.height * self.width
        columns = is_inside.repeat_interleave(runs, output_size=size)  # with a known size nothing waits
        return columns.view(len(self), self.width, self.height).transpose(1, 2).contiguous()
