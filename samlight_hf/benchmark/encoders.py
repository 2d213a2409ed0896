"""Image encoders: ours in every way to run it, and at several resolutions."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import SamLighteningConfig
from ..engine.image_encoder import FastVisionEncoder, why_not_fast_encoder
from ..engine.optimize import optimize
from .measure import (
    arithmetic,
    attempt,
    capture,
    count_gflop,
    peak_memory,
    random_tensor,
    require,
    time_calls,
)
from .settings import Settings


OURS = "SAM-Lightening"
IMPLEMENTATIONS = ("dilated_flash_attention", "sdpa", "eager", *(f"flash_attention_{version}" for version in (2, 3, 4)))
EAGER, GRAPH, COMPILED, COMPILED_GRAPH = "eager", "CUDA graph", "torch.compile", "torch.compile, CUDA graph"
OPTIMIZED, FUSED_GRAPH = "optimize()", "fused, CUDA graph"


def modes(settings: Settings) -> list[str]:
    """Return the ways to run a plain module on this device, without those that compile where that is not wanted."""
    return [
        EAGER,
        *([GRAPH] if settings.on_cuda else []),
        *([COMPILED] if settings.compile else []),
        *([COMPILED_GRAPH] if settings.compile and settings.on_cuda else []),
    ]


def optimized(model: nn.Module, settings: Settings, **shapes):
    """Optimize a model in the benchmark's dtype, for the shapes that are measured."""
    return optimize(model, dtype=settings.dtype, **shapes)


def report_of(model) -> dict:
    """Return an optimized model's report of its warm-up and of its graphs' memory, as numbers of a row."""
    return {f"report_{name}": value for name, value in vars(model.report).items()}


def time_encoder(
    build: Callable[[], Any], mode: str, batch_size: int, image_size: int, dtype: torch.dtype, settings: Settings
) -> dict:
    """Time the module that `build` creates on images (B, 3, S, S), beginning with an empty device."""
    try:
        with peak_memory(settings.device) as memory:
            encoder: Any = build()
            pixel_values = random_tensor((batch_size, 3, image_size, image_size), settings.device, dtype)
            if mode in (COMPILED, COMPILED_GRAPH):
                encoder = torch.compile(encoder, fullgraph=True, dynamic=False)

            def call():
                return encoder(pixel_values)

            graphed = mode in (GRAPH, COMPILED_GRAPH, FUSED_GRAPH)
            with torch.inference_mode():
                timing = time_calls(capture(call) if graphed else call, settings.device)
    finally:
        if mode not in (EAGER, GRAPH, FUSED_GRAPH):
            torch.compiler.reset()  # compiled code keeps its model, and would be searched for the next one
    return {**timing, "images_per_second": 1e3 * batch_size / timing["ms"], **memory}


def encoder_row(
    row: dict, build: Callable[[], Any], image_size: int, dtype: torch.dtype, settings: Settings, gflop: float
) -> dict:
    """Extend `row`, which has `mode` and `batch_size`, by time, memory and arithmetic; `gflop` is that of one image."""

    def measure() -> dict:
        timing = time_encoder(build, row["mode"], row["batch_size"], image_size, dtype, settings)
        half = dtype == settings.dtype  # the dtype of the ceiling
        ceiling = settings.ceiling["tflops"] if half else None
        return {**timing, **arithmetic(gflop * row["batch_size"], timing["ms"], ceiling)}

    return attempt(row, measure)


def optimized_encoder_row(row: dict, config: SamLighteningConfig, settings: Settings, gflop: float) -> dict:
    """Measure like `encoder_row` the encoder in an optimized model, with graphs for this batch and one prompt."""
    reports: dict[str, Any] = {}

    def build() -> nn.Module:
        model = optimized(
            settings.make_model(config), settings, image_batch_sizes=(row["batch_size"],), prompt_counts=(1,)
        )
        reports.update(report_of(model))
        return model.vision_encoder

    image_size = config.vision_config.image_size
    return {**encoder_row(row, build, image_size, settings.dtype, settings, gflop), **reports}


def plain_encoder(config: SamLighteningConfig, settings: Settings, attn_implementation: str | None = None) -> nn.Module:
    """Return the image encoder of our model, unchanged."""
    model = settings.make_model(config)
    if attn_implementation:
        model.set_attn_implementation(attn_implementation)
    return model.vision_encoder


