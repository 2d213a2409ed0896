"""Masks at the image's size, and their areas, boxes and run lengths, computed directly from the decoder's logits.

A decoder's logits are 256 x 256 numbers per mask, and about a million at the image's size. The filters of everything
mode and the run lengths of a mask are only a few numbers again. The Triton kernels compute each pixel from the logits
around it, with the same two bilinear resizes as the image processor, and store only counts and extremes, or one bit per
pixel, from which they find the positions at which a mask changes. If the masks themselves are needed, only these are
written: the logits are never stored at the image's size.
"""

from dataclasses import dataclass

import torch

from ..masks.boxes import mask_boxes
from ..masks.rle import mask_changes
from ..masks.upscaling import upscale_logits
from . import cpu_blocks
from .support import launch_again, normal_numbers, on_device_of, triton, why_not_tried


if triton is not None:
    from .upscaled_masks_triton import bits_kernel, changes_kernel, join_kernel, masks_kernel, measure_kernel


_POSITIONS = 1024  # of a thread block
_MASK_BLOCK = _ROWS, _COLUMNS = 32, 256
_MEASURE_BLOCK = _ROWS, _COLUMNS, 8, 256  # at most 32 rows; rows and columns of the logits that are looked at at once
_STRIPS = 32  # whose measures are put together at once
_NUM_MEASURES = 6
_OUTLINE_BYTES = 64 * 2**20  # of the masks whose changes are found in one launch


@dataclass(frozen=True)
class Frame:
    """The place of logits in an image; all sizes are (height, width).

    Attributes:
        padded: size of the model's input, which the logits cover.
        resized: size of the resized crop, which is at the top left of the model's input.
        crop: size of the crop, in pixels of the image.
        corner: (top, left) of the crop in the image.
        image: size of the image.
    """

    padded: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    corner: tuple[int, int]
    image: tuple[int, int]


def why_not_triton(logits: torch.Tensor, frame: Frame | None = None) -> str | None:
    """Return why the kernels cannot run on logits (n, h, w), as a sentence, or None if they can.

    Without a frame, the answer holds for frames of every kind.
    """
    if triton is None:
        return "Triton is not installed."
    if not logits.is_cuda:
        return f"the tensors are on {logits.device}."
    kinds = (False, True) if frame is None else (frame.resized != frame.crop,)
    return next(filter(None, (_why_not_tried(logits.device, logits.dtype, twice) for twice in kinds)), None)


def _why_not_tried(device: torch.device, dtype: torch.dtype, twice: bool) -> str | None:
    def attempt() -> bool:
        logits = (9 * normal_numbers(device)(2, 8, 8)).to(dtype)
        frame, other = (  # masks with aligned rows, and without
            Frame((32, 32), (32, 24) if twice else crop, crop, (2, 3), (50, 40)) for crop in ((31, 24), (30, 23))
        )
        thresholds = (0.0, 1.0, -1.0)
        measures = launch_measure(logits, frame, thresholds) - measure_reference(logits, frame, thresholds)
        positions, counts = launch_changes(logits, frame, 0.0)
        _, expected_counts = changes_reference(logits, frame, 0.0)
        different = [(launch_masks(logits, f, 0.0) != masks_reference(logits, f, 0.0)).sum() for f in (frame, other)]
        # A pixel at the threshold may fall on either side.
        differences = measures.abs().max(), (counts - expected_counts).abs().max(), *different
        return max(differences).item() <= 2 and len(positions) == counts.sum()

    return why_not_tried("masks at the image's size", device, (dtype, twice), attempt)


