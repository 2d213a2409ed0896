"""The settings of all parts of a benchmark."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .. import SamLighteningConfig, SamLighteningModel
from .measure import building, matrix_ceiling, release_memory


# `Settings.__post_init__` replaces it by the device's default.
_BY_DEVICE: Any = None


@dataclass
class Settings:
    """The device, models and shapes of a benchmark. By default it takes a few minutes: on a CPU, few rows.

    Attributes:
        device: the device.
        batch_sizes: numbers of images.
        prompt_counts: numbers of prompts.
        resolutions: sides of square images in pixels, for the part "resolution".
        image_sizes: (height, width) of the images in the part "prompt".
        box_counts: numbers of boxes on an image, for the part "boxes".
        points_per_side: of the grid of everything mode, for the parts "generation" and "candidates".
        folder_size: number of images in the folder of the part "generation".
        training_batch_size: number of images in a training step.
        compile: measure under torch.compile too, which takes most of the time.
        compile_peers: measure SAM ViT-H and ViT-L under torch.compile too, beside ViT-B.
        checkpoint: folder of weights, for comparisons on real ones.
        images: folder of photographs.
        dtype: dtype of our model and of the peers' rows in half precision; bfloat16 on CUDA, float32 elsewhere.
        config: config of our model, with random weights where only time counts.
    """

    device: torch.device
    batch_sizes: tuple[int, ...] = _BY_DEVICE
    prompt_counts: tuple[int, ...] = _BY_DEVICE
    resolutions: tuple[int, ...] = _BY_DEVICE
    image_sizes: tuple[tuple[int, int], ...] = _BY_DEVICE
    box_counts: tuple[int, ...] = _BY_DEVICE
    points_per_side: int = _BY_DEVICE
    folder_size: int = _BY_DEVICE
    training_batch_size: int = _BY_DEVICE
    compile: bool = _BY_DEVICE
    compile_peers: bool = False
    checkpoint: Path | None = None
    images: Path | None = None
    dtype: torch.dtype = _BY_DEVICE
    config: SamLighteningConfig = field(default_factory=SamLighteningConfig)

    def __post_init__(self):
        on_cuda = self.device.type == "cuda"
        defaults = {
            "batch_sizes": (1, 8, 32) if on_cuda else (1,),
            "prompt_counts": (1, 16, 64, 256) if on_cuda else (1, 16),
            "resolutions": (1024, 2048, 4096) if on_cuda else (256, 512),
            "image_sizes": ((683, 1024), (2000, 3000)) if on_cuda else ((683, 1024),),
            "box_counts": (4, 16, 64, 256) if on_cuda else (4, 16),
            "points_per_side": 32 if on_cuda else 8,
            "folder_size": 60 if on_cuda else 2,
            "training_batch_size": 16 if on_cuda else 1,
            "compile": on_cuda,
            "dtype": torch.bfloat16 if on_cuda else torch.float32,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def ceiling(self) -> dict[str, float]:
        """The limits of the device (see `matrix_ceiling`), measured at the first access."""
        ceiling = matrix_ceiling(self.device, self.dtype)
        release_memory(self.device)
        return ceiling

    def make_model(
        self, config: SamLighteningConfig | None = None, dtype: torch.dtype | None = None
    ) -> SamLighteningModel:
        """Create our model in eval mode on the device, with the same random weights each time."""
        with building(self.device, dtype or self.dtype):
            return SamLighteningModel(copy.deepcopy(config or self.config)).eval()
