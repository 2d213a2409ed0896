"""Dilated attention of the image encoder on Hopper GPUs, by a kernel in CUDA (hopper_attention.cu).

It reads queries, keys and values where the projection wrote them, and overlaps with the kernels before and after it.
"""

import math
from functools import cache, lru_cache
from pathlib import Path

import torch

from . import hopper
from .modeling.dilated_attention import check_pattern, dilated_attention_reference
from .triton_support import failure, normal_numbers


STAGES = {1: 2, 2: 3, 3: 5}  # blocks of keys and values in shared memory, by a program's warpgroups
_DIM, _KEYS, _WARPGROUP_QUERIES = 64, 128, 64  # as in hopper_attention.cu


def why_not(qkv: torch.Tensor, segment_length: int | None, dilation_rate: int, dilation_offsets: str) -> str | None:
    """Why the kernel cannot run with what `launch` is given: a sentence, or None where it can."""
    _, num_tokens, num_heads, _, head_dim = qkv.shape
    if reason := hopper.why_not_hopper(qkv.device, qkv.dtype):
        return reason
    if head_dim != _DIM:
        return f"heads have {head_dim} features, and not {_DIM}."
    segment_length = segment_length or num_tokens
    try:
        check_pattern(num_tokens, num_heads, segment_length, dilation_rate, dilation_offsets)
    except ValueError as error:
        return str(error)
    if (group := segment_length // dilation_rate) % _KEYS:
        return f"groups of {group} tokens are no multiple of {_KEYS}."
    if not qkv.numel():
        return "there are no images."
    if not hopper.are_aligned(qkv):
        return "the tensor is not contiguous, or begins at an odd address."
    return _why_not_at_all(qkv.device, _is_per_head(dilation_rate, dilation_offsets))


def _is_per_head(dilation_rate: int, dilation_offsets: str) -> bool:
    """Whether it is the kernel of one residue class a head: with a rate of 1 there is one alone."""
    return dilation_offsets == "per_head" and dilation_rate > 1


@lru_cache
def _why_not_at_all(device: torch.device, per_head: bool) -> str | None:
    """Why the kernel does not run on this device, a Hopper GPU, or None."""
    dilation_offsets = "per_head" if per_head else "all"

    @torch.inference_mode()
    def attempt() -> bool:
        qkv = normal_numbers()(1, 512, 2, 3, _DIM).bfloat16()
        expected, _ = dilated_attention_reference(*qkv.float().unbind(3), 512, 2, dilation_offsets)
        found = launch(qkv, 512, 2, dilation_offsets, _DIM**-0.5)
        return bool((found.view_as(expected).float() - expected).norm() < 0.01 * expected.norm())

    with torch.cuda.device(device):
        return failure("attention", attempt, "CUDA", "other kernels")


def launch(
    qkv: torch.Tensor,
    segment_length: int | None,
    dilation_rate: int,
    dilation_offsets: str,
    scaling: float,
    warpgroups: int | None = None,
) -> torch.Tensor:
    """(B, N, H, 3, 64), of queries, keys and values, to (B * N, H * 64): `dilated_attention`."""
    batch_size, num_tokens, num_heads, _, head_dim = qkv.shape
    segment_length = segment_length or num_tokens
    group, num_segments = segment_length // dilation_rate, batch_size * num_tokens // segment_length
    per_head = _is_per_head(dilation_rate, dilation_offsets)
    num_groups = num_heads * num_segments * (1 if per_head else dilation_rate)
    warpgroups = warpgroups or warpgroups_of(num_groups, group, hopper.num_processors(qkv.device))
    queries = warpgroups * _WARPGROUP_QUERIES
    kernel, shared_bytes = _kernel(
        qkv.device, BFLOAT16=int(qkv.dtype == torch.bfloat16), HEADS=num_heads, DILATION=dilation_rate, GROUP=group,
        PER_HEAD=int(per_head), WARPGROUPS=warpgroups, STAGES=STAGES[warpgroups],
    )  # fmt: skip
    row = 3 * num_heads * head_dim
    sizes = head_dim, group, dilation_rate, 3 * num_heads, num_segments
    strides = dilation_rate * row, row, head_dim, segment_length * row
    output = qkv.new_empty(batch_size * num_tokens, num_heads * head_dim)
    hopper.launch_kernel(
        kernel, qkv.device, num_groups * math.ceil(group / queries), 128 * warpgroups, shared_bytes,
        hopper.tensor_map(qkv, sizes, strides, (head_dim, queries, 1, 1, 1)),
        hopper.tensor_map(qkv, sizes, strides, (head_dim, _KEYS, 1, 1, 1)),
        output, scaling * 1.4426950408889634,  # exponentials are of two
    )  # fmt: skip
    return output


def warpgroups_of(num_groups: int, group: int, num_processors: int) -> int:
    """Of a program. If all programs fit at once, three, which look ahead, or one, if the busiest multiprocessor has fewer then; else two."""
    busiest = {}
    for warpgroups, at_once in ((3, 1), (1, 3)):
        programs = math.ceil(num_groups * math.ceil(group / (warpgroups * _WARPGROUP_QUERIES)) / num_processors)
        if programs <= at_once:
            busiest[warpgroups] = warpgroups * programs
    return min(busiest, key=busiest.get, default=2)


@cache
def _kernel(device: torch.device, **constants: int):
    """The kernel, and the shared memory that it takes."""
    shared_bytes = 2 * _DIM * (_WARPGROUP_QUERIES * constants["WARPGROUPS"] + 2 * _KEYS * constants["STAGES"])
    shared_bytes += 8 * (1 + 3 * constants["STAGES"])
    code = hopper.compiled(source_of(**constants))
    return hopper.load_kernel(device, code, _name(constants), shared_bytes), shared_bytes


def source_of(**constants: int) -> str:
    """The kernel for these constants, which are those in capitals in hopper_attention.cu."""
    dtype = "bf16" if constants["BFLOAT16"] else "f16"
    functions = hopper.product("query_key_product", _KEYS, dtype)
    functions += hopper.product("weight_value_product", _DIM, dtype, from_registers=True)
    return hopper.source_of(Path(__file__).with_suffix(".cu"), constants | {"NAME": _name(constants)}, functions)


def _name(constants: dict[str, int]) -> str:
    """What profilers show."""
    return f"attention_{constants['GROUP']}"
