# SPDX-License-Identifier: Apache-2.0
"""Image processor of SAM-Lightening: SAM's, extended so that the mask-generation pipeline runs in any float dtype."""

import torch
from transformers import SamImageProcessor


class SamLighteningImageProcessor(SamImageProcessor):
    """[`SamImageProcessor`] whose `filter_masks` returns float32 scores, whatever the model's dtype."""

    _auto_class = "AutoImageProcessor"

    def filter_masks(self, masks: torch.Tensor, iou_scores: torch.Tensor, *args, **kwargs):
        # The pipeline passes the scores to torchvision's NMS, which needs the dtype of the boxes, float32.
        return super().filter_masks(masks, iou_scores.float(), *args, **kwargs)


__all__ = ["SamLighteningImageProcessor"]
