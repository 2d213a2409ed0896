"""Pictures with instance masks: SA-1B tars, COCO, LVIS and any COCO-shaped JSON, all read as the same `Sample`.

Nothing bad is dropped in silence: what cannot be used is counted by reason in a `SkipReport`.
"""

from .coco import CocoDataset, load_dataset
from .dataset import PictureDataset
from .sa1b import Sa1bDataset
from .samples import Instance, Sample, SampleError, SkipReason, SkipReport, decode_masks


__all__ = [
    "CocoDataset",
    "Instance",
    "PictureDataset",
    "Sa1bDataset",
    "Sample",
    "SampleError",
    "SkipReason",
    "SkipReport",
    "decode_masks",
    "load_dataset",
]
