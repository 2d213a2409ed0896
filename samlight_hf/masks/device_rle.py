"""Run lengths and COCO's counts of masks, computed on the device that found where the masks change.

The run lengths of an image are some hundred thousand numbers. A GPU makes COCO's counts from them in much less time
than they take on a CPU, which has other images to read and to write. `RunLengthMasks.from_changes` is the same on a
CPU, step by step.
"""

import numpy as np
import torch

from ..utils.host_copies import HostCopy
from .rle import RunLengthMasks


_BITS = 5  # of a run in one character
_CHANGES_AT_ONCE = 2**19  # some hundred bytes of memory for each: large images with many masks have millions


def encode_changes(height: int, width: int, positions: torch.Tensor, counts: torch.Tensor) -> RunLengthMasks:
    """Make run lengths and COCO's counts from the output of `mask_changes`; waits for their device twice, or for parts.

    Args:
        height: Of the masks, in pixels.
        width: Likewise.
        positions: int32 (total,), the pixels at which runs begin, mask after mask.
        counts: int32 (n,), the number of positions of each mask.

    Returns:
        Masks on the CPU that know their compressed counts.
    """
    if not len(counts):
        return RunLengthMasks.from_changes(height, width, positions.cpu().numpy(), counts.cpu().numpy())
    if len(positions) <= _CHANGES_AT_ONCE:
        return _encode(height, width, positions, counts)
    counts_on_cpu = HostCopy(counts).arrays()[0].astype(np.int64)
    _, firsts = np.unique(counts_on_cpu.cumsum() // _CHANGES_AT_ONCE, return_index=True)
    num_masks, num_changes = np.diff([*firsts, len(counts)]), np.add.reduceat(counts_on_cpu, firsts)
    parts = zip(positions.split(num_changes.tolist()), counts.split(num_masks.tolist()))
    return RunLengthMasks.joined([_encode(height, width, *part) for part in parts])


def _encode(height: int, width: int, positions: torch.Tensor, counts: torch.Tensor) -> RunLengthMasks:
    runs, ends = _runs(height * width, positions, counts.long())
    on_cpu = HostCopy(runs, ends)
    values = _differences(runs, ends)
    # Numbers from -16 to 15 have one group of bits, those from -512 to 511 two.
    limits = 1 << _BITS * torch.arange(1, 7, device=runs.device, dtype=torch.int32) - 1
    num_groups = torch.bucketize(values ^ (values >> 31), limits, right=True) + 1
    last_places = num_groups.cumsum(0)
    places_of_masks = last_places[ends - 1]
    num_characters = HostCopy(places_of_masks[-1:])
    characters = _characters(values, num_groups, last_places, int(num_characters.wait()[0]))
    compressed = HostCopy(characters, places_of_masks)
    (own_runs, own_ends), (own_characters, own_places) = on_cpu.arrays(), compressed.arrays()
    offsets, bounds = (np.concatenate(([0], places)) for places in (own_ends, own_places))
    return RunLengthMasks(height, width, own_runs.astype(np.int64), offsets, (own_characters.tobytes(), bounds))


def _runs(num_pixels: int, positions: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the run lengths of all masks, int32 (total + n,), and where those of each mask end, int64 (n,)."""
    numbers = torch.arange(len(counts), device=counts.device)
    mask = torch.repeat_interleave(numbers, counts, output_size=len(positions))
    ends = (counts + 1).cumsum(0)
    run_ends = positions.new_full((len(positions) + len(counts),), num_pixels)
    run_ends[mask + torch.arange(len(positions), device=counts.device)] = positions
    runs = run_ends.clone()
    runs[1:] -= run_ends[:-1]
    runs[ends[:-1]] += num_pixels  # the first run of a mask begins at its own first pixel
    return runs, ends


def _differences(runs: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the numbers that COCO writes: from the fourth run of a mask on, the difference from the last but one."""
    values = runs.clone()
    values[2:] -= runs[:-2]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    # Where a mask has fewer than three runs, these are the first ones of the next mask, or the last of all.
    first = (starts[:, None] + torch.arange(3, device=runs.device)).flatten().clamp_(max=len(runs) - 1)
    values[first] = runs[first]
    return values


def _characters(
    values: torch.Tensor, num_groups: torch.Tensor, last_places: torch.Tensor, num_characters: int
) -> torch.Tensor:
    """Write each number in groups of bits, the lowest first, one character each: uint8 (num_characters,)."""
    numbers = torch.arange(len(values), device=values.device)
    source = torch.repeat_interleave(numbers, num_groups, output_size=num_characters)
    # The groups that follow in the same number; a further bit says whether there are any.
    left = last_places[source] - torch.arange(1, num_characters + 1, device=values.device)
    group = num_groups[source] - 1 - left
    bits = (values[source] >> _BITS * group) & 31  # an arithmetic shift: a negative number ends as -1
    return (bits + 48 + 32 * (left > 0)).to(torch.uint8)
