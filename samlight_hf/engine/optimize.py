"""`optimize`: a whole model for inference, with the calls and outputs of the original."""

import copy
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedModel

from ..kernels.support import only_compiling, prepare_compiler
from .build import check_floating_point, decoder_dtype_of
from .mask_decoder import FastMaskDecoder, why_not_fast
from .optimized_model import FastPaths, OptimizationReport, OptimizedEncoder, OptimizedModel, optimized_class
from .plain_modules import SAM_TYPES, warn_of_plain_part


__all__ = ["OptimizationReport", "optimize"]


def optimize(
    model: PreTrainedModel,
    dtype: torch.dtype = torch.bfloat16,
    image_batch_sizes: Sequence[int] = (1, 8),
    prompt_counts: Sequence[int] = (1, 16, 64),
    decoder_dtype: torch.dtype | None = None,
    graphs_when_needed: bool = False,
    progress: bool = False,
    skip_padding: bool = False,
) -> Any:
    """Make a fast copy of a model for inference, with the same calls and outputs.

    Image encoder and mask decoder of the copy are fused and replayed from CUDA graphs. Graphs are captured here: for
    batches of `image_batch_sizes` images, and for `prompt_counts` prompts on one image, each a point or a box, with
    three masks and with one. Calls with other shapes run too, fused and without graphs. Calls that the fast paths do
    not support (gradients, hidden states, attention weights, PerSAM's arguments) run as in `model`, and a warning gives
    the reason once. So does a part whose modules are not those of its config, for example because of adapters or hooks.

    On other devices than CUDA the copy keeps the dtype of `model`, has no graphs, and its image encoder is the plain
    one.

    The copy may be called from several threads and on several streams: calls take turns, and outputs belong to the
    caller. It takes the memory of the weights in `dtype`, and once more that of the fused ones. Later changes of
    `model` do not reach it, and its own weights cannot be changed: `load_state_dict` raises RuntimeError. It can be
    neither saved, nor copied or pickled; keep `model` for that.

    Args:
        model: A SAM of transformers or a `SamLighteningModel`.
        dtype: The floating point type of the image encoder and of the outputs.
        image_batch_sizes: Numbers of images in a batch for which the encoder gets a graph. More than 16 images are
            replayed in parts.
        prompt_counts: Numbers of prompts on an image for which the decoder gets graphs. More than 64 prompts are
            replayed in parts.
        decoder_dtype: The floating point type that the mask decoder computes in, with weights converted directly from
            those of `model`. Default: `dtype`, but float16 for bfloat16 if the weights are in its range: its three more
            bits give the masks of float32 much more often.
        graphs_when_needed: Capture each graph, and compile the kernels that it alone needs, at the first call of its
            shape instead of here. That call then takes seconds where the kernels' cache is empty.
        progress: Show a progress bar on the console while kernels are compiled and graphs captured.
        skip_padding: Compute only the rows of patches that hold image: a landscape image takes less time, and its masks
            are close to those of all rows, but not equal; see `engine.padding`. Not for the fused encoder on CUDA.

    Returns:
        A model of the same class. Its `report` says how encoder and decoder run, and the time and memory of the graphs.

    Raises:
        ValueError: If the model is no SAM, is optimized already, or is dispatched by accelerate, for sizes below 1, and
            for a `dtype` or `decoder_dtype` that is not a floating point type.

    Example:
        >>> model = optimize(AutoModel.from_pretrained("org/sam-lightening").cuda())
        >>> outputs = model(pixel_values=pixel_values, input_points=input_points)
        >>> print(model.report)
    """
    if isinstance(model, OptimizedModel):
        raise ValueError("this model is optimized already: optimize the model that it was made from.")
    reason = why_not_fast(model)
    if reason and getattr(getattr(model, "config", None), "model_type", None) not in SAM_TYPES:
        raise ValueError(f"optimize needs a SAM: {reason}")
    _check_sizes("image_batch_sizes", image_batch_sizes)
    _check_sizes("prompt_counts", prompt_counts)
    check_floating_point("dtype", dtype)
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            "accelerate runs this model, which is on several devices or offloaded: load it on one, without device_map."
        )
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        prepare_compiler()
    dtype = dtype if on_cuda else model.dtype
    decoder_dtype = decoder_dtype_of(model, dtype, decoder_dtype, checked=not reason)
    optimized = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    for module in optimized.modules():
        module.register_load_state_dict_pre_hook(_refuse_weights)
    for module, kind in ((optimized.vision_encoder, OptimizedEncoder), (optimized, OptimizedModel)):
        module.__class__ = optimized_class(kind, type(module))  # type: ignore[arg-type]  # a type is hashable
    decoder: FastMaskDecoder | None = None
    if reason:
        warn_of_plain_part("mask decoder", reason, model)
    else:
        with only_compiling():  # its kernels are tried later, when those of the encoder are compiled, too
            source = optimized if decoder_dtype == dtype else model
            decoder = FastMaskDecoder(source, on_cuda, dtype=decoder_dtype, checked=True)
    paths = FastPaths(optimized, decoder, image_batch_sizes, prompt_counts, graphs_when_needed, progress, skip_padding)
    paths.report.decoder = f"plain: {reason}" if reason else "fused"
    optimized._paths = optimized.vision_encoder._paths = paths
    return optimized


def _check_sizes(name: str, values: Sequence[int]):
    if isinstance(values, Integral) or any(
        isinstance(value, bool) or not isinstance(value, Integral) or value < 1 for value in values
    ):
        raise ValueError(f"{name}={values!r} must be integers of 1 and more, such as (1, 8).")


def _refuse_weights(*_):
    raise RuntimeError("an optimized model keeps its weights: load them into the model itself, and optimize it again.")
