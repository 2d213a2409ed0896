"""Other image encoders at the same image size, random weights: transformers' SAMs, and backbones that light SAMs use.

timm is optional; without it, its rows say so. Convolutional backbones are measured in channels_last too, and with their
branches merged for inference: each peer at its best.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from .encoders import COMPILED, EAGER, GRAPH, encoder_row
from .measure import attempt, building, count_gflop
from .settings import Settings


IMAGE_SIZE = 1024
SAM_SHAPES = {
    "SAM ViT-B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "SAM ViT-L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "SAM ViT-H": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
}  # fmt: skip
LAYERWISE = f"{COMPILED} of each layer"


class Backbone(NamedTuple):
    """A backbone of timm: its name there and further arguments, and the light SAM that has it as its image encoder."""

    name: str
    of: str
    convolutional: bool
    arguments: dict = {}


BACKBONES = (
    Backbone("tiny_vit_5m_224", "MobileSAM", False),  # takes no img_size
    Backbone("repvit_m1", "EdgeSAM", True),
    # As timm has it, not named there: L1 with fewer blocks.
    Backbone("efficientvit_l1", "EfficientViT-SAM-L0", True, {"depths": (1, 1, 1, 4, 4)}),
    Backbone("efficientvit_l1", "EfficientViT-SAM-L1", True),
    Backbone("vit_tiny_patch16_224", "EfficientSAM-Ti", False, {"img_size": IMAGE_SIZE}),
    Backbone("vit_small_patch16_224", "EfficientSAM-S", False, {"img_size": IMAGE_SIZE}),
    Backbone("resnet18", "NanoSAM", True),
)


def peer_rows(settings: Settings) -> Iterator[dict]:
    """All peers that can run here. On a CPU: SAM ViT-B and the backbones."""
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
    """In the benchmark's dtype: every mode, every batch size. One row where it cannot even be built."""

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
    """Of one image; built where it must be, because some modules read numbers from tensors while they are built."""
    with building(torch.device(device), torch.float32):
        return count_gflop(build().eval(), torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))


def _sam_rows(name: str, settings: Settings) -> Iterator[dict]:
    """Eager attention in float32, as published; the fastest attention in half precision, graphed, and compiled.

    Launches weigh at batch 1 alone, and float32 takes long: the graph is measured there, and float32 up to batch 8.
    """
    one = settings.batch_sizes[:1]
    ways = [("eager", torch.float32, EAGER, [size for size in settings.batch_sizes if size <= 8])]
    ways.append(("sdpa", settings.dtype, EAGER, settings.batch_sizes))
    if settings.on_cuda:
        ways.append(("sdpa", settings.dtype, GRAPH, one))
    if settings.compile and (name == "SAM ViT-B" or settings.compile_peers):
        ways.append(("sdpa", settings.dtype, LAYERWISE, settings.batch_sizes))
    gflop = _gflop(partial(make_sam, name, "sdpa"), "meta")
    for attention, dtype, mode, batch_sizes in ways:

        def build(attention=attention, dtype=dtype, mode=mode) -> nn.Module:
            with building(settings.device, dtype):
                encoder = make_sam(name, attention).eval()
            if mode == LAYERWISE:  # layers share what is compiled, which takes minutes for 32 of them otherwise
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
    """transformers' image encoder of that SAM, with weights that are not nearly zero, as its config has them."""
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(**SAM_SHAPES[name], initializer_range=0.02, attn_implementation=attn_implementation)
    return SamVisionModel(config).vision_encoder


def make_sam2() -> nn.Module:
    """transformers' SAM 2 with its default backbone, Hiera-tiny, and its feature pyramid."""
    from transformers import Sam2VisionConfig, Sam2VisionModel

    return Sam2VisionModel(Sam2VisionConfig())


def make_edgetam() -> nn.Module:
    """transformers' EdgeTAM: RepViT-M1 from timm, as its published config has it, and its feature pyramid."""
    from transformers import EdgeTamVisionConfig, EdgeTamVisionModel, TimmWrapperConfig

    arguments = {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
    backbone = TimmWrapperConfig(architecture="repvit_m1", model_args=arguments)
    return EdgeTamVisionModel(EdgeTamVisionConfig(backbone_config=backbone))


class _MakesTensorsOn(nn.Module):
    """A module whose new tensors are on `device`: SAM makes positions on the CPU in each call, which no CUDA graph can copy."""

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
        return self.model.forward_features(pixel_values)


def make_backbone(backbone: Backbone, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    import timm
    from timm.utils import reparameterize_model

    model = timm.create_model(backbone.name, pretrained=False, num_classes=0, **backbone.arguments).eval()
    return _Features(reparameterize_model(model)).to(memory_format=memory_format)
