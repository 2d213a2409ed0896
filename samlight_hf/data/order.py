"""Which image is training example number n: index arithmetic, no state to save and none to restore."""

from collections.abc import Sequence

import numpy as np


# A cycle over several sources has at most so many slots: weights are exact to a ten thousandth.
MAX_CYCLE = 10_000


class ExampleOrder:
    """Maps n = 0, 1, 2, ... to (source, epoch of that source, image).

    Sources take turns in a fixed cycle, evenly spread by weight. Each one is walked through without replacement, in
    another random order in each of its epochs.

    Args:
        sizes: the number of images of each source.
        weights: how often each source is taken, relative to the others; by default as its size.

    Raises:
        ValueError: for weights that are not one positive number a source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0):
        weights = np.array(sizes if weights is None else weights, dtype=np.float64)
        if weights.shape != (len(sizes),) or not np.isfinite(weights).all() or weights.min() <= 0:
            raise ValueError(f"source_weights={weights.tolist()} must be {len(sizes)} positive numbers, one a source.")
        self.sizes, self.seed = tuple(sizes), seed
        length = 1 if len(sizes) == 1 else MAX_CYCLE
        self._slots = np.maximum(1, np.round(weights / weights.sum() * length).astype(np.int64))
        # Slot i of a source with k slots lies at (i + u) / k of the cycle.
        offsets = np.random.default_rng((seed, 0)).random(len(sizes))
        places = np.concatenate([(np.arange(k) + u) / k for k, u in zip(self._slots, offsets)])
        order = np.argsort(places, kind="stable")
        self._cycle = np.repeat(np.arange(len(sizes)), self._slots)[order]
        self._turn = np.concatenate([np.arange(k) for k in self._slots])[order]
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    @property
    def turns(self) -> list[int]:
        """How often each source is taken in a cycle."""
        return self._slots.tolist()

    def __call__(self, n: int) -> tuple[int, int, int]:
        """(source, epoch, image) of example number n."""
        cycle, slot = divmod(n, len(self._cycle))
        source = int(self._cycle[slot])
        epoch, position = divmod(cycle * int(self._slots[source]) + int(self._turn[slot]), self.sizes[source])
        return source, epoch, int(self._permutation(source, epoch)[position])

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        if (source, epoch) not in self._permutations:
            # One for each source is enough: examples are asked for nearly in order.
            self._permutations = {key: kept for key, kept in self._permutations.items() if key[0] != source}
            generator = np.random.default_rng((self.seed, 1, source, epoch))
            images = np.arange(self.sizes[source], dtype=np.int32)  # half the memory, in every worker process
            generator.shuffle(images)
            self._permutations[source, epoch] = images
        return self._permutations[source, epoch]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_permutations": {}}
