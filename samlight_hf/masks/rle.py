"""Binary masks as run lengths in COCO's order: column by column, pixels outside and inside the mask in turn.

A mask of a photograph has a million pixels, but only about a thousand runs. Masks are therefore stored, copied from the
GPU and written as runs, and decoded to pixels only where they are used as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import overload

import numpy as np
import torch

from ..utils.reprs import ShortRepr


def mask_changes(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the pixels at which runs begin, on the masks' device; waits for it once.

    Args:
        masks: bool (n, H, W).

    Returns:
        int32 (total,), the column-major positions x * H + y of the pixels that differ from the one before, mask after
        mask; the pixel before the first counts as outside. And int32 (n,), the number of positions of each mask.
    """
    num_masks, height, width = masks.shape
    pixels = masks.transpose(1, 2).reshape(num_masks, height * width)
    changed = torch.empty_like(pixels)
    if pixels.numel():
        changed[:, 0] = pixels[:, 0]
        torch.ne(pixels[:, 1:], pixels[:, :-1], out=changed[:, 1:])
    if changed.is_cpu:  # NumPy is much faster where few are set
        positions = torch.from_numpy(np.flatnonzero(changed.numpy()))
    else:
        positions = changed.flatten().nonzero().squeeze(1)
    return (positions % max(1, height * width)).int(), changed.sum(dim=1, dtype=torch.int32)


