"""Whether a part of a model computes what its config says, so that a fast path may read its weights and pass its modules over.

Fast paths multiply with `.weight` where the model calls a module. That is the same only for the very modules of the config: an
adapter (PEFT), a quantized layer, an own head, a forward hook, a parametrization or a tensor subclass would be ignored,
or applied by half. So each fast path asks here first. Where the answer is a reason, that part runs as in the model.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from transformers import PreTrainedModel, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPositionalEmbedding, SamPromptEncoder
from transformers.utils import output_capturing

from ..modeling.dilated_attention import DILATED_FLASH_ATTENTION
from ..modeling.modeling_sam_lightening import SamLighteningVisionEncoder


# All of them compute the same function. Another name is one that somebody has registered.
_ATTENTIONS = (
    None, "eager", "sdpa", DILATED_FLASH_ATTENTION, "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip
_DECODING = ("forward", "get_image_wide_positional_embeddings", "get_prompt_embeddings")  # of a SamModel
_CODE_OF_OURS = SamLighteningVisionEncoder.__module__.rpartition(".")[2]
_PLAIN = (torch.Tensor, nn.Parameter)
_NUMBERS = (bool, int, float, str, tuple, type(None))


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, or the one that PEFT has wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not_plain_encoder(model: PreTrainedModel) -> str | None:
    """Why a SAM-Lightening model's image encoder may not be read around: a sentence, or None where it may."""
    model = base_model(model)
    encoder = model.vision_encoder
    if reason := _why_not_methods(model, "get_image_embeddings") or _why_not_attention(encoder.config):
        return reason
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        expected = SamLighteningVisionEncoder(copy.deepcopy(encoder.config))
    return why_not_same(encoder, expected, "vision_encoder") or _why_not_alike(encoder, model, "vision_encoder")


def why_not_plain_decoder(model: PreTrainedModel, expected: dict[str, nn.Module] | None = None) -> str | None:
    """Why a model's prompt encoder and SAM's mask decoder may not be read around: a sentence, or None where they may.

    `expected` are its three parts as they should be, by name: by default they are made as the config tells.
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
    """Why a module does not compute, with its weights, what the `expected` one would with them: a sentence, or None."""
    own, others = (dict(each.named_modules(remove_duplicate=False)) for each in (module, expected))
    for place, other in others.items():
        full_name = f"{name}.{place}" if place else name
        if place not in own:
            return f"{full_name} is not there."
        if reason := _why_not_one(own[place], other):
            return f"{full_name} {reason}"
    if more := sorted(own.keys() - others.keys()):
        return f"{name}.{more[0]} is one more than the config tells of."
    return None


def _why_not_one(module: nn.Module, expected: nn.Module) -> str | None:
    """The same of one module without its children: the end of a sentence."""
    if not _is_same_class(type(module), type(expected)):
        return f"is a {_name(type(module))}, and not a {_name(type(expected))}."
    if reason := _why_hooked(module):
        return reason
    if not isinstance(expected, PreTrainedModel):  # which keeps where it came from, too
        for key, value in vars(expected).items():
            is_number = isinstance(value, _NUMBERS) and not key.startswith("_") and key != "training"
            if is_number and vars(module).get(key) != value:
                return f"has {key}={vars(module).get(key)!r}, and not {value!r}."
    for kind in ("_parameters", "_buffers"):
        own, others = getattr(module, kind), getattr(expected, kind)
        if own.keys() != others.keys():
            return f"has the weights {sorted(own)}, and not {sorted(others)}."
        for key, tensor in own.items():
            if (tensor is None) != (others[key] is None):
                return f"has {key}={tensor}."
            if tensor is not None and (reason := _why_not_tensor(tensor, others[key])):
                return f"has a {key} {reason}"
    return None


def _why_hooked(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "has a forward of its own."
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # transformers' own do nothing but in calls that ask for hidden states or attentions, and stay where they were needed once.
    if any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks):
        return "has a forward hook."
    return None


def _why_not_tensor(tensor: torch.Tensor, expected: torch.Tensor) -> str | None:
    if type(tensor) not in _PLAIN:
        return f"that is a {_name(type(tensor))}, and no plain tensor."
    if tensor.is_meta or tensor.layout != torch.strided:
        return f"without numbers, on {tensor.device} and {tensor.layout}."
    if tensor.shape != expected.shape:
        return f"of shape {tuple(tensor.shape)}, and not {tuple(expected.shape)}."
    return None


def _why_not_methods(model: nn.Module, *methods: str) -> str | None:
    """Why the model's own methods may not be passed over."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "there is a forward hook for all modules."
    cls = original_class(type(model))
    for name in methods:
        if name in vars(model) or getattr(cls, name, None) is not getattr(SamModel, name):
            return f"{_name(cls)} has a {name} of its own."
    return None


def _why_not_attention(config) -> str | None:
    name = config._attn_implementation
    return None if name in _ATTENTIONS else f"attention is {name!r}, which is not known here."


def _why_not_alike(part: nn.Module, model: nn.Module, name: str) -> str | None:
    for tensor_name, tensor in _tensors(part):
        if (tensor.device, tensor.dtype) != (model.device, model.dtype):
            return f"{name}.{tensor_name} is {tensor.dtype} on {tensor.device}, and the model {model.dtype} on {model.device}."
    return None


def _tensors(part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from part.named_parameters()
    yield from part.named_buffers()


def original_class(cls: type) -> type:
    """The class that `optimize` has made this one of, or the class itself."""
    return getattr(cls, "optimized_from", cls)


def _is_same_class(cls: type, expected: type) -> bool:
    cls = original_class(cls)
    if cls is expected:
        return True
    # The code that came with a checkpoint (trust_remote_code=True) has classes of its own, which do the same.
    is_ours = all(each.__module__.rpartition(".")[2] == _CODE_OF_OURS for each in (cls, expected))
    return is_ours and cls.__name__ == expected.__name__ and _instructions(cls) == _instructions(expected)


def _instructions(cls: type) -> tuple:
    code = cls.forward.__code__
    return code.co_code, code.co_names, code.co_varnames


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def weights_of(*parts: nn.Module) -> list[torch.Tensor]:
    """All plain tensors of the parts, their own."""
    return [tensor.detach() for part in parts for _, tensor in _tensors(part) if type(tensor) in _PLAIN]


def same_bits(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether tensors are equal, bit by bit, so that NaN is no different from NaN. Waits for the device once."""
    kinds = [[(tensor.shape, tensor.dtype, tensor.device) for tensor in each] for each in (tensors, others)]
    if kinds[0] != kinds[1]:
        return False
    if not tensors:
        return True
    flat = (torch.cat([tensor.flatten().view(torch.uint8) for tensor in each]) for each in (tensors, others))
    return torch.equal(*flat)
