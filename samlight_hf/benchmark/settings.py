"""What all parts of a benchmark are told."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from .. import SamLighteningConfig, SamLighteningModel
from .measure import building, matrix_ceiling, release_memory


@dataclass
class Settings:
    """Where a benchmark runs and on what. By default what this machine can do in a few minutes: on a CPU, few rows.

    Attributes:
        dtype: of our model and of the peers' rows in half precision; bfloat16 on CUDA, float32 elsewhere.
        config: of our model, with random weights where only time counts.
        checkpoint, images: folders of weights and photographs, for what must be measured on real ones.
        resolutions: sides of square images in pixels, for the part "resolution".
        compile: rows under torch.compile too, which take most of the time.
        compile_peers: SAM ViT-H and ViT-L under torch.compile too, beside ViT-B.
    """

    device: torch.device
    batch_sizes: tuple[int, ...] | None = None
    prompt_counts: tuple[int, ...] | None = None
    resolutions: tuple[int, ...] | None = None
    image_sizes: tuple[tuple[int, int], ...] | None = None  # (height, width)
    training_batch_size: int | None = None
    compile: bool | None = None
    compile_peers: bool = False
    checkpoint: Path | None = None
    images: Path | None = None
    dtype: torch.dtype | None = None
    config: SamLighteningConfig = field(default_factory=SamLighteningConfig)

    def __post_init__(self):
        on_cuda = self.device.type == "cuda"
        defaults = {
            "batch_sizes": (1, 8, 32) if on_cuda else (1,),
            "prompt_counts": (1, 16, 64, 256) if on_cuda else (1, 16),
            "resolutions": (1024, 2048, 4096) if on_cuda else (256, 512),
            "image_sizes": ((683, 1024), (2000, 3000)) if on_cuda else ((683, 1024),),
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
        """See `matrix_ceiling`; measured when it is first asked for."""
        ceiling = matrix_ceiling(self.device, self.dtype)
        release_memory(self.device)
        return ceiling

    def make_model(
        self, config: SamLighteningConfig | None = None, dtype: torch.dtype | None = None
    ) -> SamLighteningModel:
        """Ours with the same random weights each time, in eval mode, on the device."""
        with building(self.device, dtype or self.dtype):
            return SamLighteningModel(copy.deepcopy(config or self.config)).eval()
