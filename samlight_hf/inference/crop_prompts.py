"""The point prompts of a crop, in batches of one size, and what is computed with their masks, on the device."""

import math
from typing import NamedTuple

import torch
from transformers import SamImageProcessor

from ..images.preprocessing import resized_size
from ..kernels.upscaled_masks import Frame
from ..masks.upscaling import visible_part
from .candidates import Place
from .crops import Crop, point_grid
from .packed_logits import reach_of


class CropPrompts(NamedTuple):
    """The points of a crop.

    Attributes:
        resized: float32 (batches * batch_size, 1, 2), in pixels of the model's input; filled up behind the last point.
        labels: int64 (batch_size, 1).
        points: float32 (num_points, 2), in pixels of the image.
        batch_size: The number of points decoded at once.
        visible: See `FastMaskDecoder.decode`.
        place: Of the points' masks in the image.
        edges: float32 (2, 4), the boxes of the crop and of the image, XYXY.
    """

    resized: torch.Tensor
    labels: torch.Tensor
    points: torch.Tensor
    batch_size: int
    visible: tuple[int, int]
    place: Place
    edges: torch.Tensor

    @property
    def num_points(self) -> int:
        return len(self.points)

    @classmethod
    def make(
        cls,
        crop: Crop,
        image_size: tuple[int, int],
        points_per_side: int,
        points_per_batch: int,
        logits_side: int,
        image_processor: SamImageProcessor,
        device: torch.device,
    ) -> "CropPrompts":
        """Make the points of a crop, without waiting for the device.

        Args:
            crop: Of the image.
            image_size: (height, width) of the image.
            points_per_side: The number of points along each side of the crop.
            points_per_batch: The largest number of points that may be decoded at once.
            logits_side: The number of rows, and of columns, of the decoder's logits.
            image_processor: The model's.
            device: Where the points are needed.
        """
        resized = resized_size(*crop.size, image_processor.size["longest_edge"])
        padded = image_processor.pad_size["height"], image_processor.pad_size["width"]
        frame = Frame(padded, resized, crop.size, (crop.box_xyxy[1], crop.box_xyxy[0]), image_size)
        # Products in the stock pipeline's order: coordinates must be equal to the last bit.
        points = point_grid(points_per_side) * torch.tensor([crop.size[1], crop.size[0]])
        factors = resized[1] / crop.size[1], resized[0] / crop.size[0]
        in_input = torch.stack([points[:, 0] * factors[0], points[:, 1] * factors[1]], dim=1)
        # All batches have one size, so that one CUDA graph serves: the last batch is filled up with its last point.
        batch_size = _even_batch(len(points), points_per_batch)
        in_input = torch.cat([in_input, in_input[-1:].expand(-len(points) % batch_size, -1)])
        points = points + torch.tensor(crop.box_xyxy[:2])
        edges = torch.tensor([crop.box_xyxy, (0, 0, image_size[1], image_size[0])], dtype=torch.float32)
        parts = in_input, points, reach_of(frame, logits_side, logits_side), edges
        # One copy: each takes as long as a kernel. It is not from pinned memory, which has been read when it returns.
        on_device = torch.cat([part.flatten() for part in parts]).to(device, non_blocking=True)
        own = on_device.split([part.numel() for part in parts])
        in_input, points, reach, edges = (tensor.view(part.shape) for tensor, part in zip(own, parts))
        labels = torch.ones(batch_size, 1, dtype=torch.int64, device=device)
        visible = visible_part((logits_side, logits_side), padded, resized)
        return cls(in_input[:, None], labels, points, batch_size, visible, Place(frame, reach), edges)


def _even_batch(total: int, most: int) -> int:
    """Return the size of nearly equal batches, of at most `most`, that split `total` into as few as possible."""
    return math.ceil(total / math.ceil(total / most))
