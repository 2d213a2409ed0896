"""Boxes and points as a person would give them for an object, drawn at random for training."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .clicks import deepest_point


@dataclass(frozen=True)
class PromptSampling:
    """How many objects of an image are prompted, and how.

    Attributes:
        num_prompts: targets for each image. Where it has more objects, a part of them is drawn; where it has fewer,
            they come again, with other boxes and points.
        num_uniforms: random numbers that go with each prompt, for what the trainer draws.
        box_noise: standard deviation of the noise on each side of a box, as a share of its width or height.
        max_box_noise_px: limit of that noise, in pixels of a frame of 1,024 (Segment Anything, appendix A).
        deepest_share: how many of the points lie deepest in the mask; the others lie anywhere in it.
        min_visible: an object of which less than this share is seen, in the crop and not covered, is left out.
        min_mask_cells: an object of fewer cells of the mask is left out.
        area_power: the next object is drawn in proportion to its area to this power. 0 takes all alike, so that where a
            person is one mask and her clothes are fifteen, few prompts ask for the person; with 0.5 an object of four
            times the area comes twice as often.
    """

    num_prompts: int = 16
    num_uniforms: int = 16
    box_noise: float = 0.1
    max_box_noise_px: float = 20.0
    deepest_share: float = 0.5
    min_visible: float = 0.2
    min_mask_cells: int = 4
    area_power: float = 0.0

    def __post_init__(self):
        for name, lowest in (("num_prompts", 1), ("num_uniforms", 0), ("min_mask_cells", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer of at least {lowest}.")
        for name in ("box_noise", "max_box_noise_px", "area_power"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative.")
        for name in ("deepest_share", "min_visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be from 0 to 1.")

    def order(self, areas: Callable[[], np.ndarray], number: int, generator: np.random.Generator) -> np.ndarray:
        """All of `number` objects in the order in which they are drawn; `areas` is asked for them where they matter."""
        if not self.area_power:
            return generator.permutation(number)
        # The largest of log-weights with Gumbel noise is a draw in proportion to the weights, and so is each next one.
        return np.argsort(-(self.area_power * np.log(areas()) + generator.gumbel(size=number)), kind="stable")

    def boxes(
        self, boxes: np.ndarray, size: tuple[int, int], image_size: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Boxes with noise, float32 (P, 4) xyxy, within an image of `size`, (width, height). All in pixels of the frame.

        Where noise takes more than half of a side, the exact side is kept: no box is without area.
        """
        limit = self.max_box_noise_px * image_size / 1024
        sides = boxes[:, 2:] - boxes[:, :2]
        noise = generator.normal(size=(len(boxes), 2, 2)) * (self.box_noise * sides)[:, None]
        corners = boxes.reshape(-1, 2, 2)  # (P, lower and upper, x and y)
        noisy = (corners + noise.clip(-limit, limit)).clip(0, size)
        kept = noisy[:, 1] - noisy[:, 0] >= sides / 2
        return np.where(kept[:, None], noisy, corners).reshape(-1, 4).astype(np.float32)

    def points(
        self, masks: np.ndarray, size: tuple[int, int], image_size: int, generator: np.random.Generator
    ) -> np.ndarray:
        """One point inside each of the bool (P, M, M) masks, none of them empty: float32 (P, 2), x and y of a pixel of
        the frame, within an image of `size`. A deepest point is the centre of its cell."""
        cell = image_size // masks.shape[-1]
        draws = generator.random((len(masks), 4))
        points = np.empty((len(masks), 2), dtype=np.float32)
        for point, mask, (choice, which, *within) in zip(points, masks, draws):
            if choice < self.deepest_share:
                point[:] = np.array(deepest_point(mask)[0]) * cell + (cell - 1) / 2
            else:
                inside = np.flatnonzero(mask)
                row, column = divmod(inside[int(which * len(inside))], mask.shape[1])
                point[:] = np.floor((np.array([column, row]) + within) * cell)
        return points.clip(0, np.array(size, dtype=np.float32) - 1)

    def uniforms(self, generator: np.random.Generator) -> np.ndarray:
        """float32 (P, num_uniforms) in [0, 1)."""
        return generator.random((self.num_prompts, self.num_uniforms), dtype=np.float32)
