"""Read images with instance masks as `Sample`s, and make training examples from them.

Sources are SA-1B tars, COCO, LVIS and other JSON files in COCO format, folders of images with or without masks, and
synthetic scenes. Nothing is dropped silently: a `SkipReport` counts unusable images and annotations by reason.
"""

import warnings
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

# Imported on first access, because the readers need neither torch nor datasets. For the same reason, readers import
# samlight_hf.masks, which needs torch, in functions.
_MODULES = {
    "Augmentation": ".augmentation",
    "Cutouts": ".cutouts",
    "StreamedExamples": ".streaming",
    "TrainingExamples": ".training",
}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    if name == "PictureDataset":
        warnings.warn(
            "samlight_hf.data.PictureDataset is now called ImageDataset. The old name will be removed.",
            DeprecationWarning,
            stacklevel=2,
        )
        return ImageDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
