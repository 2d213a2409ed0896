"""Several tensors in one memory, one after the other.

torch's allocator keeps memory in segments, and each tensor keeps its own. Tensors that are made one by one, beside
others that are freed, are scattered over more segments than they fill.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import nn


Module = TypeVar("Module", bound=nn.Module)


def aligned(num_bytes: int) -> int:
    """Round a number of bytes up to where the next tensor may begin."""
    return -(-num_bytes // 256) * 256  # as torch aligns tensors at least


def packed_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Return how many bytes the tensors take."""
    return sum(aligned(tensor.nbytes) for tensor in tensors)


def views_like(examples: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors of the shapes and dtypes of `examples` in memory, uint8 (num_bytes,)."""
    starts = accumulate((aligned(example.nbytes) for example in examples), initial=0)
    return [
        memory[start : start + example.nbytes].view(example.dtype).view(example.shape)
        for start, example in zip(starts, examples)
    ]


def packed(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy tensors of one device into one memory."""
    if not tensors:
        return []
    memory = torch.empty(packed_bytes(tensors), dtype=torch.uint8, device=tensors[0].device)
    return [view.copy_(tensor) for view, tensor in zip(views_like(tensors, memory), tensors)]


@torch.no_grad()
def packed_copy(module: Module, dtype: torch.dtype) -> Module:
    """Copy a module as `copy.deepcopy(module).to(dtype)` does, with its tensors in one memory.

    Tensors of other kinds, such as those of quantized layers, and on other devices than the first have their own.
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else None
    plain = {
        id(tensor): tensor
        for tensor in tensors
        if type(tensor) in (torch.Tensor, nn.Parameter) and (tensor.layout, tensor.device) == (torch.strided, device)
    }
    examples = [
        torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="meta")
        for tensor in plain.values()
    ]
    views = views_like(examples, torch.empty(packed_bytes(examples), dtype=torch.uint8, device=device))
    copies: dict[int, object] = {}
    for (key, tensor), view in zip(plain.items(), views, strict=True):
        view.copy_(tensor)
        copies[key] = nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
    return copy.deepcopy(module, copies).to(dtype)
