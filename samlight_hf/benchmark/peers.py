"""Other image encoders of the same image size with random weights: transformers' SAMs, and the backbones of light SAMs.

timm is optional; without it, its rows say so. Each peer runs at its best: convolutional backbones are measured in
channels_last too, and with their branches merged for inference.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .encoders import COMPILED, EAGER, GRAPH, encoder_row
from .measure import attempt, building, count_gflop
from .settings import Settings


IMAGE_SIZE = 1024
SAM_SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": num_heads,
        "global_attn_indexes": global_layers,
    }
    for name, width, num_layers, num_heads, global_layers in (
        ("SAM ViT-B", 768, 12, 12, (2, 5, 8, 11)),
        ("SAM ViT-L", 1024, 24, 16, (5, 11, 17, 23)),
        ("SAM ViT-H", 1280, 32, 16, (7, 15, 23, 31)),
    )
}  # fmt: skip
LAYERWISE = f"{COMPILED} of each layer"


class Backbone(NamedTuple):
    """A backbone of timm: its name and arguments there, and the light SAM that uses it as its image encoder."""

    name: str
    of: str
    convolutional: bool
    arguments: dict = {}


BACKBONES = (
    Backbone("tiny_vit_5m_224", "MobileSAM", False),  # has no argument img_size
    Backbone("repvit_m1", "EdgeSAM", True),
    # timm has no model of this name: it is L1 with fewer blocks.
    Backbone("efficientvit_l1", "EfficientViT-SAM-L0", True, {"depths": (1, 1, 1, 4, 4)}),
    Backbone("efficientvit_l1", "EfficientViT-SAM-L1", True),
    Backbone("vit_tiny_patch16_224", "EfficientSAM-Ti", False, {"img_size": IMAGE_SIZE}),
    Backbone("vit_small_patch16_224", "EfficientSAM-S", False, {"img_size": IMAGE_SIZE}),
    Backbone("resnet18", "NanoSAM", True),
)


def peer_rows(settings: Settings) -> Iterator[dict]:
    """Measure all peers that can run here. On a CPU: SAM ViT-B and the backbones."""
    sams = SAM_SHAPES if settings.on_cuda else ["SAM ViT-B"]
    for name in sams:
        yield from _sam_rows(name, settings)
    if settings.on_cuda:
        for name, build in {"SAM 2 Hiera-tiny": make_sam2, "EdgeTAM": make_edgetam}.items():
            yield from _rows({"part": "peers", "model": name}, build, settings, (EAGER, GRAPH))
    for backbone in BACKBONES:
        row = {"part": "peers", "model": f"{backbone.of}: {backbone.name}", "memory_format": "contiguous"}
        graph = (GRAPH,) if settings.on_cuda else ()
        yield from _rows(row, partial(make_backbone, backbone), settings, (EAGER, *graph))
        if backbone.convolutional and graph:
            build = partial(make_backbone, backbone, memory_format=torch.channels_last)
            yield from _rows({**row, "memory_format": "channels_last"}, build, settings, graph)


def _rows(row: dict, build: Callable[[], nn.Module], settings: Settings, modes: tuple[str, ...]) -> Iterator[dict]:
    """Measure every mode and batch size in the benchmark's dtype. Yields one row where the model cannot be built."""

    def built() -> nn.Module:
        with building(settings.device, settings.dtype):
            return build().eval()

    row["dtype"] = settings.dtype_name
    counted = attempt(row, lambda: {"gflop": _gflop(build)})
    if "cannot_run" in counted:
        yield counted
        return
    for mode in modes:
        for batch_size in settings.batch_sizes:
            numbered = {**row, "mode": mode, "batch_size": batch_size}
            yield encoder_row(numbered, built, IMAGE_SIZE, settings.dtype, settings, counted["gflop"])


def _gflop(build: Callable[[], nn.Module], device: str = "cpu") -> float:
    """Count the operations for one image. Modules that read numbers from tensors cannot be built on "meta"."""
    with building(torch.device(device), torch.float32):
        return count_gflop(build().eval(), torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))


def _sam_rows(name: str, settings: Settings) -> Iterator[dict]:
    """Measure eager attention in float32, as published; the fastest attention in half precision, graphed, and compiled.

    Launch overhead matters only at batch 1, so the graph is measured there. float32 is slow, and measured up to batch
    8.
    """
    one = settings.batch_sizes[:1]
    small = tuple(size for size in settings.batch_sizes if size <= 8)
    ways: list[tuple[str, torch.dtype, str, tuple[int, ...]]] = [("eager", torch.float32, EAGER, small)]
    ways.append(("sdpa", settings.dtype, EAGER, settings.batch_sizes))
    if settings.on_cuda:
        ways.append(("sdpa", settings.dtype, GRAPH, one))
    if settings.compile and (name == "SAM ViT-B" or settings.compile_peers):
        ways.append(("sdpa", settings.dtype, LAYERWISE, settings.batch_sizes))
    gflop = _gflop(partial(make_sam, name, "sdpa"), "meta")
    for attention, dtype, mode, batch_sizes in ways:

        def build(attention=attention, dtype=dtype, mode=mode) -> nn.Module:
            with building(settings.device, dtype):
                encoder: Any = make_sam(name, attention).eval()
            if mode == LAYERWISE:  # layers share compiled code; compiling 32 of them together takes minutes
                for layer in encoder.layers:
                    layer.compile(dynamic=False)
            return _MakesTensorsOn(settings.device, encoder) if mode == GRAPH else encoder

        for batch_size in batch_sizes:
            row = {
                "part": "peers", "model": name, "mode": mode, "attn_implementation": attention,
                "dtype": str(dtype).removeprefix("torch."), "batch_size": batch_size,
            }  # fmt: skip
            yield encoder_row(row, build, IMAGE_SIZE, dtype, settings, gflop)


def make_sam(name: str, attn_implementation: str) -> nn.Module:
    """Create transformers' image encoder of a SAM, with larger initial weights than its config's near-zero ones."""
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(**SAM_SHAPES[name], initializer_range=0.02, attn_implementation=attn_implementation)
    return SamVisionModel(config).vision_encoder


def make_sam2() -> nn.Module:
    """Create transformers' SAM 2 with its default backbone, Hiera-tiny, and its feature pyramid."""
    from transformers import Sam2VisionConfig, Sam2VisionModel

    return Sam2VisionModel(Sam2VisionConfig())


def make_edgetam() -> nn.Module:
    """Create transformers' EdgeTAM: RepViT-M1 from timm, as in its published config, and its feature pyramid."""
    from transformers import EdgeTamVisionConfig, EdgeTamVisionModel, TimmWrapperConfig

    arguments = {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
    backbone = TimmWrapperConfig(architecture="repvit_m1", model_args=arguments)
    return EdgeTamVisionModel(EdgeTamVisionConfig(backbone_config=backbone))


class _MakesTensorsOn(nn.Module):
    """A module whose new tensors are on `device`.

    SAM creates positions on the CPU in each call, which a CUDA graph cannot copy.
    """

    def __init__(self, device: torch.device, module: nn.Module):
        super().__init__()
        self.device, self.module = device, module

    def forward(self, pixel_values: torch.Tensor):
        with self.device:
            return self.module(pixel_values)


class _Features(nn.Module):
    """A model of timm up to its last features, without pooling and classes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        return model.forward_features(pixel_values)


def make_backbone(backbone: Backbone, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    import timm
    from timm.utils import reparameterize_model

    model = timm.create_model(backbone.name, pretrained=False, num_classes=0, **backbone.arguments).eval()
    return _Features(reparameterize_model(model)).to(memory_format=memory_format)
