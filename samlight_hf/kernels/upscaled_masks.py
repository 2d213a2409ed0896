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
from .support import normal_numbers, on_device_of, tl, triton, why_not_tried


_POSITIONS = 1024  # of a thread block
_MASK_BLOCK = {"ROWS": 32, "COLUMNS": 256, "num_warps": 1}
_MEASURE_BLOCK = {"ROWS": 32, "COLUMNS": 256, "NEAR_ROWS": 8, "NEAR_COLUMNS": 256, "num_warps": 4}  # at most 32 rows
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
        grid = len(logits), -(-width // _MASK_BLOCK["COLUMNS"]), -(-height // _MASK_BLOCK["ROWS"])
        with on_device_of(logits):
            _masks_kernel[grid](
                logits, masks, *_geometry(logits, frame), float(threshold), TWICE=frame.resized != frame.crop,
                ALIGNED=width % 4 == 0, **_MASK_BLOCK,
            )  # fmt: skip
    return masks


def launch_measure(logits: torch.Tensor, frame: Frame, thresholds: tuple[float, float, float]) -> torch.Tensor:
    logits, strips = logits.contiguous(), triton.cdiv(frame.crop[0], _MEASURE_BLOCK["ROWS"])
    # Each strip of rows has its own partial results, so no atomic operations are needed.
    partial = torch.empty(_NUM_MEASURES, len(logits), strips, dtype=torch.int32, device=logits.device)
    if not len(logits):
        return partial.new_zeros(0, _NUM_MEASURES)
    with on_device_of(logits):
        _measure_kernel[(len(logits) * strips,)](
            logits, partial, strips, *_geometry(logits, frame), *map(float, thresholds), float(min(thresholds)),
            TWICE=frame.resized != frame.crop, **_MEASURE_BLOCK,
        )  # fmt: skip
    areas, first, last = partial[:2].sum(dim=2), partial[2:4].amin(dim=2), partial[4:].amax(dim=2)
    empty = last[0] < 0
    return torch.cat([areas.int(), torch.cat([first, last]).masked_fill(empty, 0)]).T.contiguous()


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
    with on_device_of(logits):
        _bits_kernel[(len(logits) * blocks,)](
            transposed, spans, bits, blocks, *_geometry(logits, frame), *frame.corner, frame.image[0], float(threshold),
            POSITIONS=_POSITIONS, TWICE=frame.resized != frame.crop, num_warps=8,
        )  # fmt: skip

    def run(positions: torch.Tensor, starts: torch.Tensor, write: bool):
        with on_device_of(logits):
            _changes_kernel[(len(logits) * blocks,)](
                bits, counts, starts, positions, blocks, num_positions, POSITIONS=_POSITIONS, WRITE=write, num_warps=4
            )

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


if triton is not None:
    # Thread blocks are on the first axis of their grid where there may be many: the others have at most 65,535. Sizes
    # differ between images, and Triton must not compile a kernel for each.
    _SIZES = ["low_height", "low_width", "height", "width", "crop_height", "crop_width"]
    _PLACES = ["top", "left", "image_height"]

    @triton.jit
    def _neighbours(position, scale, length):
        """Return the two places on an axis of `length` that a bilinear resize reads, and the weight of the second."""
        source = tl.maximum(scale * (position.to(tl.float32) + 0.5) - 0.5, 0.0)
        first = tl.minimum(source.to(tl.int32), length - 1)
        return first, tl.minimum(first + 1, length - 1), source - first.to(tl.float32)

    @triton.jit
    def _mix(first, second, weight):
        """Interpolate linearly. Compilers may round the sum of two products in two ways: here all kernels agree."""
        return tl.fma(1.0 - weight, first, weight * second)

    @triton.jit
    def _resize_once(
        logits, y, x, low_height, low_width, scale_y, scale_x, BY_COLUMN: tl.constexpr
    ):  # fmt: skip
        """Interpolate the logits at the places y, x of the first resize."""
        y1, y2, weight_y = _neighbours(y, scale_y, low_height)
        x1, x2, weight_x = _neighbours(x, scale_x, low_width)
        if BY_COLUMN:
            x1, x2 = x1 * low_height, x2 * low_height
        else:
            y1, y2 = y1 * low_width, y2 * low_width
        upper_left = tl.load(logits + y1 + x1).to(tl.float32)
        upper_right = tl.load(logits + y1 + x2).to(tl.float32)
        lower_left = tl.load(logits + y2 + x1).to(tl.float32)
        lower_right = tl.load(logits + y2 + x2).to(tl.float32)
        return _mix(_mix(upper_left, upper_right, weight_x), _mix(lower_left, lower_right, weight_x), weight_y)

    @triton.jit
    def _pixel(
        logits, y, x, low_height, low_width, low_scale_y, low_scale_x, height, width, scale_y, scale_x,
        TWICE: tl.constexpr, BY_COLUMN: tl.constexpr,
    ):  # fmt: skip
        """Interpolate the logits, which are row-major or column-major, at the places y, x of the crop."""
        if TWICE:
            y1, y2, weight_y = _neighbours(y, scale_y, height)
            x1, x2, weight_x = _neighbours(x, scale_x, width)
            upper_left = _resize_once(logits, y1, x1, low_height, low_width, low_scale_y, low_scale_x, BY_COLUMN)
            upper_right = _resize_once(logits, y1, x2, low_height, low_width, low_scale_y, low_scale_x, BY_COLUMN)
            lower_left = _resize_once(logits, y2, x1, low_height, low_width, low_scale_y, low_scale_x, BY_COLUMN)
            lower_right = _resize_once(logits, y2, x2, low_height, low_width, low_scale_y, low_scale_x, BY_COLUMN)
            upper, lower = _mix(upper_left, upper_right, weight_x), _mix(lower_left, lower_right, weight_x)
            value = _mix(upper, lower, weight_y)
        else:
            value = _resize_once(logits, y, x, low_height, low_width, low_scale_y, low_scale_x, BY_COLUMN)
        return value

    # Pixels of a row are interpolated between two lines, which have the pixels' columns and the rows of what the row is
    # resized from. Rows are computed one after another: most need the lines of the row before.

    @triton.jit
    def _columns(x, low_width, low_scale_x, width, scale_x, TWICE: tl.constexpr):
        """Return the neighbours of the columns x among the logits, twice if there are two resizes, and the weights."""
        if TWICE:
            left, right, weight_x = _neighbours(x, scale_x, width)
            left_1, left_2, left_weight = _neighbours(left, low_scale_x, low_width)
            right_1, right_2, right_weight = _neighbours(right, low_scale_x, low_width)
            columns = (left_1, left_2, left_weight, right_1, right_2, right_weight, weight_x)
        else:
            columns = _neighbours(x, low_scale_x, low_width)
        return columns

    @triton.jit
    def _between(row, x1, x2, weight_x):
        """Interpolate a row of logits."""
        return _mix(tl.load(row + x1).to(tl.float32), tl.load(row + x2).to(tl.float32), weight_x)

    @triton.jit
    def _line(logits, y, columns, low_height, low_width, low_scale_y, TWICE: tl.constexpr):
        """Interpolate row y of the logits at the columns, or with two resizes that of the first one's result."""
        if TWICE:
            y1, y2, weight_y = _neighbours(y, low_scale_y, low_height)
            upper, lower = logits + y1 * low_width, logits + y2 * low_width
            left_1, left_2, left_weight, right_1, right_2, right_weight, weight_x = columns
            upper_left = _between(upper, left_1, left_2, left_weight)
            lower_left = _between(lower, left_1, left_2, left_weight)
            upper_right = _between(upper, right_1, right_2, right_weight)
            lower_right = _between(lower, right_1, right_2, right_weight)
            left, right = _mix(upper_left, lower_left, weight_y), _mix(upper_right, lower_right, weight_y)
            line = _mix(left, right, weight_x)
        else:
            x1, x2, weight_x = columns
            line = _between(logits + y * low_width, x1, x2, weight_x)
        return line

    @triton.jit
    def _lines(
        logits, y, columns, upper, lower, upper_y, lower_y,
        low_height, low_width, low_scale_y, height, scale_y, TWICE: tl.constexpr,
    ):  # fmt: skip
        """Return the lines that row y is between, their rows, and the weight of the second line.

        The lines of the row before are given, with their rows, and used again.
        """
        if TWICE:
            y1, y2, weight_y = _neighbours(y, scale_y, height)
        else:
            y1, y2, weight_y = _neighbours(y, low_scale_y, low_height)
        if y1 != upper_y:
            if y1 == lower_y:
                upper = lower
            else:
                upper = _line(logits, y1, columns, low_height, low_width, low_scale_y, TWICE)
            lower = _line(logits, y2, columns, low_height, low_width, low_scale_y, TWICE)
        return upper, lower, y1, y2, weight_y

    @triton.jit(do_not_specialize=_SIZES)
    def _masks_kernel(
        logits, masks,
        low_height, low_width, low_scale_y, low_scale_x, height, width, scale_y, scale_x, crop_height, crop_width,
        threshold,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, TWICE: tl.constexpr, ALIGNED: tl.constexpr,
    ):  # fmt: skip
        """Compute a block of one mask's pixels; with ALIGNED the width is a multiple of 4."""
        if ALIGNED:
            crop_width = crop_width // 4 * 4
        mask, top = tl.program_id(0).to(tl.int64), tl.program_id(2) * ROWS
        logits += mask * low_height * low_width
        masks += (mask * crop_height + top) * crop_width
        x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        columns = _columns(tl.minimum(x, crop_width - 1), low_width, low_scale_x, width, scale_x, TWICE)
        upper, lower = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
        upper_y, lower_y = -1, -1
        for row in range(tl.minimum(crop_height - top, ROWS)):
            upper, lower, upper_y, lower_y, weight_y = _lines(
                logits, top + row, columns, upper, lower, upper_y, lower_y,
                low_height, low_width, low_scale_y, height, scale_y, TWICE,
            )  # fmt: skip
            value = _mix(upper, lower, weight_y)
            tl.store(masks + row * crop_width + x, value > threshold, mask=x < crop_width)

    @triton.jit
    def _reached_columns(
        logits, top, bottom, lowest, low_height, low_width, low_scale_y, low_scale_x, scale_y, scale_x, crop_width,
        NEAR_ROWS: tl.constexpr, NEAR_COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Return the first column, and that after the last, that logits above `lowest` reach in the rows `top` to
        before `bottom` of the crop; 0 and 0 if there are none.
        """
        # The second resize reads less than a pixel of the first beyond its place, and the first less than a logit.
        scale, reach = low_scale_y * scale_y, low_scale_y + 1.0
        first_y = tl.maximum(scale * (top.to(tl.float32) + 0.5) - 0.5 - reach, 0.0).to(tl.int32)
        last_y = tl.minimum((scale * (bottom.to(tl.float32) - 0.5) - 0.5 + reach).to(tl.int32) + 1, low_height - 1)
        left, right = low_width, -1
        for near_left in range(0, low_width, NEAR_COLUMNS):
            near_x = near_left + tl.arange(0, NEAR_COLUMNS)
            above = tl.zeros((NEAR_COLUMNS,), tl.int1)
            for near_top in range(first_y, last_y + 1, NEAR_ROWS):
                for near_row in tl.static_range(NEAR_ROWS):  # loads that do not wait for each other
                    near_y = tl.minimum(near_top + near_row, last_y)
                    near = tl.load(logits + near_y * low_width + near_x, mask=near_x < low_width, other=float("-inf"))
                    above |= near.to(tl.float32) > lowest
            left = tl.minimum(left, tl.min(tl.where(above, near_x, low_width), axis=0))
            right = tl.maximum(right, tl.max(tl.where(above, near_x, -1), axis=0))
        scale, reach = low_scale_x * scale_x, low_scale_x + 1.0
        first = (tl.cast(left, tl.float32) - reach + 0.5) / scale - 1.5
        last = (tl.cast(right, tl.float32) + reach + 0.5) / scale + 1.5
        first, last = tl.maximum(first, 0.0).to(tl.int32), tl.minimum(last, crop_width.to(tl.float32)).to(tl.int32)
        return tl.where(right < 0, 0, first), tl.where(right < 0, 0, last)

    @triton.jit(do_not_specialize=["strips", *_SIZES])
    def _measure_kernel(
        logits, partial, strips,
        low_height, low_width, low_scale_y, low_scale_x, height, width, scale_y, scale_x, crop_height, crop_width,
        middle, high, low, lowest,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEAR_ROWS: tl.constexpr, NEAR_COLUMNS: tl.constexpr,
        TWICE: tl.constexpr,
    ):  # fmt: skip
        """Measure a strip of at most 32 rows of one mask, between the columns that logits above `lowest` reach."""
        mask, top = (tl.program_id(0) // strips).to(tl.int64), tl.program_id(0) % strips * ROWS
        logits += mask * low_height * low_width
        bottom = tl.minimum(top + ROWS, crop_height)
        first, last = _reached_columns(
            logits, top, bottom, lowest, low_height, low_width, low_scale_y, low_scale_x, scale_y, scale_x, crop_width,
            NEAR_ROWS, NEAR_COLUMNS,
        )  # fmt: skip
        place, num_partial = partial + tl.program_id(0), tl.num_programs(0).to(tl.int64)
        if first < last:
            area_high, area_low = tl.zeros((COLUMNS,), tl.int32), tl.zeros((COLUMNS,), tl.int32)
            first_x, last_x = tl.full((COLUMNS,), 2147483647, tl.int32), tl.full((COLUMNS,), -1, tl.int32)
            rows_inside = tl.zeros((COLUMNS,), tl.int32)  # a bit for each row of the strip
            for start in range(first, last, COLUMNS):
                x = start + tl.arange(0, COLUMNS)
                columns = _columns(tl.minimum(x, crop_width - 1), low_width, low_scale_x, width, scale_x, TWICE)
                upper, lower = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
                upper_y, lower_y = -1, -1
                num_high, num_low = tl.zeros((COLUMNS,), tl.int32), tl.zeros((COLUMNS,), tl.int32)
                inside = tl.zeros((COLUMNS,), tl.int32)
                for row in range(bottom - top):
                    upper, lower, upper_y, lower_y, weight_y = _lines(
                        logits, top + row, columns, upper, lower, upper_y, lower_y,
                        low_height, low_width, low_scale_y, height, scale_y, TWICE,
                    )  # fmt: skip
                    value = _mix(upper, lower, weight_y)
                    num_high += (value > high).to(tl.int32)
                    num_low += (value > low).to(tl.int32)
                    inside |= (value > middle).to(tl.int32) << row
                real = x < crop_width
                area_high += tl.where(real, num_high, 0)
                area_low += tl.where(real, num_low, 0)
                inside = tl.where(real, inside, 0)
                first_x = tl.minimum(first_x, tl.where(inside != 0, x, 2147483647))
                last_x = tl.maximum(last_x, tl.where(inside != 0, x, -1))
                rows_inside |= inside
            bits, rows = tl.reduce_or(rows_inside, axis=0), tl.arange(0, 32)
            is_inside = ((bits >> rows) & 1) != 0
            tl.store(place, tl.sum(area_high, axis=0))
            tl.store(place + num_partial, tl.sum(area_low, axis=0))
            tl.store(place + 2 * num_partial, tl.min(first_x, axis=0))
            tl.store(place + 3 * num_partial, tl.min(tl.where(is_inside, top + rows, 2147483647), axis=0))
            tl.store(place + 4 * num_partial, tl.max(last_x, axis=0))
            tl.store(place + 5 * num_partial, tl.max(tl.where(is_inside, top + rows, -1), axis=0))
        else:  # most strips of small masks
            tl.store(place, 0)
            tl.store(place + num_partial, 0)
            tl.store(place + 2 * num_partial, 2147483647)
            tl.store(place + 3 * num_partial, 2147483647)
            tl.store(place + 4 * num_partial, -1)
            tl.store(place + 5 * num_partial, -1)

    @triton.jit(do_not_specialize=["blocks", *_SIZES, *_PLACES])
    def _bits_kernel(
        logits, spans, bits, blocks,
        low_height, low_width, low_scale_y, low_scale_x, height, width, scale_y, scale_x, crop_height, crop_width,
        top, left, image_height, threshold,
        POSITIONS: tl.constexpr, TWICE: tl.constexpr,
    ):  # fmt: skip
        """Compute the bits of a block of one mask's column-major positions, 32 per word; background words stay zero."""
        mask = tl.program_id(0) // blocks
        start = tl.program_id(0) % blocks * POSITIONS
        # Skip blocks that cannot have a pixel of the mask. The second resize reads less than a pixel of the first
        # beyond its place, and the first less than a logit.
        scale, reach = low_scale_x * scale_x, low_scale_x + 1.0
        first = scale * ((start // image_height - left).to(tl.float32) + 0.5) - 0.5 - reach
        last = scale * (((start + POSITIONS - 1) // image_height - left).to(tl.float32) + 0.5) - 0.5 + reach
        if (last > tl.load(spans + 2 * mask)) & (first < tl.load(spans + 2 * mask + 1)):
            logits += mask.to(tl.int64) * low_height * low_width
            position = start + tl.arange(0, POSITIONS)
            y, x = position % image_height - top, position // image_height - left
            real = (y >= 0) & (x >= 0) & (y < crop_height) & (x < crop_width)
            value = _pixel(
                logits, tl.minimum(tl.maximum(y, 0), crop_height - 1), tl.minimum(tl.maximum(x, 0), crop_width - 1),
                low_height, low_width, low_scale_y, low_scale_x, height, width, scale_y, scale_x, TWICE, BY_COLUMN=True,
            )  # fmt: skip
            inside = (real & (value > threshold)).to(tl.int32)
            words = tl.sum(tl.reshape(inside, (POSITIONS // 32, 32)) << tl.arange(0, 32)[None, :], axis=1)
            place = tl.program_id(0).to(tl.int64) * (POSITIONS // 32)
            tl.store(bits + place + tl.arange(0, POSITIONS // 32), words)

    @triton.jit(do_not_specialize=["blocks", "num_positions"])
    def _changes_kernel(
        bits, counts, starts, positions, blocks, num_positions, POSITIONS: tl.constexpr, WRITE: tl.constexpr
    ):
        """Count, or write, the positions in a block of one mask at which a pixel differs from the previous one."""
        block, first_of_mask = tl.program_id(0), tl.program_id(0) // blocks * blocks
        wanted = True
        if WRITE:
            wanted = tl.load(counts + block) > 0
        if wanted:
            position = (block - first_of_mask) * POSITIONS + tl.arange(0, POSITIONS)
            real = position < num_positions
            own = bits + first_of_mask.to(tl.int64) * (POSITIONS // 32)
            inside = (tl.load(own + position // 32) >> (position % 32)) & 1
            before = tl.maximum(position - 1, 0)
            was_inside = (tl.load(own + before // 32) >> (before % 32)) & (position > 0).to(tl.int32)
            changed = (real & (inside != was_inside)).to(tl.int32)
            if WRITE:
                place = tl.load(starts + block) + tl.cumsum(changed, axis=0) - changed
                tl.store(positions + place, position, mask=changed > 0)
            else:
                tl.store(counts + block, tl.sum(changed, axis=0))
