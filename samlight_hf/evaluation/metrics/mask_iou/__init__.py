"""The metric `mask_iou` for the `evaluate` library; its functions in `.iou` need only numpy or torch.

    metric = evaluate.load(samlight_hf.evaluation.metrics.mask_iou.PATH)

The folder imports nothing from the package: `evaluate` copies `mask_iou.py` and `iou.py` elsewhere and imports them
there.
"""

import os


PATH = os.path.dirname(os.path.abspath(__file__))
