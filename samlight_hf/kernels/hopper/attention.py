"""Dilated attention of the image encoder on Hopper GPUs, by a CUDA kernel (attention.cu).

It reads queries, keys and values from the projection's output without a copy, and overlaps with the previous and the
next kernel. Its weights are powers of two, and queries contain the scale of the scores (`QUERY_FACTOR`): nothing is
left to do between a score and its power.
"""

import math
from functools import cache
from pathlib import Path

import torch

from ...modeling.dilated_attention import check_pattern
from ..support import in_compile_thread, normal_numbers, only_compiles, tried, why_not_tried
from . import runtime as hopper


STAGES = {1: 2, 2: 2, 3: 5}  # blocks of keys and values in shared memory, by warpgroups per thread block
_DIM, _KEYS, _WARPGROUP_QUERIES = 64, 128, 64  # as in attention.cu
QUERY_FACTOR = _DIM**-0.5 / math.log(2)  # 2^(factor q k^T) is the usual exp(q k^T / 8)
_ONES = 8  # further columns of values, which are 1: the fewest that products can have


def why_not(qkv: torch.Tensor, segment_length: int | None, dilation_rate: int, dilation_offsets: str) -> str | None:
    """Return why the kernel cannot run with these arguments of `launch_attention`, as a sentence, or None if it can."""
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
    return _why_not_tried(qkv.device, **_constants(qkv, segment_length, dilation_rate, dilation_offsets))


def _why_not_tried(device: torch.device, **constants: int) -> str | None:
    def attempt() -> bool:
        rate, heads = constants["DILATION"], constants["HEADS"]
        num_tokens, dtype = constants["GROUP"] * rate, torch.bfloat16 if constants["BFLOAT16"] else torch.float16
        qkv = normal_numbers(device)(2, num_tokens, heads, 3, _DIM)
        qkv[:, :, :, 0] *= QUERY_FACTOR
        qkv[1, :, :, :2, 0] = 10  # scores of about 100 are too large for the first pass
        qkv = qkv.to(dtype)
        some = torch.arange(64, device=qkv.device) * (num_tokens - 1) // 63  # all tokens would take much memory
        per_head = bool(constants["PER_HEAD"])
        offsets = "per_head" if per_head else "all"
        output = tried(lambda: launch_attention(qkv, None, rate, offsets, constants["WARPGROUPS"]))
        expected = torch.stack([attention_of_tokens(image, some, rate, per_head) for image in qkv]).flatten(1)
        errors = output.view(*qkv.shape[:3], _DIM)[:, some].flatten(1) - expected
        return bool(output.isfinite().all() and (errors.norm(dim=1) < 0.01 * expected.norm(dim=1)).all())

    return why_not_tried("attention", device, tuple(constants.items()), attempt, "CUDA", "other kernels")


def attention_of_tokens(qkv: torch.Tensor, tokens: torch.Tensor, dilation_rate: int, per_head: bool) -> torch.Tensor:
    """Compute `launch_attention` of one segment for some of its tokens, in plain operations.

    Args:
        qkv: queries, which contain `QUERY_FACTOR`, keys and values of the segment, (N, H, 3, D).
        tokens: indices of the tokens, int64 (T,).
        dilation_rate: r.
        per_head: whether each head attends in one residue class alone.

    Returns:
        Float32 (T, H, D).
    """
    num_tokens, num_heads, _, _ = qkv.shape
    query, key, value = qkv.float().permute(2, 1, 0, 3)  # (H, N, D) each
    classes = torch.arange(num_tokens, device=qkv.device) % dilation_rate
    scores = query[:, tokens] @ key.mT * math.log(2)
    scores = scores.masked_fill(classes[tokens, None] != classes, float("-inf"))
    output = (scores.softmax(dim=-1) @ value).transpose(0, 1)
    if per_head:  # zero outside the head's residue class
        heads = torch.arange(num_heads, device=qkv.device) % dilation_rate
        output = output * (classes[tokens, None] == heads)[..., None]
    return output