def measure(
    logits: torch.Tensor, frame: Frame, thresholds: tuple[float, float, float], step: int, use_triton: bool
) -> torch.Tensor:
    """Measure the areas and boxes of masks at the size of their crop.

    Args:
        logits: (n, h, w).
        frame: their place in the image.
        thresholds: of the mask, a higher one and a lower one.
        step: how many masks are upscaled at once without the kernel.
        use_triton: whether the kernel may be used.

    Returns:
        Int32 (n, 6): areas above the higher and the lower threshold, then the mask's first column, first row, last
        column and last row (x1, y1, x2, y2) in pixels of the crop, zeros for an empty mask.
    """
    if use_triton and why_not_triton(logits, frame) is None:
        return launch_measure(logits, frame, thresholds)
    parts = [measure_reference(part, frame, thresholds) for part in logits.split(step)] if len(logits) else []
    return torch.cat(parts) if parts else logits.new_zeros(0, _NUM_MEASURES, dtype=torch.int32)


def changes(
    logits: torch.Tensor,
    frame: Frame,
    threshold: float,
    step: int,
    use_triton: bool,
    columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where masks change at the image's size; pixels outside their crop are background.

    Args:
        logits: (n, h, w).
        frame: their place in the image.
        threshold: of the mask.
        step: how many masks are upscaled at once without the kernel.
        use_triton: whether the kernel may be used.
        columns: int32 (n, 2), the first and the last column of logits that a mask can depend on, if they are known. The
            kernel looks for the mask between them alone.

    Returns:
        Positions and counts, as `mask_changes` returns them.
    """
    use_triton = use_triton and why_not_triton(logits, frame) is None
    if use_triton:  # memory for the bits, the transposed logits, and the thresholded logits
        bytes_of_mask = frame.image[0] * frame.image[1] // 8 + 5 * logits.shape[1] * logits.shape[2]
        step = max(1, _OUTLINE_BYTES // bytes_of_mask)
    parts = []
    for start in range(0, len(logits), step):
        part = logits[start : start + step]
        if use_triton:
            own_columns = None if columns is None else columns[start : start + step]
            parts.append(launch_changes(part, frame, threshold, own_columns))
        else:
            parts.append(changes_reference(part, frame, threshold))
    if not parts:
        empty = torch.zeros(0, dtype=torch.int32, device=logits.device)
        return empty, empty
    positions, counts = zip(*parts)
    return torch.cat(positions), torch.cat(counts)


def masks(logits: torch.Tensor, frame: Frame, threshold: float, step: int, use_triton: bool) -> torch.Tensor:
    """Compute masks at the size of their crop.

    Args:
        logits: (n, h, w).
        frame: their place in the image.
        threshold: of the mask.
        step: how many masks' logits are upscaled at once without the kernel.
        use_triton: whether the kernel may be used.

    Returns:
        Bool (n, H, W), of the crop's size.
    """
    if use_triton and why_not_triton(logits, frame) is None:
        return launch_masks(logits, frame, threshold)
    parts = [masks_reference(part, frame, threshold) for part in logits.split(step)] if len(logits) else []
    if len(parts) == 1:  # without a copy
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros(0, *frame.crop, dtype=torch.bool, device=logits.device)


def masks_reference(logits: torch.Tensor, frame: Frame, threshold: float) -> torch.Tensor:
    return _upscaled(logits, frame) > threshold


def measure_reference(logits: torch.Tensor, frame: Frame, thresholds: tuple[float, float, float]) -> torch.Tensor:
    logits = _upscaled(logits, frame)
    middle, high, low = thresholds
    areas = [(logits > threshold).flatten(1).sum(dim=1, dtype=torch.int32) for threshold in (high, low)]
    return torch.cat([torch.stack(areas, dim=1), mask_boxes(logits > middle).int()], dim=1)


def changes_reference(logits: torch.Tensor, frame: Frame, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    masks = masks_reference(logits, frame, threshold)
    (top, left), (height, width) = frame.corner, frame.image
    if frame.crop != frame.image:
        right, bottom = width - left - frame.crop[1], height - top - frame.crop[0]
        masks = torch.nn.functional.pad(masks, (left, right, top, bottom))
    return mask_changes(masks)


def _upscaled(logits: torch.Tensor, frame: Frame) -> torch.Tensor:
    upscale = upscale_logits if cpu_blocks.why_not(logits) else cpu_blocks.upscale
    return upscale(logits, frame.padded, frame.resized, frame.crop)


def launch_masks(logits: torch.Tensor, frame: Frame, threshold: float) -> torch.Tensor:
    logits, (height, width) = logits.contiguous(), frame.crop
    masks = torch.empty(len(logits), height, width, dtype=torch.bool, device=logits.device)
    if len(logits):
        grid = len(logits), -(-width // _COLUMNS), -(-height // _ROWS)
        numbers = *_geometry(logits, frame), float(threshold)
        constants = *_MASK_BLOCK, frame.resized != frame.crop, width % 4 == 0
        with on_device_of(logits):
            launch_again(masks_kernel, grid, (logits, masks), numbers, constants, num_warps=1)
    return masks


def launch_measure(logits: torch.Tensor, frame: Frame, thresholds: tuple[float, float, float]) -> torch.Tensor:
    logits, strips = logits.contiguous(), triton.cdiv(frame.crop[0], _ROWS)
    # Each strip of rows has its own partial results, so no atomic operations are needed.
    partial = torch.empty(_NUM_MEASURES, len(logits), strips, dtype=torch.int32, device=logits.device)
    measures = partial.new_empty(len(logits), _NUM_MEASURES)
    if not len(logits):
        return measures
    numbers = strips, *_geometry(logits, frame), *map(float, thresholds), float(min(thresholds))
    constants = *_MEASURE_BLOCK, frame.resized != frame.crop
    with on_device_of(logits):
        launch_again(measure_kernel, (len(logits) * strips, 1, 1), (logits, partial), numbers, constants, num_warps=4)
        launch_again(join_kernel, (len(logits), 1, 1), (partial, measures), (strips,), (_STRIPS,), num_warps=1)
    return measures


def launch_changes(
    logits: torch.Tensor, frame: Frame, threshold: float, columns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    num_positions = frame.image[0] * frame.image[1]
    blocks = triton.cdiv(num_positions, _POSITIONS)
    counts = torch.empty(len(logits), blocks, dtype=torch.int32, device=logits.device)
    if not len(logits):
        return counts.view(-1), counts.view(-1)
    bits = torch.zeros(len(logits), blocks * _POSITIONS // 32, dtype=torch.int32, device=logits.device)
    spans = columns
    if spans is None:  # a pixel can only be in the mask if one of the logits around it is above the threshold
        spans = mask_boxes(logits.float() > threshold)[:, 0::2].int()  # first and last such column
    spans = spans.contiguous()
    transposed = logits.transpose(1, 2).contiguous()  # column-major, like the positions
    grid = len(logits) * blocks, 1, 1
    numbers = blocks, *_geometry(logits, frame), *frame.corner, frame.image[0], float(threshold)
    constants = _POSITIONS, frame.resized != frame.crop
    with on_device_of(logits):
        launch_again(bits_kernel, grid, (transposed, spans, bits), numbers, constants, num_warps=8)

    def run(positions: torch.Tensor, starts: torch.Tensor, write: bool):
        tensors, numbers = (bits, counts, starts, positions), (blocks, num_positions)
        with on_device_of(logits):
            launch_again(changes_kernel, grid, tensors, numbers, (_POSITIONS, write), num_warps=4)

    run(counts, counts, write=False)  # count first, to know where each block's positions go
    ends = counts.view(-1).cumsum(0)
    positions = torch.empty(int(ends[-1]), dtype=torch.int32, device=logits.device)
    run(positions, ends - counts.view(-1), write=True)
    return positions, counts.sum(dim=1, dtype=torch.int32)


def _geometry(logits: torch.Tensor, frame: Frame) -> tuple:
    """Return height, width and step along both axes, of the first resize and of the second, and the crop's size."""
    low, padded, resized, crop = tuple(logits.shape[-2:]), frame.padded, frame.resized, frame.crop
    return (
        *low, low[0] / padded[0], low[1] / padded[1],
        *resized, resized[0] / crop[0], resized[1] / crop[1], *crop,
    )  # fmt: skip
