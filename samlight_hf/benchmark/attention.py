"""Attention alone: every kernel forward and backward, the overhead of dilation, and ways to project q, k and v."""

import copy
import math
from collections.abc import Iterator
from functools import partial

import torch

from ..kernels.hopper import attention as hopper_attention
from ..modeling.dilated_attention import (
    BACKENDS,
    dense_attention,
    dilated_attention,
    dilated_attention_reference,
    split_groups,
    why_not,
)
from .measure import attempt, capture, graph_calls, graph_time_ms, random_tensor, relative_error, require, time_calls
from .settings import Settings


NUM_HEADS, HEAD_DIM = 6, 64
FORWARD, BOTH = "forward", "forward and backward"


def group_shapes(settings: Settings) -> list[tuple[int, int, int, int]]:
    """Return the shapes (B*N/w, w/r, r*H, D) of a layer's groups: the whole image with r=2, and bands of 512 tokens."""
    if not settings.on_cuda:
        return [(1, 256, 2 * NUM_HEADS, HEAD_DIM)]
    batch_sizes = sorted({1, 8, settings.training_batch_size, 32})
    shapes = [((b, 2048, 2 * NUM_HEADS, HEAD_DIM), (8 * b, 512, NUM_HEADS, HEAD_DIM)) for b in batch_sizes]
    return [shape for pair in shapes for shape in pair]


def attention_rows(settings: Settings) -> Iterator[dict]:
    """Measure every backend on one layer's groups, in CUDA graphs, with its error against float64; and dilation's
    overhead.
    """
    for shape in group_shapes(settings):
        for backend in BACKENDS:
            yield from _backend_rows(backend, shape, settings)
    yield from overhead_rows(settings)
    if settings.on_cuda:
        yield from packed_rows(settings)


def _backend_rows(backend: str, shape: tuple[int, int, int, int], settings: Settings) -> Iterator[dict]:
    device = settings.device
    tokens = [random_tensor(shape, device, settings.dtype, seed).requires_grad_() for seed in range(3)]
    direction = random_tensor(shape, device, settings.dtype, seed=3)
    doubles = [t[:1].detach().double().requires_grad_() for t in tokens]
    expected, _ = dilated_attention_reference(*doubles, shape[1])
    gflop = 4 * shape[0] * shape[2] * shape[1] ** 2 * shape[3] / 1e9

    def run():
        return dense_attention(*tokens, backend=backend)

    def both():
        return torch.autograd.grad(run(), tokens, direction)

    @torch.no_grad()
    def measure_forward() -> dict:
        require(why_not(backend, *tokens))
        milliseconds = graph_time_ms(run, device)
        return {
            "ms": milliseconds, "ms_launched_alone": time_calls(run, device)["ms"], "tflops": gflop / milliseconds,
            "error": relative_error(run()[:1], expected),
        }  # fmt: skip

    def measure_both() -> dict:
        require(why_not(backend, *tokens))
        gradients = torch.autograd.grad(expected, doubles, direction[:1].double())
        errors = [relative_error(gradient[:1], e) for gradient, e in zip(both(), gradients, strict=True)]
        return {"ms": graph_time_ms(both, device), "gradient_errors_qkv": errors}

    row = {"part": "attention", "backend": backend, "dtype": settings.dtype_name, "shape_blhd": list(shape)}
    forward = attempt({**row, "direction": FORWARD}, measure_forward)
    yield forward
    together = attempt({**row, "direction": BOTH}, measure_both)
    if "ms" in forward and "ms" in together:
        together["backward_over_forward"] = together["ms"] / forward["ms"] - 1
    yield together


def packed_rows(settings: Settings) -> Iterator[dict]:
    """Measure the fused encoder's kinds of layer on packed q, k and v, with and without its own kernel."""
    for batch_size in settings.batch_sizes:
        qkv = random_tensor((batch_size, 4096, NUM_HEADS, 3, HEAD_DIM), settings.device, settings.dtype)
        qkv[:, :, :, 0] *= hopper_attention.QUERY_FACTOR
        for pattern in ((None, 2, "all"), (None, 2, "per_head"), (512, 1, "all")):
            for kernel in ("CUDA", "dilated_attention"):
                row = {
                    "part": "attention", "what": "packed q, k and v", "kernel": kernel, "dtype": settings.dtype_name,
                    "batch_size": batch_size, "segment_length": pattern[0], "dilation_rate": pattern[1],
                    "dilation_offsets": pattern[2],
                }  # fmt: skip
                yield attempt(row, partial(_measure_packed, kernel, qkv, pattern, settings))


@torch.inference_mode()
def _measure_packed(kernel: str, qkv: torch.Tensor, pattern: tuple, settings: Settings) -> dict:
    if kernel == "CUDA":
        require(hopper_attention.why_not(qkv, *pattern))
        segment_length, dilation_rate, offsets = pattern
        function = partial(hopper_attention.launch_attention, qkv, segment_length, dilation_rate, offsets)
    else:
        function = partial(dilated_attention, *qkv.unbind(3), *pattern, scaling=math.log(2))
    return {"ms": graph_time_ms(function, settings.device)}


