"""The image encoder's linear layers, each with every kernel that can run it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.linear import (
    FusedLinear,
    RowsWithStatistics,
    fused_linear_reference,
    launch_hopper,
    launch_triton,
    rows_of,
    why_not_hopper,
    why_not_triton,
    with_statistics,
)
from .measure import attempt, building, graph_time_ms, random_tensor, relative_error, require
from .settings import Settings


CUDA, TRITON, MODULES = "CUDA", "Triton", "one module after the other"


@dataclass(frozen=True)
class Layer:
    name: str
    in_features: int
    out_features: int
    normalizes: bool = False
    gelu: bool = False
    adds: bool = False  # a residual; then the next layer needs statistics


def layers_of(settings: Settings) -> list[Layer]:
    """Return the linear layers of a layer of the encoder, and the first one of its neck."""
    config = settings.config.vision_config
    width, hidden = config.hidden_size, config.mlp_dim
    return [
        Layer("qkv", width, 3 * width, normalizes=True),
        Layer("proj", width, width, adds=True),
        Layer("lin1", width, hidden, normalizes=True, gelu=True),
        Layer("lin2", hidden, width, adds=True),
        Layer("neck", width, config.output_channels),
    ]


def linear_rows(settings: Settings) -> Iterator[dict]:
    """On CUDA, measure each layer with its norm, GELU and residual, in CUDA graphs, with the error against float32."""
    if not settings.on_cuda:
        return
    for batch_size in settings.batch_sizes:
        for layer in layers_of(settings):
            yield from _layer_rows(layer, batch_size, settings)


@torch.inference_mode()
def _layer_rows(layer: Layer, batch_size: int, settings: Settings) -> Iterator[dict]:
    device, dtype = settings.device, settings.dtype
    num_rows = batch_size * (settings.config.vision_config.image_size // settings.config.vision_config.patch_size) ** 2
    with building(device, dtype):
        linear, norm = nn.Linear(layer.in_features, layer.out_features), nn.LayerNorm(layer.in_features)
    fused = FusedLinear(linear.weight, linear.bias, norm if layer.normalizes else None, layer.gelu)
    values = random_tensor((num_rows, layer.in_features), device, dtype)
    residual = random_tensor((num_rows, layer.out_features), device, dtype, seed=1) if layer.adds else None
    rows, some = with_statistics(values), slice(4096)
    some_residual = None if residual is None else residual[some]
    expected = fused_linear_reference(fused, RowsWithStatistics(values[some].float()), some_residual).values

    def by_cuda():
        return launch_hopper(fused, rows_of(values), rows.statistics, residual, layer.adds).values

    def by_triton():
        return launch_triton(fused, rows, residual, layer.adds).values

    def by_modules():
        outputs = F.linear(norm(values) if layer.normalizes else values, linear.weight, linear.bias)
        outputs = F.gelu(outputs) if layer.gelu else outputs
        return outputs if residual is None else outputs + residual

    def measure(function: Callable[[], torch.Tensor], reason: str | None) -> dict:
        require(reason)
        milliseconds = graph_time_ms(function, device)
        tflops = 2e-9 * num_rows * layer.in_features * layer.out_features / milliseconds
        return {"ms": milliseconds, "tflops": tflops, "error": relative_error(function()[some], expected)}

    for kernel, function, reason in (
        (CUDA, by_cuda, why_not_hopper(fused, rows_of(values), residual, layer.adds)),
        (TRITON, by_triton, why_not_triton(fused, rows, residual, layer.adds)),
        (MODULES, by_modules, None),
    ):
        row = {
            "part": "linear", "layer": layer.name, "kernel": kernel, "dtype": settings.dtype_name,
            "batch_size": batch_size, "in_features": layer.in_features, "out_features": layer.out_features,
        }  # fmt: skip
        yield attempt(row, partial(measure, function, reason))
