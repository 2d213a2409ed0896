"""The end of everything mode: of candidates whose boxes overlap the best one is kept, as run lengths on the CPU."""

import numpy as np

from ..kernels.upscaled_masks import Frame
from ..masks.device_rle import encode_changes
from ..masks.results import GeneratedMasks
from ..masks.rle import RunLengthMasks
from ..utils.host_copies import HostCopy
from .candidates import Candidates, Table


def choose(candidates: Candidates, iou_thresh: float, step: int, at_once: int) -> GeneratedMasks:
    """Suppress duplicates: of masks whose boxes overlap keep the best, and copy the result to the CPU.

    Args:
        candidates: All masks of an image.
        iou_thresh: Boxes with an IoU above it overlap.
        step: See `Candidates.add`.
        at_once: See `Candidates.outlines`.
    """
    from torchvision.ops import nms

    candidates.settle()
    table, numbers = candidates.columns()
    scores, _, _, boxes = Table.of(table)
    # The stock pipeline calls `batched_nms` with one group for all masks, which is this and takes longer.
    chosen = nms(boxes, scores, iou_thresh)
    table, numbers = table[chosen], numbers[chosen]
    on_cpu = HostCopy(table, numbers)
    positions, counts = candidates.outlines(numbers, step, at_once)
    if candidates.use_triton:
        masks = encode_changes(*candidates.size, positions, counts)
    else:
        masks = RunLengthMasks.from_changes(*candidates.size, positions.cpu().numpy(), counts.cpu().numpy())
    columns, kept = on_cpu.arrays()
    boxes_xyxy = columns[:, 4:].copy()
    boxes_xyxy[:, 2:] += (np.diff(masks.offsets) > 1)[:, None]  # pixel edges instead of the last pixel
    frames, num_masks = candidates.frames()
    crops = np.array([_crop_box(frame) for frame in frames], dtype=np.float32).reshape(-1, 4)
    crops = crops.repeat(num_masks, axis=0)[kept]
    return GeneratedMasks(masks, columns[:, 0].copy(), boxes_xyxy, columns[:, 3].copy(), columns[:, 1:3].copy(), crops)


def _crop_box(frame: Frame) -> tuple[int, int, int, int]:
    (top, left), (height, width) = frame.corner, frame.crop
    return left, top, left + width, top + height