def overhead_rows(settings: Settings) -> Iterator[dict]:
    """Compare dilated attention from (B, N, H, D) with the dense kernel on the same groups, made in advance.

    "separate" q, k and v each have their own memory; "packed" ones are the output of one projection, as in the plain
    model.
    """
    whole: tuple[int, None, int] = (4096, None, 2)
    cases: list[tuple] = [(1, *whole), (8, *whole), (1, 65536, 4096, 4)] if settings.on_cuda else [(1, 256, None, 2)]
    for batch_size, num_tokens, segment_length, rate in cases:
        for layout in ("separate", "packed"):
            row = {
                "part": "attention", "what": "dilation's overhead", "layout": layout, "dtype": settings.dtype_name,
                "batch_size": batch_size, "num_tokens": num_tokens, "segment_length": segment_length,
                "dilation_rate": rate,
            }  # fmt: skip
            pattern = (segment_length or num_tokens, rate)
            yield attempt(row, partial(_overhead, batch_size, num_tokens, pattern, layout, settings))


@torch.no_grad()
def _overhead(batch_size: int, num_tokens: int, pattern: tuple[int, int], layout: str, settings: Settings) -> dict:
    """Time the two in turn, because their difference is less than a clock's drift."""
    qkv = random_tensor((3, batch_size, num_tokens, NUM_HEADS, HEAD_DIM), settings.device, settings.dtype)
    tokens = qkv.unbind(0)
    if layout == "packed":
        tokens = qkv.permute(1, 2, 0, 3, 4).contiguous().unbind(2)
    groups = [split_groups(t.contiguous(), *pattern) for t in tokens]

    def dilated():
        return dilated_attention(*tokens, *pattern)

    def dense():
        return dense_attention(*groups)

    calls = 1
    if settings.on_cuda:
        calls = graph_calls(dense)
        dilated, dense = capture(dilated, calls), capture(dense, calls)
    times = [[time_calls(function, settings.device)["ms"] / calls for function in (dilated, dense)] for _ in range(5)]
    dilated_ms, dense_ms = (sorted(way)[2] for way in zip(*times))
    return {"ms": dilated_ms, "dense_ms": dense_ms, "overhead": dilated_ms / dense_ms - 1}


def projection_rows(settings: Settings) -> Iterator[dict]:
    """Measure three ways to project q, k and v, from hidden states to the attention output of an image with r=2."""
    num_tokens, rate, width = 4096 if settings.on_cuda else 256, 2, NUM_HEADS * HEAD_DIM
    layer = torch.nn.Linear(width, 3 * width, device=settings.device, dtype=settings.dtype)
    batched_weight = layer.weight.view(3, width, width).transpose(1, 2)
    # Rows of the weight in the order (head, q/k/v, D), so that the heads of all tokens have one stride.
    interleaved = copy.deepcopy(layer)
    for parameter in interleaved.parameters():
        parameter.data = parameter.data.view(3, NUM_HEADS, HEAD_DIM, -1).transpose(0, 1).reshape(parameter.shape)

    def packed(hidden_states):
        return layer(hidden_states).view(-1, num_tokens, 3, NUM_HEADS, HEAD_DIM).unbind(2)

    def batched(hidden_states):
        flat = hidden_states.view(1, -1, width).expand(3, -1, -1)
        return torch.baddbmm(layer.bias.view(3, 1, width), flat, batched_weight).view(
            3, -1, num_tokens, NUM_HEADS, HEAD_DIM
        )

    def strided(hidden_states):
        qkv = interleaved(hidden_states).view(-1, num_tokens // rate, rate * NUM_HEADS, 3, HEAD_DIM)
        return qkv.unbind(3)

    ways = {
        "one product, q k v packed, copied where dilated": lambda h: dilated_attention(*packed(h), None, rate),
        "batched product, q k v contiguous": lambda h: dilated_attention(*batched(h), None, rate),
        "one product, weight rows by head, strided": lambda h: dense_attention(*strided(h)).view(
            -1, num_tokens, NUM_HEADS, HEAD_DIM
        ),
    }
    for batch_size in settings.batch_sizes:
        hidden_states = random_tensor((batch_size, num_tokens, width), settings.device, settings.dtype)

        @torch.inference_mode()
        def measure(function, hidden_states=hidden_states) -> dict:
            contiguous = (t.contiguous() for t in packed(hidden_states))
            expected = dilated_attention(*contiguous, None, rate, backend="sdpa")
            return {
                "ms": graph_time_ms(lambda: function(hidden_states), settings.device),
                "error": relative_error(function(hidden_states), expected),
            }

        for name, function in ways.items():
            row = {"part": "projection", "way": name, "batch_size": batch_size}
            yield attempt(row, partial(measure, function))
