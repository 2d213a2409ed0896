"""Results for one image: masks as pixels, or as run lengths with the prompts that gave them."""

from dataclasses import dataclass, fields
from numbers import Integral

import numpy as np

from ..utils.reprs import ShortRepr
from .rle import RunLengthMasks


def _check_part(part):
    """Refuse a single index: it would remove the first dimension of each field, and a loop would run over rows."""
    if isinstance(part, Integral):
        raise TypeError(f"[{part}] of masks is not possible: use result.masks[{part}], or a slice such as result[:10].")


@dataclass(frozen=True, repr=False)
class MaskResult(ShortRepr):
    """Masks of an image of H x W pixels; all fields keep their shape where the number of masks n is 0.

    Attributes:
        masks: bool (n, H, W).
        scores: float32 (n,), the predicted IoU with the true mask.
        boxes_xyxy: float32 (n, 4), the tight box of each mask as pixel edges: x2 and y2 lie behind the last pixel.
            Zeros for an empty mask.
    """

    masks: np.ndarray
    scores: np.ndarray
    boxes_xyxy: np.ndarray

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, part: slice | np.ndarray) -> "MaskResult":
        _check_part(part)
        return MaskResult(self.masks[part], self.scores[part], self.boxes_xyxy[part])


@dataclass(frozen=True, repr=False)
class GeneratedMasks(ShortRepr):
    """Masks of everything in an image, the best first; all fields keep their shape where the number of masks n is 0.

    Attributes:
        masks: a sequence of bool (H, W), stored as run lengths; `masks.to_coco()` gives COCO's RLE.
        scores: float32 (n,), the predicted IoU with the true mask.
        boxes_xyxy: float32 (n, 4), as in `MaskResult`.
        stability_scores: float32 (n,), the IoU of the mask at the lower threshold with the mask at the higher one.
        points_xy: float32 (n, 2), the point prompt of each mask, in pixels of the image.
        crop_boxes_xyxy: float32 (n, 4), the crop of each mask, as pixel edges of the image.
    """

    masks: RunLengthMasks
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    stability_scores: np.ndarray
    points_xy: np.ndarray
    crop_boxes_xyxy: np.ndarray

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, part: slice | np.ndarray) -> "GeneratedMasks":
        _check_part(part)
        return GeneratedMasks(*(getattr(self, field.name)[part] for field in fields(self)))

    def to_result(self) -> MaskResult:
        """Return the masks as pixels, with their scores and boxes."""
        return MaskResult(self.masks.to_masks(), self.scores, self.boxes_xyxy)
