"""The point prompts of a crop, in batches of one size, and what is computed with their masks, on the device."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import SamImageProcessor

from ..images.preprocessing import resized_size
from ..kernels.upscaled_masks import Frame
from ..masks.upscaling import visible_part
from ..utils.turns import read_here, turn
from .crops import Crop, point_grid
from .packed_logits import Place


class CropPrompts(NamedTuple):
    """The points of a crop.

    Attributes:
        rows: float32 (batches * batch_size, 5), as in `FastMaskDecoder.decode_ahead`, with a point in pixels of the
            image behind the point in pixels of the model's input; filled up behind the last point.
        num_points: Without those that fill up.
        min_iou: Masks with a predicted IoU that is not above it are not wanted; None if all are.
        batch_size: The number of points decoded at once.
        visible: See `FastMaskDecoder.decode`.
        place: Of the points' masks in the image.
        edges: float32 (2, 4), the boxes of the crop and of the image, XYXY.
    """

    rows: torch.Tensor
    num_points: int
    min_iou: float | None
    batch_size: int
    visible: tuple[int, int]
    place: Place
    edges: torch.Tensor

    @classmethod
    def make(
        cls,
        crop: Crop,
        image_size: tuple[int, int],
        points_per_side: int,
        min_iou: float | None,
        points_per_batch: int,
        logits_side: int,
        image_processor: SamImageProcessor,
        device: torch.device,
    ) -> "CropPrompts":
        """Make the points of a crop, or return those of the last crop of this kind, without waiting for the device.

        Args:
            crop: Of the image.
            image_size: (height, width) of the image.
            points_per_side: The number of points along each side of the crop.
            min_iou: See the class.
            points_per_batch: The largest number of points that may be decoded at once.
            logits_side: The number of rows, and of columns, of the decoder's logits.
            image_processor: The model's.
            device: Where the points are needed.
        """
        padded = image_processor.pad_size["height"], image_processor.pad_size["width"]
        made = _prompts_on(
            device, crop, image_size, points_per_side, min_iou, points_per_batch, logits_side, padded,
            image_processor.size["longest_edge"],
        )  # fmt: skip
        read_here(made.rows)  # with which all the others share memory
        return made


@lru_cache(maxsize=64)  # images of one size have the same
def _prompts_on(device: torch.device, *arguments) -> CropPrompts:
    with torch.device("cpu"):  # whatever the default is
        on_cpu = _prompts_on_cpu(*arguments)
    rows, place, edges = on_cpu.rows, on_cpu.place, on_cpu.edges
    parts = rows, place.factors, place.summands, place.tiles, edges
    # One copy: each takes as long as a kernel. It is not from pinned memory, which has been read when it returns.
    with turn(device):  # other streams, which read it in later turns, wait for it
        on_device = torch.cat([part.flatten() for part in parts]).to(device, non_blocking=True)
    own = on_device.split([part.numel() for part in parts])
    rows, factors, summands, tiles, edges = (tensor.view(part.shape) for tensor, part in zip(own, parts))
    return on_cpu._replace(rows=rows, place=Place(place.frame, factors, summands, tiles), edges=edges)


def _prompts_on_cpu(
    crop: Crop, image_size: tuple[int, int], points_per_side: int, min_iou: float | None, points_per_batch: int,
    logits_side: int, padded: tuple[int, int], longest_edge: int,
) -> CropPrompts:  # fmt: skip
    resized = resized_size(*crop.size, longest_edge)
    frame = Frame(padded, resized, crop.size, (crop.box_xyxy[1], crop.box_xyxy[0]), image_size)
    # Products in the stock pipeline's order: coordinates must be equal to the last bit.
    points = point_grid(points_per_side) * torch.tensor([crop.size[1], crop.size[0]])
    factors = resized[1] / crop.size[1], resized[0] / crop.size[0]
    in_input = torch.stack([points[:, 0] * factors[0], points[:, 1] * factors[1]], dim=1)
    least = torch.full((len(points), 1), -math.inf if min_iou is None else min_iou, dtype=torch.float32)
    rows = torch.cat([in_input, least, points + torch.tensor(crop.box_xyxy[:2])], dim=1)
    # All batches have one size, so that one CUDA graph serves: the last batch is filled up with its last point.
    batch_size = _even_batch(len(rows), points_per_batch)
    more = rows[-1:].repeat(-len(rows) % batch_size, 1)
    more[:, 2] = math.inf
    edges = torch.tensor([crop.box_xyxy, (0, 0, image_size[1], image_size[0])], dtype=torch.float32)
    place, visible = Place.make(frame, logits_side, logits_side), visible_part((logits_side,) * 2, padded, resized)
    return CropPrompts(torch.cat([rows, more]), len(points), min_iou, batch_size, visible, place, edges)


def _even_batch(total: int, most: int) -> int:
    """Return the size of nearly equal batches, of at most `most`, that split `total` into as few as possible."""
    return math.ceil(total / math.ceil(total / most))