def launch_attention(
    qkv: torch.Tensor,
    segment_length: int | None,
    dilation_rate: int,
    dilation_offsets: str,
    warpgroups: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `dilated_attention` in the kernel.

    Args:
        qkv: queries, which contain `QUERY_FACTOR`, keys and values, half precision (B, N, H, 3, 64).
        segment_length: w, in tokens; None for N.
        dilation_rate: r.
        dilation_offsets: "all" or "per_head".
        warpgroups: warpgroups per thread block, 1 to 3; by default the choice of `warpgroups_of`.
        out: contiguous memory for the result, which none of the inputs is in, aligned to 16 bytes; new by default.

    Returns:
        (B * N, H * 64).
    """
    batch_size, num_tokens, num_heads, _, head_dim = qkv.shape
    segment_length = segment_length or num_tokens
    group, num_segments = segment_length // dilation_rate, batch_size * num_tokens // segment_length
    constants = _constants(qkv, segment_length, dilation_rate, dilation_offsets, warpgroups)
    num_groups, warpgroups = _num_groups(constants, num_segments), constants["WARPGROUPS"]
    queries = warpgroups * _WARPGROUP_QUERIES
    shape = batch_size * num_tokens, num_heads * head_dim
    output = qkv.new_empty(*shape) if out is None else out.view(shape)
    assert hopper.are_aligned(output)  # written 16 bytes at a time
    if only_compiles():
        in_compile_thread(hopper.compile_in_process, source_of(**constants))
        return output
    kernel, shared_bytes = _kernel(qkv.device, **constants)
    row = 3 * num_heads * head_dim
    sizes = head_dim, group, dilation_rate, 3 * num_heads, num_segments
    strides = dilation_rate * row, row, head_dim, segment_length * row
    hopper.launch_kernel(
        kernel, qkv.device, num_groups * math.ceil(group / queries), 128 * warpgroups, shared_bytes,
        hopper.tensor_map(qkv, sizes, strides, (head_dim, queries, 1, 1, 1)),
        hopper.tensor_map(qkv, sizes, strides, (head_dim, _KEYS, 1, 1, 1)),
        output,
    )  # fmt: skip
    return output


def _constants(
    qkv: torch.Tensor, segment_length: int, dilation_rate: int, dilation_offsets: str, warpgroups: int | None = None
) -> dict[str, int]:
    """Return everything that the kernel is compiled for."""
    batch_size, num_tokens, num_heads, *_ = qkv.shape
    constants = {
        "BFLOAT16": int(qkv.dtype == torch.bfloat16), "HEADS": num_heads, "DILATION": dilation_rate,
        "GROUP": segment_length // dilation_rate,
        # With a rate of 1 there is only one residue class.
        "PER_HEAD": int(dilation_offsets == "per_head" and dilation_rate > 1),
    }  # fmt: skip
    if warpgroups is None:
        num_groups = _num_groups(constants, batch_size * num_tokens // segment_length)
        warpgroups = warpgroups_of(num_groups, constants["GROUP"], hopper.num_processors(qkv.device))
    return constants | {"WARPGROUPS": warpgroups, "STAGES": STAGES[warpgroups]}


def _num_groups(constants: dict[str, int], num_segments: int) -> int:
    """Return the number of groups of all heads."""
    return constants["HEADS"] * num_segments * (1 if constants["PER_HEAD"] else constants["DILATION"])


def warpgroups_of(num_groups: int, group: int, num_processors: int) -> int:
    """Choose the number of warpgroups per thread block.

    Three, which compute ahead, or one, if all thread blocks fit onto the device at once: whichever gives the busiest
    multiprocessor fewer warpgroups. Otherwise two.

    Args:
        num_groups: number of groups of all heads.
        group: number of tokens of a group.
        num_processors: number of multiprocessors.
    """
    busiest: dict[int, int] = {}
    for warpgroups, at_once in ((3, 1), (1, 3)):
        thread_blocks = math.ceil(num_groups * math.ceil(group / (warpgroups * _WARPGROUP_QUERIES)) / num_processors)
        if thread_blocks <= at_once:
            busiest[warpgroups] = warpgroups * thread_blocks
    return min(busiest, key=lambda warpgroups: busiest[warpgroups], default=2)


@cache
def _kernel(device: torch.device, **constants: int):
    """Return the kernel and the size of its shared memory."""
    code, shared_bytes = hopper.compiled(source_of(**constants)), _shared_bytes(constants)
    return hopper.load_kernel(device, code, _name(constants), shared_bytes), shared_bytes


def source_of(**constants: int) -> str:
    """Return the source of the kernel for these constants, which attention.cu uses in capitals."""
    dtype, ahead = "bf16" if constants["BFLOAT16"] else "f16", constants["WARPGROUPS"] == 3
    functions = hopper.product("query_key_product", _KEYS // 2 if ahead else _KEYS, dtype, may_overwrite=True)
    functions += hopper.product("weight_value_product", _DIM + _ONES, dtype, from_registers=True)
    defined: dict[str, int | str] = {**constants, "AHEAD": int(ahead)}
    defined |= {"NAME": _name(constants), "SHARED_BYTES": _shared_bytes(constants)}
    return hopper.source_of(Path(__file__).with_suffix(".cu"), defined, functions)


def _shared_bytes(constants: dict[str, int]) -> int:
    """Return the size of a thread block's queries, blocks of keys and values, ones, and barriers."""
    stages = constants["STAGES"]
    rows = _WARPGROUP_QUERIES * constants["WARPGROUPS"] + 2 * _KEYS * stages + 16  # the last: of ones
    return 2 * _DIM * rows + 8 * (1 + 3 * stages)


def _name(constants: dict[str, int]) -> str:
    """Return the kernel's name, which profilers show."""
    return f"attention_{constants['GROUP']}"