def select_changes(
    positions: torch.Tensor, counts: torch.Tensor, selected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select masks from the output of `mask_changes`; waits for the device once.

    Args:
        positions, counts: of n masks, as `mask_changes` returns them.
        selected: int64 (k,), indices of masks, in any order.

    Returns:
        The positions and the counts of the k masks.
    """
    starts = counts.long().cumsum(0) - counts
    lengths = counts[selected].long()
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(selected) else 0
    # The k-th change of a selected mask lies k behind its first.
    shift = torch.repeat_interleave(starts[selected] - (ends - lengths), lengths, output_size=total)
    return positions[shift + torch.arange(total, device=positions.device)], counts[selected]


_RUNS_AT_ONCE = 2**16


@dataclass(frozen=True, eq=False, repr=False)
class RunLengthMasks(ShortRepr, Sequence):
    """A sequence of n masks of one size, stored as run lengths.

    An index gives one mask as bool (H, W); a slice or an index array gives `RunLengthMasks`.

    Attributes:
        height, width: of the masks, in pixels.
        runs: int64 (total,), the run lengths of all masks. The first run of a mask lies outside of it, and may be 0.
        offsets: int64 (n + 1,): the runs of mask i are `runs[offsets[i]:offsets[i + 1]]`. They sum to height * width.
        compressed: COCO's compressed counts of all masks, and int64 (n + 1,), where each mask's begin and end; or None
            if they are computed when they are asked for.
    """

    height: int
    width: int
    runs: np.ndarray
    offsets: np.ndarray
    compressed: tuple[bytes, np.ndarray] | None = field(default=None, repr=False)

    @classmethod
    def from_changes(cls, height: int, width: int, positions: np.ndarray, counts: np.ndarray) -> "RunLengthMasks":
        """Make run lengths from the output of `mask_changes`.

        Args:
            height, width: of the masks, in pixels.
            positions: int (total,), the pixels at which runs begin, mask after mask.
            counts: int (n,), the number of positions of each mask.
        """
        # Each run ends where the next one begins, and the last one of a mask at its last pixel.
        num_pixels, offsets = height * width, np.concatenate(([0], np.cumsum(counts + 1, dtype=np.int64)))
        ends = np.full(offsets[-1], num_pixels, dtype=np.int64)
        is_change = np.ones(len(ends), dtype=bool)
        is_change[offsets[1:] - 1] = False
        ends[is_change] = positions
        runs = np.diff(ends, prepend=0)
        runs[offsets[1:-1]] += num_pixels  # the first run of a mask begins at its own first pixel
        return cls(height, width, runs, offsets)

    @classmethod
    def from_masks(cls, masks: np.ndarray | torch.Tensor) -> "RunLengthMasks":
        """Make run lengths from masks, bool (n, H, W).

        Raises:
            ValueError: for another dtype or number of dimensions.
        """
        if isinstance(masks, np.ndarray) and min(masks.strides, default=0) < 0:  # a reversed view, which torch refuses
            masks = masks.copy()
        masks = torch.from_numpy(masks) if isinstance(masks, np.ndarray) else torch.as_tensor(masks)
        if masks.dtype != torch.bool or masks.ndim != 3:
            raise ValueError(f"masks are {masks.dtype} of shape {tuple(masks.shape)}, and must be bool (n, H, W).")
        positions, counts = mask_changes(masks)
        height, width = masks.shape[1:]
        return cls.from_changes(height, width, positions.cpu().numpy(), counts.cpu().numpy())

    @classmethod
    def from_runs(cls, height: int, width: int, runs: Sequence[np.ndarray]) -> "RunLengthMasks":
        """Make masks of the run lengths of each one, int64 (runs,), as `runs_of` returns them."""
        offsets = np.cumsum([0, *map(len, runs)])
        return cls(height, width, np.concatenate([np.zeros(0, dtype=np.int64), *runs]), offsets)

    @classmethod
    def joined(cls, parts: Sequence["RunLengthMasks"]) -> "RunLengthMasks":
        """Join masks of one size, all of which know their compressed counts, in order."""
        runs, characters = np.concatenate([part.runs for part in parts]), []
        lengths, sizes = [], []
        for part in parts:
            assert part.compressed is not None and (part.height, part.width) == (parts[0].height, parts[0].width)
            characters.append(part.compressed[0])
            lengths.append(np.diff(part.offsets))
            sizes.append(np.diff(part.compressed[1]))
        offsets, bounds = (np.concatenate(([0], np.cumsum(np.concatenate(each)))) for each in (lengths, sizes))
        return cls(parts[0].height, parts[0].width, runs, offsets, (b"".join(characters), bounds))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray) -> "RunLengthMasks": ...

    def __getitem__(self, index):
        if isinstance(index, int | np.integer):
            return self._decode(range(len(self))[index])
        index = np.arange(len(self))[index]
        lengths = np.diff(self.offsets)[index]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        # The k-th run of a selected mask lies k behind its first.
        source = np.repeat(self.offsets[index] - offsets[:-1], lengths) + np.arange(offsets[-1])
        compressed = None
        if self.compressed is not None:
            counts = _cut(*self.compressed)
            chosen = [counts[place] for place in index.tolist()]
            compressed = "".join(chosen).encode("ascii"), np.cumsum([0, *map(len, chosen)])
        return RunLengthMasks(self.height, self.width, self.runs[source], offsets, compressed)

    def __iter__(self):
        return map(self._decode, range(len(self)))

    def runs_of(self, index: int) -> np.ndarray:
        """Return the run lengths of one mask, int64 (runs,)."""
        return self.runs[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def areas(self) -> np.ndarray:
        """The number of pixels inside each mask, int64 (n,)."""
        # Every second run lies inside: of all runs those with odd numbers, or with even ones where a mask has an odd
        # first one.
        even, odd = (np.concatenate(([0], np.cumsum(self.runs[first::2], dtype=np.int64))) for first in (0, 1))
        starts, ends = self.offsets[:-1], self.offsets[1:]
        from_even, from_odd = odd[ends // 2] - odd[starts // 2], even[(ends + 1) // 2] - even[(starts + 1) // 2]
        return np.where(starts % 2, from_odd, from_even)

    def to_masks(self) -> np.ndarray:
        """Return the masks as pixels, bool (n, H, W)."""
        masks = np.zeros((len(self), self.width, self.height), dtype=bool)
        for index, mask in enumerate(masks):
            self._fill(index, mask.reshape(-1))
        return masks.transpose(0, 2, 1)

    def to_coco(self, compressed: bool = True) -> list[dict]:
        """Return the masks as COCO's RLE, which pycocotools reads.

        Args:
            compressed: return counts as str, else as lists of int.

        Returns:
            `{"size": [H, W], "counts": ...}` of each mask.
        """
        size = [self.height, self.width]
        if compressed:
            known = None if self.compressed is None else _cut(*self.compressed)
            all_counts = compress_runs(self.runs, self.offsets) if known is None else known
            return [{"size": size.copy(), "counts": counts} for counts in all_counts]
        return [{"size": size.copy(), "counts": self.runs_of(index).tolist()} for index in range(len(self))]

    def _decode(self, index: int) -> np.ndarray:
        pixels = np.zeros(self.height * self.width, dtype=bool)
        self._fill(index, pixels)
        return pixels.reshape(self.width, self.height).T

    def _fill(self, index: int, pixels: np.ndarray):
        """Set the pixels of a mask in zeros, (H * W,) column by column. There are far fewer runs than pixels."""
        bounds = np.cumsum(self.runs_of(index)).tolist()
        for start, end in zip(bounds[0::2], bounds[1::2]):
            pixels[start:end] = True


def compress_runs(runs: np.ndarray, offsets: np.ndarray) -> list[str]:
    """Write COCO's compressed counts of many masks at once; `run_lengths` describes the format, and reads it.

    Args:
        runs, offsets: as in `RunLengthMasks`.

    Returns:
        The counts of each mask.
    """
    # Some masks at a time, so that what lies between stays in the cache, in memory that was used before.
    cuts = np.searchsorted(offsets, np.arange(0, len(runs), _RUNS_AT_ONCE)).tolist()
    counts: list[str] = []
    for first, last in pairwise([*dict.fromkeys(cuts), len(offsets) - 1]):
        start, end = offsets[first], offsets[last]
        counts += _compress_runs(runs[start:end], offsets[first : last + 1] - start)
    return counts


def _compress_runs(runs: np.ndarray, offsets: np.ndarray) -> list[str]:
    # Half of the memory is read and written with 32 bits, which a difference of two runs fits into, too.
    values: np.ndarray = runs.astype(np.int32 if runs.max(initial=0) < 2**31 else np.int64)
    values[2:] -= runs[:-2].astype(values.dtype)
    # The first three runs of a mask. Where one has fewer, they are the first of the next mask, or the last of all.
    first = np.minimum(offsets[:-1, None] + np.arange(3), len(runs) - 1)
    values[first] = runs[first]

    # Groups of 5 bits: a number from -16 to 15 has one, from -512 to 511 two. `sizes` are the numbers, or for negative
    # ones their complements. Most numbers have one group, so that fewer are looked at for each further one.
    sizes = values ^ (values >> 8 * values.itemsize - 1)
    more = sizes >= 16
    lengths = more.view(np.uint8) + np.uint8(1)
    longer, limit = np.flatnonzero(more), 512
    while len(longer := longer[sizes[longer] >= limit]):
        lengths[longer] += 1
        limit <<= 5
    ends = np.cumsum(lengths, dtype=np.int64)
    places, characters = ends - lengths, np.empty(ends[-1] if len(ends) else 0, dtype=np.uint8)
    bounds = np.concatenate((places, [len(characters)]))[offsets]
    while len(values):
        more = sizes >= 16
        characters[places] = 48 + (values.astype(np.uint8) & 31) + 32 * more.view(np.uint8)
        # An arithmetic shift: a negative number ends as -1.
        left = np.flatnonzero(more)
        values, sizes, places = values[left] >> 5, sizes[left] >> 5, places[left] + 1
    return _cut(characters.tobytes(), bounds)


def _cut(characters: bytes, bounds: np.ndarray) -> list[str]:
    text = characters.decode("ascii")
    return [text[start:end] for start, end in pairwise(bounds.tolist())]


@lru_cache(maxsize=1)  # a mask is checked, and then decoded
def run_lengths(counts: str | bytes) -> np.ndarray:
    """Read the runs of a compressed COCO RLE; the inverse of `compress_runs`.

    Each number is written in groups of 5 bits, lowest first, one character each: 48 + bits + 32 where another group
    follows. The highest bit of the last group is the sign. From the fourth run on, the difference from the run before
    the last is written. Needed because pycocotools accepts runs that end too early without an error, and then decodes
    uninitialised memory or does not return.

    Returns:
        int64 (runs,), read-only: pixels outside and inside the mask in turn, column by column.

    Raises:
        ValueError: for counts that no encoder writes. The caller checks the sum of the runs.
    """
    codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64)
    codes -= 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("the counts of an RLE are empty, cut short, or have a character outside of its alphabet.")
    ends = np.flatnonzero((codes & 32) == 0) + 1
    starts = np.concatenate(([0], ends[:-1]))
    num_groups = ends - starts
    if num_groups.max() > 7:  # 35 bits: more than any run of an image, and no overflow below
        raise ValueError("the counts of an RLE have a run of more than 35 bits.")
    group = np.arange(len(codes)) - np.repeat(starts, num_groups)
    runs = np.add.reduceat((codes & 31) << (5 * group), starts)
    runs -= (codes[ends - 1] & 16 > 0) * (1 << 5 * num_groups)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    runs.flags.writeable = False
    return runs


def text_rle(rle: dict) -> dict:
    """Return a compressed RLE with counts as str, which JSON can hold."""
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def encode_rle(mask: np.ndarray) -> dict:
    """Return the compressed COCO RLE of a mask, (H, W) of bool or numbers, with counts as str."""
    pixels = np.asarray(mask, dtype=bool).ravel(order="F")
    positions = np.flatnonzero(np.diff(pixels, prepend=False))
    height, width = mask.shape
    return RunLengthMasks.from_changes(height, width, positions, np.array([len(positions)])).to_coco()[0]
