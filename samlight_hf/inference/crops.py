"""Settings of everything mode, crops of the image and the grid of points on each crop, as in the stock pipeline."""

import math
from dataclasses import dataclass, fields
from itertools import product
from numbers import Integral
from typing import NamedTuple

import torch


DEFAULT_POINTS_PER_SIDE = 32
DEFAULT_PRED_IOU_THRESH = 0.88
DEFAULT_STABILITY_SCORE_THRESH = 0.95


@dataclass(frozen=True)
class MaskGenerationSettings:
    """The settings of everything mode. Names, meanings and defaults are those of the stock pipeline.

    Attributes:
        points_per_crop: Points along each side of the grid on the image; see also `crop_n_points_downscale_factor`.
        crops_n_layers: Number of layers of crops, which are segmented like images. Layer i has 4^i overlapping crops.
        crop_overlap_ratio: The overlap of crops of the first layer, as a fraction of the image's short side.
        crop_n_points_downscale_factor: The grid of layer i has `points_per_crop / factor^i` points along each side.
        pred_iou_thresh: Masks with a predicted IoU above it are kept; 0 keeps all.
        stability_score_thresh: Masks with a stability above it are kept; 0 keeps all. The stability is the area of the
            mask at logits above `mask_threshold + stability_score_offset`, divided by its area at logits above
            `mask_threshold - stability_score_offset`.
        mask_threshold: Pixels with logits above it are inside the mask.
        stability_score_offset: See `stability_score_thresh`.
        crops_nms_thresh: Of masks whose boxes have an IoU above it only the best one is kept.

    Raises:
        ValueError: If a setting is outside its range; the message names it.
    """

    points_per_crop: int = DEFAULT_POINTS_PER_SIDE
    crops_n_layers: int = 0
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: float = 1
    pred_iou_thresh: float = DEFAULT_PRED_IOU_THRESH
    stability_score_thresh: float = DEFAULT_STABILITY_SCORE_THRESH
    mask_threshold: float = 0.0
    stability_score_offset: float = 1.0
    crops_nms_thresh: float = 0.7

    def __post_init__(self):
        for name, least in (("points_per_crop", 1), ("crops_n_layers", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                kind = "a positive integer" if least else "an integer of at least 0"
                raise ValueError(f"{name}={value!r} must be {kind}.")
        for name in ("pred_iou_thresh", "stability_score_thresh", "crops_nms_thresh", "crop_overlap_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be from 0 to 1.")
        for name in ("mask_threshold", "stability_score_offset"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a finite number.")
        if self.stability_score_offset < 0:
            raise ValueError(f"stability_score_offset={self.stability_score_offset!r} must be at least 0.")
        if not self.crop_n_points_downscale_factor >= 1:
            raise ValueError(
                f"crop_n_points_downscale_factor={self.crop_n_points_downscale_factor!r} must be at least 1."
            )
        if self.points_per_side(self.crops_n_layers) < 1:
            raise ValueError(
                f"crop_n_points_downscale_factor={self.crop_n_points_downscale_factor} leaves no point of "
                f"points_per_crop={self.points_per_crop} in layer {self.crops_n_layers}."
            )

    def points_per_side(self, layer: int) -> int:
        """Return the number of points along each side of the grid on a crop of this layer; 0 is the image."""
        return int(self.points_per_crop / self.crop_n_points_downscale_factor**layer)


SETTING_NAMES = tuple(field.name for field in fields(MaskGenerationSettings))


class Crop(NamedTuple):
    """A part of the image.

    Attributes:
        box_xyxy: In pixels of the image; x2 and y2 lie behind the last pixel.
        layer: 0 for the image itself.
    """

    box_xyxy: tuple[int, int, int, int]
    layer: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image."""
        x1, y1, x2, y2 = self.box_xyxy
        return y2 - y1, x2 - x1


def crop_boxes(height: int, width: int, settings: MaskGenerationSettings) -> list[Crop]:
    """Return the image itself and, for each layer i, its 2^i x 2^i overlapping crops, column by column."""
    crops = [Crop((0, 0, width, height), 0)]
    for layer in range(1, settings.crops_n_layers + 1):
        per_side = 2**layer
        overlap = int(settings.crop_overlap_ratio * min(height, width) * (2 / per_side))
        crop_width, crop_height = (
            math.ceil((overlap * (per_side - 1) + length) / per_side) for length in (width, height)
        )
        for column, row in product(range(per_side), repeat=2):
            x1, y1 = column * (crop_width - overlap), row * (crop_height - overlap)
            crops.append(Crop((x1, y1, min(x1 + crop_width, width), min(y1 + crop_height, height)), layer))
    return crops


def point_grid(points_per_side: int) -> torch.Tensor:
    """Return the centres of equal cells, row by row: float32 (points_per_side^2, 2), x and y from 0 to 1."""
    margin = 1 / (2 * points_per_side)
    line = torch.linspace(margin, 1 - margin, points_per_side, dtype=torch.float32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)
