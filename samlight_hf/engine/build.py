"""The choice of a model's mask decoder, the fastest one that can run it, and of the type that it computes in."""

import math

import torch
from transformers import PreTrainedModel

from .mask_decoder import FastMaskDecoder, why_not_fast
from .plain_decoder import Decoder, PlainMaskDecoder
from .plain_modules import SAM_TYPES, warn_of_plain_part


PLAIN_MODEL_TYPES = (*SAM_TYPES, "sam_hq")


def make_decoder(
    model: PreTrainedModel,
    cuda_graphs: bool | None = None,
    triton_kernels: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """Make the fastest mask decoder that can run this model.

    Args:
        model: A SAM of transformers, a `SamLighteningModel` or a SAM-HQ model.
        cuda_graphs: Replay the decoder from CUDA graphs. Default: on CUDA devices.
        triton_kernels: Use Triton kernels. Default: where they run.
        dtype: The type that the fast decoder computes in. Default: the model's. A plain decoder always uses the
            model's.

    Returns:
        A `FastMaskDecoder`, or a `PlainMaskDecoder` if only the model itself can run its decoder. For a SAM a warning
        then gives the reason.

    Raises:
        ValueError: If the model has no decoder of a SAM, or if `cuda_graphs` or `triton_kernels` is True and
            impossible.
    """
    on_cuda, reason = model.device.type == "cuda", why_not_fast(model)
    if cuda_graphs and not on_cuda:
        raise ValueError(f"cuda_graphs=True needs a model on a CUDA device, and this one is on {model.device}.")
    if cuda_graphs and reason:
        raise ValueError(f"cuda_graphs=True is not possible: {reason}")
    if reason and model.config.model_type not in PLAIN_MODEL_TYPES:
        raise ValueError(f"model_type={model.config.model_type!r} cannot be used here: {reason}")
    if reason:
        warn_of_plain_part("mask decoder", reason, model)
        return PlainMaskDecoder(model)
    return FastMaskDecoder(model, on_cuda if cuda_graphs is None else cuda_graphs, triton_kernels, dtype, checked=True)


def decoder_dtype_of(
    model: PreTrainedModel,
    dtype: torch.dtype,
    decoder_dtype: torch.dtype | None = None,
    checked: bool = False,
) -> torch.dtype:
    """Choose the floating point type of the mask decoder.

    Most of the change that bfloat16 makes to masks comes from rounding the decoder's weights. So by default the decoder
    of a model in bfloat16 on a CUDA device computes in float16, if its weights are in the range of float16.

    Args:
        model: The model.
        dtype: The type that the model is to run in.
        decoder_dtype: The user's choice, which wins.
        checked: The caller knows that `why_not_fast` returns None for the model.

    Raises:
        ValueError: If `decoder_dtype` is not a floating point type.
    """
    if decoder_dtype is not None:
        check_floating_point("decoder_dtype", decoder_dtype)
        return decoder_dtype
    if dtype != torch.bfloat16 or model.device.type != "cuda" or (not checked and why_not_fast(model)):
        return dtype
    weights = [weight.detach() for part in (model.prompt_encoder, model.mask_decoder) for weight in part.parameters()]
    largest = torch.nn.utils.get_total_norm(weights, norm_type=math.inf)  # of all of them, in few launches
    return torch.float16 if largest < torch.finfo(torch.float16).max else dtype


def check_floating_point(name: str, dtype: torch.dtype):
    """Raise ValueError if the argument called `name` is not a floating point type of torch."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name}={dtype!r} must be a floating point type, such as torch.bfloat16.")
