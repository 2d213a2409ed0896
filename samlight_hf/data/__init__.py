"""Images with instance masks, all read as the same `Sample`, and training examples made from them.

Sources are SA-1B tars, COCO, LVIS and any COCO-shaped JSON, folders of images with or without masks, and synthetic
scenes. Nothing bad is dropped in silence: what cannot be used is counted by reason in a `SkipReport`.
"""

from importlib import import_module

from .coco import CocoDataset
from .dataset import ImageDataset
from .folders import ImageFolderDataset, MaskFolderDataset
from .loading import load_dataset
from .prompts import PromptSampling
from .sa1b import Sa1bDataset
from .samples import Instance, Sample, SampleError, SkipReason, SkipReport, decode_masks
from .synthetic import SyntheticScenes


__all__ = [
    "Augmentation",
    "CocoDataset",
    "Cutouts",
    "ImageDataset",
    "ImageFolderDataset",
    "Instance",
    "MaskFolderDataset",
    "PromptSampling",
    "Sa1bDataset",
    "Sample",
    "SampleError",
    "SkipReason",
    "SkipReport",
    "StreamedExamples",
    "SyntheticScenes",
    "TrainingExamples",
    "decode_masks",
    "load_dataset",
]

# Imported when asked for: the readers need neither torch nor datasets.
_MODULES = {
    "Augmentation": ".augmentation",
    "Cutouts": ".cutouts",
    "StreamedExamples": ".streaming",
    "TrainingExamples": ".training",
}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
