"""A frozen network of timm whose features the student's image encoder learns while it learns masks."""

import importlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..loading import check_finite, weights_fingerprint
from ..utils.autocast import without_autocast
from ..utils.messages import one_line
from .teacher import PIXEL_MEAN, PIXEL_STD


NUM_MAPS = 2  # the last ones: earlier maps have edges and colors, which masks teach better


class FeatureTeacher:
    """A network for another task, such as a classifier of ImageNet or DINOv2, as a second source of training.

    It knows more kinds of objects than a few thousand images with masks show.

    Args:
        name: a model of timm, such as "tf_efficientnet_lite2" or "vit_small_patch14_dinov2.lvd142m", or a folder in
            timm's format (`timm.models.save_for_hf`).
        dtype: dtype of its weights and activations.
        image_size: height and width of its input in pixels. Rounded to a multiple of its coarsest stride.

    Raises:
        ImportError: where timm is missing.
        ValueError: for a name or folder that timm cannot load, and for weights that are not finite.
    """

    def __init__(self, name: str, dtype: torch.dtype = torch.bfloat16, image_size: int = 512):
        self.model = _load(name).to(dtype).eval().requires_grad_(False)
        check_finite(self.model.state_dict(), f"feature_teacher={name}")
        stride = max(self.model.feature_info.reduction())
        self.dtype, self.image_size = dtype, max(1, round(image_size / stride)) * stride
        self.widths: tuple[int, ...] = tuple(self.model.feature_info.channels())
        self._check_maps(name)
        self.fingerprint = weights_fingerprint(self.model)
        # From the student's normalization to that of this network.
        own, students = self.model.pretrained_cfg, (PIXEL_MEAN, PIXEL_STD)
        mean, std = (255 * torch.tensor(own[key]) for key in ("mean", "std"))
        self._scale = (torch.tensor(students[1]) / std).view(3, 1, 1)
        self._shift = ((torch.tensor(students[0]) - mean) / std).view(3, 1, 1)

    def _check_maps(self, name: str):
        """Raise ValueError for a network that cannot take the image size, or whose maps are not (B, C, h, w)."""
        image = torch.zeros(1, 3, self.image_size, self.image_size, dtype=self.dtype)
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                shapes = [tuple(features.shape) for features in self.model(image)]
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"feature_teacher={name} does not take images of {self.image_size} px ({one_line(error, 150)}). Use a "
                "convolutional network, or a ViT."
            ) from error
        if any(len(shape) != 4 or shape[1] != width for shape, width in zip(shapes, self.widths, strict=True)):
            raise ValueError(
                f"feature_teacher={name} has maps of shapes {shapes}, not (B, C, h, w) with C of {self.widths}. Use a "
                "convolutional network, or a ViT."
            )

    def to(self, device: torch.device) -> "FeatureTeacher":
        self.model.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    @without_autocast
    def targets(self, pixel_values: torch.Tensor, grid: int) -> list[torch.Tensor]:
        """Compute the targets of a batch, resampled to the student's grid of tokens.

        The LayerNorm has no weights, as for the layers of `Teacher.targets`.

        Args:
            pixel_values: pixels (B, 3, S, S), normalized for SAM.
            grid: height and width of the student's grid.

        Returns:
            The LayerNorm of each map, (B, grid, grid, C) in the teacher's dtype, coarser maps last.
        """
        with torch.no_grad():
            pixels = pixel_values * self._scale + self._shift
            if pixels.shape[-1] != self.image_size:
                pixels = F.interpolate(pixels, (self.image_size, self.image_size), mode="bilinear", antialias=True)
            maps = self.model(pixels.to(self.dtype).contiguous(memory_format=torch.channels_last))
            maps = [F.interpolate(features, (grid, grid), mode="bilinear") for features in maps]
            return [F.layer_norm(features.permute(0, 2, 3, 1), features.shape[1:2]) for features in maps]


def _load(name: str) -> Any:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f'feature_teacher={name} needs timm: pip install "samlight-hf[timm]"') from error
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    options = {"pretrained": True, "features_only": True, "out_indices": tuple(range(-NUM_MAPS, 0))}
    missing = _MissingWeights()
    log = logging.getLogger("timm")
    level, propagates = log.level, log.propagate
    log.addHandler(missing)
    log.setLevel(logging.INFO)
    log.propagate = False  # it also warns of the classifier's weights, which no feature needs
    try:
        try:
            model = timm.create_model(source, dynamic_img_size=True, **options)  # a ViT, for images of any size
        except TypeError:
            model = timm.create_model(source, **options)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"feature_teacher={name} cannot be loaded ({one_line(error, 200)}). Use a name of timm.list_models() or "
            "a folder of timm.models.save_for_hf."
        ) from error
    finally:
        log.removeHandler(missing)
        log.setLevel(level)
        log.propagate = propagates
    own = {_flat(key.removeprefix("model.")) for key in model.state_dict()}
    if lacking := [key for key in missing.names if _flat(key) in own]:  # not those of the classifier
        raise ValueError(
            f"feature_teacher={name} lacks {len(lacking)} weights, which would stay random, such as {lacking[0]}. Use "
            "the whole checkpoint."
        )
    return model


def _flat(key: str) -> str:
    """Return the name of a weight without levels, which differ between a network and its maps."""
    return key.replace(".", "_")


class _MissingWeights(logging.Handler):
    """Keeps the names of weights that a file lacks: timm says them in its log, and goes on with random ones."""

    names: tuple[str, ...] = ()

    def emit(self, record: logging.LogRecord):
        if found := re.match(r"Missing keys \((.*?)\)", record.getMessage()):
            self.names = tuple(found[1].split(", "))