def fused_encoder(config: SamLighteningConfig, settings: Settings) -> FastVisionEncoder:
    """Return the image encoder that `optimize` uses, alone. Raises ValueError where it would use the plain one."""
    model = settings.make_model(config)
    require(why_not_fast_encoder(model))
    return FastVisionEncoder(model.vision_encoder)


def encoder_gflop(config: SamLighteningConfig) -> float:
    """Count 10^9 operations of our image encoder for one image, with "sdpa", whose operations torch can count."""
    size = config.vision_config.image_size
    encoder = plain_encoder(config, Settings(torch.device("meta"), dtype=torch.float32), "sdpa")
    return count_gflop(encoder, torch.empty(1, 3, size, size, device="meta"))


def encoder_rows(settings: Settings) -> Iterator[dict]:
    """Measure our encoder: unchanged in every attention implementation, graphed, compiled, fused and graphed, and
    optimized.

    A graph's time is that of its replay, as for the peers; `optimize` also copies inputs and outputs, and runs Python.
    """
    config = settings.config
    image_size, gflop = config.vision_config.image_size, encoder_gflop(config)
    ways = [(EAGER, implementation) for implementation in IMPLEMENTATIONS]
    ways += [(mode, "dilated_flash_attention") for mode in modes(settings) if mode != EAGER]
    for mode, implementation in ways:
        for batch_size in settings.batch_sizes:
            row = {
                "part": "encoder", "model": OURS, "mode": mode, "attn_implementation": implementation,
                "dtype": settings.dtype_name, "batch_size": batch_size,
            }  # fmt: skip
            plain = partial(plain_encoder, config, settings, implementation)
            yield encoder_row(row, plain, image_size, settings.dtype, settings, gflop)
    for batch_size in settings.batch_sizes:
        row = {"part": "encoder", "model": OURS, "dtype": settings.dtype_name, "batch_size": batch_size}
        if settings.on_cuda:
            fused = partial(fused_encoder, config, settings)
            yield encoder_row({**row, "mode": FUSED_GRAPH}, fused, image_size, settings.dtype, settings, gflop)
        yield optimized_encoder_row({**row, "mode": OPTIMIZED}, config, settings, gflop)


FULL, DILATED, SAME_GROUPS = "full attention", "dilated", "same groups, undilated"


def resolution_patterns(image_size: int, patch_size: int) -> dict[str, dict]:
    """Return the patterns of all layers at one size: full attention, w=4096 and r=4, and undilated bands.

    The last two have equally many groups of equal length: they differ only in dilation.
    """
    num_tokens = (image_size // patch_size) ** 2
    segment_length = math.gcd(num_tokens, 4096)
    rate = math.gcd(segment_length, 4)
    return {
        FULL: {"segment_length": None, "dilation_rate": 1},
        DILATED: {"segment_length": segment_length, "dilation_rate": rate},
        SAME_GROUPS: {"segment_length": segment_length // rate, "dilation_rate": 1},
    }


def resolution_rows(settings: Settings) -> Iterator[dict]:
    """Measure our encoder on one image at a time, by the image's size and by the pattern of all its layers."""
    vision = settings.config.to_dict()["vision_config"]
    derived = ("image_size", "segment_length", "dilation_rate", "model_type")
    shape = {name: value for name, value in vision.items() if name not in derived}
    for image_size in settings.resolutions:
        for pattern, layers in resolution_patterns(image_size, vision["patch_size"]).items():
            config = SamLighteningConfig(
                vision_config={**shape, **layers, "image_size": image_size},
                mask_decoder_config=settings.config.mask_decoder_config.to_dict(),
            )
            gflop = encoder_gflop(config)
            common = {
                "part": "resolution", "model": OURS, "image_size": image_size, "pattern": pattern, **layers,
                "dtype": settings.dtype_name, "batch_size": 1,
            }  # fmt: skip
            build = partial(plain_encoder, config, settings)
            mode = GRAPH if settings.on_cuda else EAGER
            yield encoder_row({**common, "mode": mode}, build, image_size, settings.dtype, settings, gflop)
            yield optimized_encoder_row({**common, "mode": OPTIMIZED}, config, settings, gflop)
