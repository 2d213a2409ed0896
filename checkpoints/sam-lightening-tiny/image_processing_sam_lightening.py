"""SAM's image processor, with which transformers' mask-generation pipeline runs in any floating point type."""

import torch
from transformers import SamImageProcessor


class SamLighteningImageProcessor(SamImageProcessor):
    """[`SamImageProcessor`], except that `filter_masks` returns float32 scores, whatever the model's type."""

    _auto_class = "AutoImageProcessor"

    def filter_masks(self, masks: torch.Tensor, iou_scores: torch.Tensor, *args, **kwargs):
        # The pipeline gives them to torchvision's NMS, which wants them in the type of the boxes, and those are float32.
        return super().filter_masks(masks, iou_scores.float(), *args, **kwargs)


__all__ = ["SamLighteningImageProcessor"]
