"""Triton kernels of `tokens.py`, which describes them. This module needs Triton.

Each kernel has a grid of (parts, prompts), and one compiled variant for all numbers of tokens. Tokens are float32 (P,
T, C); a block of `ROWS` rows holds all T tokens of a prompt.
"""

from .support import grid_dependency_wait, tl, triton


@triton.jit
def _read(
    tokens, scale, shift, eps, prompt, num_tokens, CHANNELS: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr
):
    """Load a prompt's tokens, normalized if NORM: float32 (ROWS, CHANNELS), with finite numbers in unused rows."""
    row, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    places = (prompt * num_tokens + row)[:, None] * CHANNELS + channel[None, :]
    values = tl.load(tokens + places, mask=(row < num_tokens)[:, None], other=0.0)
    if NORM:
        mean, factor = _moments(values, eps, CHANNELS)
        values = _normed(values, mean, factor, scale, shift, channel)
    return values


@triton.jit
def _moments(values, eps, CHANNELS: tl.constexpr):
    """Return mean and 1 / standard deviation of rows."""
    mean = tl.sum(values, axis=1) / CHANNELS
    centred = values - mean[:, None]
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)


@triton.jit
def _normed(values, mean, factor, scale, shift, columns):
    """Apply the LayerNorm to some columns of rows with these moments."""
    values = (values - mean[:, None]) * factor[:, None]
    values = values * tl.load(scale + columns).to(tl.float32)[None, :]
    return values + tl.load(shift + columns).to(tl.float32)[None, :]


