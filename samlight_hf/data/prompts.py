"""Draw box and point prompts for training, similar to those that a person would give."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .clicks import deepest_point


@dataclass(frozen=True)
class PromptSampling:
    """Settings for drawing objects, boxes and points.

    Attributes:
        num_prompts: number of prompted objects in an example. If the image has more, some are drawn; if it has fewer,
            they repeat with other boxes and points.
        num_uniforms: number of random numbers for each prompt, for choices of the trainer.
        box_noise: standard deviation of the noise on each side of a box, as a share of the box's width or height.
        max_box_noise_px: largest noise, in pixels of a frame of 1,024 (Segment Anything, appendix A).
        deepest_share: share of the points at the deepest pixel of the mask, from 0 to 1; the others are drawn uniformly
            from the mask.
        min_visible: least share of an object, from 0 to 1, that is inside the crop and not covered. Others are left
            out.
        min_mask_cells: least number of mask cells of an object. Others are left out.
        area_power: an object is drawn with a probability in proportion to its area to this power. With 0, all are
            equally likely: if a person is one mask and her clothes are fifteen, few prompts are for the person. With
            0.5, an object of four times the area is twice as likely.

    Raises:
        ValueError: if a value is out of range.
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
        """Draw a random order of objects.

        Args:
            areas: returns the area of each object, float (number,); called only if `area_power` is not 0.
            number: number of objects.
            generator: source of randomness.

        Returns:
            A permutation of the indices, (number,).
        """
        if not self.area_power:
            return generator.permutation(number)
        # Gumbel trick: sorting log-weights with Gumbel noise draws without replacement in proportion to the weights.
        return np.argsort(-(self.area_power * np.log(areas()) + generator.gumbel(size=number)), kind="stable")

    def boxes(
        self, boxes: np.ndarray, size: tuple[int, int], image_size: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Add noise to boxes. All values are in pixels of the frame.

        A side that noise would shrink to less than half stays exact, so no box is empty.

        Args:
            boxes: float (P, 4), xyxy.
            size: (width, height) of the image within the frame, to which boxes are clipped.
            image_size: side of the frame.
            generator: source of randomness.

        Returns:
            float32 (P, 4), xyxy.
        """
        limit = self.max_box_noise_px * image_size / 1024
        sides = boxes[:, 2:] - boxes[:, :2]
        noise = generator.normal(size=(len(boxes), 2, 2)) * (self.box_noise * sides)[:, None]
        corners = boxes.reshape(-1, 2, 2)  # (P, lower and upper, x and y)
        noisy = (corners + noise.clip(-limit, limit)).clip(0, size)
        is_large = noisy[:, 1] - noisy[:, 0] >= sides / 2
        return np.where(is_large[:, None], noisy, corners).reshape(-1, 4).astype(np.float32)

    def points(
        self, masks: np.ndarray, size: tuple[int, int], image_size: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Draw one point inside each mask: the centre of the deepest cell, or a random pixel of a random cell.

        Args:
            masks: bool (P, M, M), none of them empty.
            size: (width, height) of the image within the frame in pixels, to which points are clipped.
            image_size: side of the frame in pixels.
            generator: source of randomness.

        Returns:
            float32 (P, 2): x and y of a pixel of the frame.
        """
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
        """Draw uniform random numbers: float32 (num_prompts, num_uniforms) in [0, 1)."""
        return generator.random((self.num_prompts, self.num_uniforms), dtype=np.float32)
