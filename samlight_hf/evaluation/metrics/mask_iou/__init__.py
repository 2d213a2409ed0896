"""The metric `mask_iou` for the `evaluate` library, and its functions in `.iou`, which need no more than numpy or torch.

    metric = evaluate.load(samlight_hf.evaluation.metrics.mask_iou.PATH)

The folder stands alone: `evaluate` copies `mask_iou.py` and `iou.py` elsewhere and imports them from there.
"""

import os


PATH = os.path.dirname(os.path.abspath(__file__))
