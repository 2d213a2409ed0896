"""Map the index of a training example to an image by index arithmetic, without state to save or restore."""

from collections.abc import Sequence

import numpy as np


# Slots of a cycle over several sources: weights are exact to a ten-thousandth.
MAX_CYCLE = 10_000


class ExampleOrder:
    """Function from the index n of an example to (source, epoch of that source, image).

    Sources alternate in a fixed cycle, in which each is spread evenly by its weight. Each source is traversed without
    replacement, in a new random order in each of its epochs.

    Args:
        sizes: number of images of each source.
        weights: how often each source is read, relative to the others; by default in proportion to its size.
        seed: an integer of at least 0.

    Raises:
        ValueError: if `weights` is not one positive number for each source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0):
        shares = np.array(sizes if weights is None else weights, dtype=np.float64)
        if shares.shape != (len(sizes),) or not np.isfinite(shares).all() or shares.min() <= 0:
            raise ValueError(f"source_weights={shares.tolist()} must be {len(sizes)} positive numbers, one a source.")
        self.sizes, self.seed = tuple(sizes), seed
        length = 1 if len(sizes) == 1 else MAX_CYCLE
        self._slots = np.maximum(1, np.round(shares / shares.sum() * length).astype(np.int64))
        # Slot i of a source with k slots lies at (i + u) / k of the cycle.
        offsets = np.random.default_rng((seed, 0)).random(len(sizes))
        places = np.concatenate([(np.arange(k) + u) / k for k, u in zip(self._slots, offsets)])
        order = np.argsort(places, kind="stable")
        self._cycle = np.repeat(np.arange(len(sizes)), self._slots)[order]
        self._turn = np.concatenate([np.arange(k) for k in self._slots])[order]
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    @property
    def turns(self) -> list[int]:
        """Number of slots of each source in a cycle."""
        return self._slots.tolist()

    def __call__(self, n: int) -> tuple[int, int, int]:
        """Return (source, epoch of that source, image) for the example of index n."""
        cycle, slot = divmod(n, len(self._cycle))
        source = int(self._cycle[slot])
        epoch, position = divmod(cycle * int(self._slots[source]) + int(self._turn[slot]), self.sizes[source])
        return source, epoch, int(self._permutation(source, epoch)[position])

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        if (source, epoch) not in self._permutations:
            # One permutation for each source is enough: examples are read nearly in order.
            self._permutations = {key: images for key, images in self._permutations.items() if key[0] != source}
            generator = np.random.default_rng((self.seed, 1, source, epoch))
            images = np.arange(self.sizes[source], dtype=np.int32)  # half the memory, in every worker process
            generator.shuffle(images)
            self._permutations[source, epoch] = images
        return self._permutations[source, epoch]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_permutations": {}}
