"""Triton kernels of `upscaled_masks.py`, which describes them. This module needs Triton."""

from .support import tl, triton


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
def masks_kernel(
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
def measure_kernel(
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


@triton.jit(do_not_specialize=["strips"])
def join_kernel(partial, measures, strips, STRIPS: tl.constexpr):
    """Put the measures of one mask's strips together, with zeros for the box of an empty mask."""
    mask = tl.program_id(0).to(tl.int64)
    place, num_partial = partial + mask * strips, tl.num_programs(0).to(tl.int64) * strips
    area_high, area_low = tl.zeros((STRIPS,), tl.int32), tl.zeros((STRIPS,), tl.int32)
    first_x, first_y = tl.full((STRIPS,), 2147483647, tl.int32), tl.full((STRIPS,), 2147483647, tl.int32)
    last_x, last_y = tl.full((STRIPS,), -1, tl.int32), tl.full((STRIPS,), -1, tl.int32)
    for start in range(0, strips, STRIPS):
        strip = start + tl.arange(0, STRIPS)
        real = strip < strips
        own = place + strip
        area_high += tl.load(own, mask=real, other=0)
        area_low += tl.load(own + num_partial, mask=real, other=0)
        first_x = tl.minimum(first_x, tl.load(own + 2 * num_partial, mask=real, other=2147483647))
        first_y = tl.minimum(first_y, tl.load(own + 3 * num_partial, mask=real, other=2147483647))
        last_x = tl.maximum(last_x, tl.load(own + 4 * num_partial, mask=real, other=-1))
        last_y = tl.maximum(last_y, tl.load(own + 5 * num_partial, mask=real, other=-1))
    right, bottom = tl.max(last_x, axis=0), tl.max(last_y, axis=0)
    is_empty = right < 0
    tl.store(measures + 6 * mask, tl.sum(area_high, axis=0))
    tl.store(measures + 6 * mask + 1, tl.sum(area_low, axis=0))
    tl.store(measures + 6 * mask + 2, tl.where(is_empty, 0, tl.min(first_x, axis=0)))
    tl.store(measures + 6 * mask + 3, tl.where(is_empty, 0, tl.min(first_y, axis=0)))
    tl.store(measures + 6 * mask + 4, tl.where(is_empty, 0, right))
    tl.store(measures + 6 * mask + 5, tl.where(is_empty, 0, bottom))


@triton.jit(do_not_specialize=["blocks", *_SIZES, *_PLACES])
def bits_kernel(
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
def changes_kernel(
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
