"""Checks that a part of a model computes what its config says, so that a fast path may replace its modules.

Fast paths multiply with a module's `weight` where the model calls the module. The two are equal only for the module
classes that the config names: an adapter (PEFT), a quantized layer, a custom head, a forward hook, a parametrization or
a tensor subclass would be ignored or applied in part. Each fast path therefore asks here first. If the answer is a
reason, that part runs as in the model.
"""

import copy
import warnings
from collections.abc import Iterator
from inspect import isfunction
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from transformers import PreTrainedModel, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPositionalEmbedding, SamPromptEncoder
from transformers.utils import output_capturing

from ..modeling.dilated_attention import DILATED_FLASH_ATTENTION
from ..modeling.modeling_sam_lightening import SamLighteningVisionEncoder


SAM_TYPES = ("sam", "sam_lightening")  # model types whose image encoder and mask decoder may have fast paths

# All of these compute the same function. Any other name was registered by the user.
_ATTENTIONS = (
    None, "eager", "sdpa", DILATED_FLASH_ATTENTION, "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip
# Methods of SamModel that fast paths replace.
_DECODING = ("forward", "get_image_wide_positional_embeddings", "get_prompt_embeddings")
_CODE_OF_OURS = SamLighteningVisionEncoder.__module__.rpartition(".")[2]
_PLAIN = (torch.Tensor, nn.Parameter)
_NUMBERS = (bool, int, float, str, tuple, type(None))


def base_model(model: nn.Module) -> Any:
    """Return the model itself, or the model that PEFT has wrapped."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def why_not_plain_encoder(model: PreTrainedModel) -> str | None:
    """Return why the image encoder of a SAM-Lightening model cannot be replaced by a fast path, or None if it can."""
    model = base_model(model)
    encoder = model.vision_encoder
    if reason := _why_not_methods(model, "get_image_embeddings") or _why_not_attention(encoder.config):
        return reason
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        expected = SamLighteningVisionEncoder(copy.deepcopy(encoder.config))
    return why_not_same(encoder, expected, "vision_encoder") or _why_not_alike(encoder, model, "vision_encoder")


def why_not_plain_decoder(model: PreTrainedModel, expected: dict[str, nn.Module] | None = None) -> str | None:
    """Return why the prompt encoder and mask decoder of a SAM cannot be replaced by a fast path, or None if they can.

    Args:
        model: The model to check.
        expected: The three parts as they should be, by attribute name. Default: built from the model's config.
    """
    model = base_model(model)
    if reason := _why_hooked(model):
        return f"the model {reason}"
    if reason := _why_not_methods(model, *_DECODING) or _why_not_attention(model.config.mask_decoder_config):
        return reason
    if expected is None:
        with torch.device("meta"):
            expected = {
                "shared_image_embedding": SamPositionalEmbedding(model.config.vision_config),
                "prompt_encoder": SamPromptEncoder(model.config),
                "mask_decoder": SamMaskDecoder(model.config.mask_decoder_config),
            }
    for name, part in expected.items():
        own = getattr(model, name)
        if reason := why_not_same(own, part, name) or _why_not_alike(own, model, name):
            return reason
    return None


def why_not_same(module: nn.Module, expected: nn.Module, name: str) -> str | None:
    """Return why `module`, called `name`, computes something else than `expected` would with its weights, or None."""
    own_modules, expected_modules = (dict(root.named_modules(remove_duplicate=False)) for root in (module, expected))
    for path, expected_module in expected_modules.items():
        full_name = f"{name}.{path}" if path else name
        if path not in own_modules:
            return f"{full_name} is missing."
        if reason := _why_not_one(own_modules[path], expected_module):
            return f"{full_name} {reason}"
    if extra := sorted(own_modules.keys() - expected_modules.keys()):
        return f"{name}.{extra[0]} is one more than the config has."
    return None


def _why_not_one(module: nn.Module, expected: nn.Module) -> str | None:
    """Compare one module without its children: return the end of a sentence, or None."""
    if not _is_same_class(type(module), type(expected)):
        return f"is a {_name(type(module))} instead of a {_name(type(expected))}."
    if reason := _why_hooked(module):
        return reason
    if not isinstance(expected, PreTrainedModel):  # a PreTrainedModel also stores where it came from
        for key, value in vars(expected).items():
            is_number = isinstance(value, _NUMBERS) and not key.startswith("_") and key != "training"
            if is_number and vars(module).get(key) != value:
                return f"has {key}={vars(module).get(key)!r} instead of {value!r}."
    for kind in ("_parameters", "_buffers"):
        own, others = getattr(module, kind), getattr(expected, kind)
        if own.keys() != others.keys():
            return f"has the weights {sorted(own)} instead of {sorted(others)}."
        for key, tensor in own.items():
            if (tensor is None) != (others[key] is None):
                return f"has {key}={tensor}."
            if tensor is not None and (reason := _why_not_tensor(tensor, others[key])):
                return f"has a {key} {reason}"
    return None


def _why_hooked(module: nn.Module) -> str | None:
    for name, value in vars(module).items():
        is_method = callable(value) and isfunction(getattr(type(module), name, None))
        # Others that every model has, such as `train` and `to`, compute nothing.
        if name == "forward" or (is_method and not hasattr(PreTrainedModel, name)):
            return f"has a {name} of its own."
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # transformers' own hooks stay once they were needed, and act only in calls that ask for hidden states or
    # attentions.
    if any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks):
        return "has a forward hook."
    return None


def _why_not_tensor(tensor: torch.Tensor, expected: torch.Tensor) -> str | None:
    if type(tensor) not in _PLAIN:
        return f"that is a {_name(type(tensor))} and not a plain tensor."
    if tensor.is_meta or tensor.layout != torch.strided:
        return f"without numbers, on {tensor.device} and {tensor.layout}."
    if tensor.shape != expected.shape:
        return f"of shape {tuple(tensor.shape)} instead of {tuple(expected.shape)}."
    return None


def _why_not_methods(model: nn.Module, *methods: str) -> str | None:
    """Return why a fast path may not bypass these methods of the model, or None."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "there is a forward hook for all modules."
    cls = original_class(type(model))
    for name in methods:
        if name in vars(model) or getattr(cls, name, None) is not getattr(SamModel, name):
            return f"{_name(cls)} has a {name} of its own."
    return None


def _why_not_attention(config) -> str | None:
    name = config._attn_implementation
    return None if name in _ATTENTIONS else f"attention is {name!r}, which is unknown here."


def _why_not_alike(part: nn.Module, model: PreTrainedModel, name: str) -> str | None:
    for tensor_name, tensor in _tensors(part):
        if (tensor.device, tensor.dtype) != (model.device, model.dtype):
            return (
                f"{name}.{tensor_name} is {tensor.dtype} on {tensor.device}, and the model {model.dtype} on "
                f"{model.device}."
            )
    return None


def _tensors(part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from part.named_parameters()
    yield from part.named_buffers()


def original_class(cls: type) -> type:
    """Return the class that `optimize` derived this one from, or the class itself."""
    return getattr(cls, "optimized_from", cls)


def _is_same_class(cls: type, expected: type) -> bool:
    cls = original_class(cls)
    if cls is expected:
        return True
    # The code that comes with a checkpoint (trust_remote_code=True) defines its own classes, which do the same.
    is_ours = all(c.__module__.rpartition(".")[2] == _CODE_OF_OURS for c in (cls, expected))
    return is_ours and cls.__name__ == expected.__name__ and _instructions(cls) == _instructions(expected)


def _instructions(cls: type) -> tuple:
    code: CodeType = cls.forward.__code__  # type: ignore[attr-defined]
    return code.co_code, code.co_names, code.co_varnames


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def weights_of(*parts: nn.Module) -> list[torch.Tensor]:
    """Return all plain parameters and buffers of the modules, detached and not copied."""
    return [tensor.detach() for part in parts for _, tensor in _tensors(part) if type(tensor) in _PLAIN]


def same_bits(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Compare two lists of tensors bit by bit, so that NaN equals NaN. Waits for the device once."""
    kinds, other_kinds = ([(t.shape, t.dtype, t.device) for t in group] for group in (tensors, others))
    if kinds != other_kinds:
        return False
    if not tensors:
        return True
    flat, other_flat = (torch.cat([t.flatten().view(torch.uint8) for t in group]) for group in (tensors, others))
    return torch.equal(flat, other_flat)


def warn_of_plain_part(part: str, reason: str, model: PreTrainedModel):
    """Warn that a part of a SAM, which normally has a fast path, runs as in the model."""
    if model.config.model_type in SAM_TYPES:
        warnings.warn(f"The {part} runs as in the model, and slower: {reason}", stacklevel=4)
