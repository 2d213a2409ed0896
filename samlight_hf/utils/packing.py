"""Several tensors in one memory, one after the other."""

from collections.abc import Sequence
from itertools import accumulate

import torch


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
    """Copy tensors of one device into one memory.

    torch's allocator keeps memory in segments, and each tensor keeps its own. Tensors that are made one by one, beside
    others that are freed, are scattered over more segments than they fill.
    """
    if not tensors:
        return []
    memory = torch.empty(packed_bytes(tensors), dtype=torch.uint8, device=tensors[0].device)
    return [view.copy_(tensor) for view, tensor in zip(views_like(tensors, memory), tensors)]