@triton.jit
def _weight(weight, first_row, first_column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a block of a matrix with `stride` columns."""
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    return tl.load(weight + row[:, None] * stride + column[None, :])


@triton.jit(do_not_specialize=["num_points", "num_tokens"])
def embed_kernel(
    embedded, output_tokens, waves, kinds, points, labels, boxes, num_outputs, num_points, num_tokens, scale, shift,
    CHANNELS: tl.constexpr, POINTS: tl.constexpr, BOXES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute one input token: an output token, or an embedded point, padding point or corner of a box."""
    token, prompt = tl.program_id(0), tl.program_id(1)
    number, channel = token - num_outputs, tl.arange(0, CHANNELS)
    grid_dependency_wait(OVERLAP)
    x, y, kind = 0.0, 0.0, -1
    if POINTS:
        is_point = (number >= 0) & (number < num_points)
        place = prompt * num_points + number
        label = tl.load(labels + place, mask=is_point, other=-1).to(tl.int32)
        x = tl.load(points + 2 * place, mask=is_point, other=0.0)
        y = tl.load(points + 2 * place + 1, mask=is_point, other=0.0)
        kind = tl.where(is_point, tl.minimum(tl.maximum(label, -2), 2), -1)
    kind += tl.where(kind < 0, 5, 0)
    if BOXES:
        corner = number - num_points
        place = 4 * prompt + 2 * corner
        x = tl.where(corner >= 0, tl.load(boxes + place, mask=corner >= 0, other=0.0), x)
        y = tl.where(corner >= 0, tl.load(boxes + place + 1, mask=corner >= 0, other=0.0), y)
        kind = tl.where(corner >= 0, 5 + corner, kind)
    x, y = shift + scale * x, shift + scale * y
    angles = tl.load(waves + 2 * CHANNELS + channel)
    angles += x * tl.load(waves + channel) + y * tl.load(waves + CHANNELS + channel)
    factor = tl.load(kinds + kind * 2 * CHANNELS + channel)
    values = tl.load(kinds + kind * 2 * CHANNELS + CHANNELS + channel) + factor * tl.sin(angles)
    is_output = (channel >= 0) & (number < 0)  # the same for all channels
    output = tl.load(output_tokens + token * CHANNELS + channel, mask=is_output, other=0.0)
    tl.store(embedded + (prompt * num_tokens + token) * CHANNELS + channel, tl.where(is_output, output, values))


@triton.jit(do_not_specialize=["num_tokens"])
def attend_kernel(
    tokens, scale, shift, eps, embedded, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias,
    attended, num_tokens, scaling,
    CHANNELS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute one head of the self-attention of one prompt's tokens."""
    first, prompt = tl.program_id(0) * HEAD, tl.program_id(1)
    row, feature = tl.arange(0, ROWS), first + tl.arange(0, HEAD)
    own = row < num_tokens
    weight_q = _weight(query_weight, first, 0, CHANNELS, HEAD, CHANNELS)
    weight_k = _weight(key_weight, first, 0, CHANNELS, HEAD, CHANNELS)
    weight_v = _weight(value_weight, first, 0, CHANNELS, HEAD, CHANNELS)
    grid_dependency_wait(OVERLAP)
    values = _read(tokens, scale, shift, eps, prompt, num_tokens, CHANNELS, ROWS, NORM)
    with_positions = values
    if NORM:  # the first layer's tokens are the embedded ones, without a norm
        with_positions += _read(embedded, scale, shift, eps, prompt, num_tokens, CHANNELS, ROWS, False)
    values, with_positions = values.to(weight_v.dtype), with_positions.to(weight_v.dtype)
    query = tl.dot(with_positions, tl.trans(weight_q)) + tl.load(query_bias + feature).to(tl.float32)[None, :]
    key = tl.dot(with_positions, tl.trans(weight_k)) + tl.load(key_bias + feature).to(tl.float32)[None, :]
    value = tl.dot(values, tl.trans(weight_v)) + tl.load(value_bias + feature).to(tl.float32)[None, :]
    scores = tl.dot((query * scaling).to(weight_v.dtype), tl.trans(key.to(weight_v.dtype)))
    scores = tl.where(own[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    result = tl.dot(weights.to(weight_v.dtype), value.to(weight_v.dtype))
    places = (prompt * num_tokens + row)[:, None] * CHANNELS + feature[None, :]
    tl.store(attended + places, result.to(weight_v.dtype), mask=own[:, None])


@triton.jit
def _plus_residual(
    total, tokens, scale, shift, eps, output, prompt, num_tokens, first,
    CHANNELS: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store `total`, the features from `first` on, after adding the tokens if RESIDUAL, normalized if NORM."""
    row, feature = tl.arange(0, ROWS), first + tl.arange(0, FEATURES)
    own = (row < num_tokens)[:, None]
    places = (prompt * num_tokens + row)[:, None] * CHANNELS + feature[None, :]
    if RESIDUAL:
        residual = tl.load(tokens + places, mask=own, other=0.0)
        if NORM:
            all_values = _read(tokens, scale, shift, eps, prompt, num_tokens, CHANNELS, ROWS, False)
            mean, factor = _moments(all_values, eps, CHANNELS)
            residual = _normed(residual, mean, factor, scale, shift, feature)
        total += residual
    tl.store(output + places, total, mask=own)


@triton.jit(do_not_specialize=["num_tokens"])
def add_kernel(
    values, weight, bias, tokens, scale, shift, eps, output, num_tokens,
    IN: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute some features of a linear layer and add the residual."""
    first, prompt = tl.program_id(0) * FEATURES, tl.program_id(1)
    row, inner = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    own = (row < num_tokens)[:, None]
    places = (prompt * num_tokens + row)[:, None] * IN + inner[None, :]
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    total += tl.load(bias + first + tl.arange(0, FEATURES)).to(tl.float32)[None, :]
    block = _weight(weight, first, 0, IN, FEATURES, BLOCK)
    grid_dependency_wait(OVERLAP)
    total = tl.dot(tl.load(values + places, mask=own, other=0.0), tl.trans(block), total)
    for start in range(BLOCK, IN, BLOCK):
        block = _weight(weight, first, start, IN, FEATURES, BLOCK)
        total = tl.dot(tl.load(values + places + start, mask=own, other=0.0), tl.trans(block), total)
    _plus_residual(
        total, tokens, scale, shift, eps, output, prompt, num_tokens, first, CHANNELS, FEATURES, ROWS, RESIDUAL, NORM
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def hidden_kernel(
    tokens, scale, shift, eps, weight, bias, hidden, num_tokens,
    OUT: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute some features of the MLP's hidden layer, relu(linear(LayerNorm(tokens)))."""
    first, prompt = tl.program_id(0) * FEATURES, tl.program_id(1)
    row, feature = tl.arange(0, ROWS), first + tl.arange(0, FEATURES)
    block = _weight(weight, first, 0, CHANNELS, FEATURES, CHANNELS)
    grid_dependency_wait(OVERLAP)
    values = _read(tokens, scale, shift, eps, prompt, num_tokens, CHANNELS, ROWS, True)
    result = tl.dot(values.to(block.dtype), tl.trans(block)) + tl.load(bias + feature).to(tl.float32)[None, :]
    places = (prompt * num_tokens + row)[:, None] * OUT + feature[None, :]
    tl.store(hidden + places, tl.maximum(result, 0.0).to(block.dtype), mask=(row < num_tokens)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def to_image_kernel(
    tokens, scale, shift, eps, embedded, own_weight, own_bias, other_weight, other_bias, value_weight, value_bias,
    out_weight, out_bias, sides, biases, values, num_tokens, scaling,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Project one head of one prompt's tokens into the channels of the image tokens."""
    head, prompt = tl.program_id(0), tl.program_id(1)
    first, row, channel = head * HEAD, tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    feature, own = first + tl.arange(0, HEAD), row < num_tokens
    weight = _weight(own_weight, first, 0, CHANNELS, HEAD, CHANNELS)
    other = _weight(other_weight, first, 0, CHANNELS, HEAD, CHANNELS)
    if VALUES:
        weight_v = _weight(value_weight, first, 0, CHANNELS, HEAD, CHANNELS)
        weight_out = tl.load(out_weight + channel[None, :] * (HEADS * HEAD) + feature[:, None])  # transposed
    grid_dependency_wait(OVERLAP)
    normed = _read(tokens, scale, shift, eps, prompt, num_tokens, CHANNELS, ROWS, True)
    positions = _read(embedded, scale, shift, eps, prompt, num_tokens, CHANNELS, ROWS, False)
    projected = tl.dot((normed + positions).to(weight.dtype), tl.trans(weight))
    projected = (projected + tl.load(own_bias + feature).to(tl.float32)[None, :]) * scaling
    line = (prompt * HEADS + head) * num_tokens + row
    places = line[:, None] * CHANNELS + channel[None, :]
    side = tl.dot(projected.to(weight.dtype), other)
    tl.store(sides + places, side.to(weight.dtype), mask=own[:, None])
    if VALUES:
        bias = tl.sum(projected * tl.load(other_bias + feature).to(tl.float32)[None, :], axis=1)
        tl.store(biases + line, bias.to(weight.dtype), mask=own)
        value = tl.dot(normed.to(weight.dtype), tl.trans(weight_v))
        value += tl.load(value_bias + feature).to(tl.float32)[None, :]
        value = tl.dot(value.to(weight.dtype), weight_out)
        # Each head's probabilities sum to 1, so together they add the bias once.
        value += tl.load(out_bias + channel).to(tl.float32)[None, :] / HEADS
        tl.store(values + places, value.to(weight.dtype), mask=own[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def add_seen_kernel(
    seen, value_weight, value_bias, out_weight, out_bias, tokens, scale, shift, eps, output, num_tokens,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute some features of the projected output of all heads, plus LayerNorm(tokens)."""
    first, prompt = tl.program_id(0) * FEATURES, tl.program_id(1)
    row, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    own = (row < num_tokens)[:, None]
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    total += tl.load(out_bias + first + tl.arange(0, FEATURES)).to(tl.float32)[None, :]
    grid_dependency_wait(OVERLAP)
    for head in range(HEADS):
        line = (prompt * HEADS + head) * num_tokens + row
        image_tokens = tl.load(seen + line[:, None] * CHANNELS + channel[None, :], mask=own, other=0.0)
        weight = _weight(value_weight, head * HEAD, 0, CHANNELS, HEAD, CHANNELS)
        value = tl.dot(image_tokens, tl.trans(weight))
        feature = head * HEAD + tl.arange(0, HEAD)
        value += tl.load(value_bias + feature).to(tl.float32)[None, :]  # probabilities sum to 1
        block = _weight(out_weight, first, head * HEAD, HEADS * HEAD, FEATURES, HEAD)
        total = tl.dot(value.to(block.dtype), tl.trans(block), total)
    _plus_residual(
        total, tokens, scale, shift, eps, output, prompt, num_tokens, first, CHANNELS, FEATURES, ROWS, True, True
    )


@triton.jit(do_not_specialize=["num_tokens", "first_mask", "num_mlps"])
def mlp_kernel(
    values, scale, shift, eps, weight, bias, output, num_tokens, first_mask, num_mlps,
    IN: tl.constexpr, OUT: tl.constexpr, FEATURES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute some features of a layer of the IoU head or of one hypernetwork, in float32 without tensor cores."""
    number, first, prompt = (
        tl.program_id(0) // (OUT // FEATURES),
        tl.program_id(0) % (OUT // FEATURES) * FEATURES,
        tl.program_id(1),
    )
    token = tl.where(number == 0, 0, first_mask + number)  # also the index of the MLP
    inner, feature = tl.arange(0, IN), first + tl.arange(0, FEATURES)
    block = _weight(weight + token * IN * OUT, 0, first, OUT, IN, FEATURES)
    grid_dependency_wait(OVERLAP)
    row = prompt * num_mlps + number
    if FIRST:
        x = tl.load(values + (prompt * num_tokens + token) * IN + inner)
        centred = x - tl.sum(x, axis=0) / IN
        x = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / IN + eps)
        x = x * tl.load(scale + inner).to(tl.float32) + tl.load(shift + inner).to(tl.float32)
    else:
        x = tl.load(values + row * IN + inner)
    result = tl.sum(x[:, None] * block.to(tl.float32), axis=0) + tl.load(bias + token * OUT + feature).to(tl.float32)
    if not LAST:
        result = tl.maximum(result, 0.0)
    tl.store(output + row * OUT + feature, result)
