# SPDX-License-Identifier: Apache-2.0
"""Dilated attention (SAM-Lightening, arXiv 2403.09195, section 2.1): pattern, slow reference and fast path.

**The pattern.** N tokens in raster order, a segment length w that divides N, a dilation rate r that divides w. Token n
lies in segment n // w and in residue class (n mod w) mod r, and attends to the tokens of its own segment and residue
class, its group. Every token is a query and every token is a key, in N/w * r independent dense attentions over groups
of w/r tokens. With `dilation_offsets="per_head"` (LongNet, arXiv 2307.02486), head h attends among the tokens of
residue class h mod r alone and is zero for all others.

**The fast path.** Write the row n of a contiguous (N, H*D) matrix as n = (i * w/r + j) * r + rho. The same memory, read
as (N/w, w/r, r*H, D), is a batch of N/w sequences of w/r tokens with r*H heads: heads and residue classes are one axis,
and any dense kernel runs on it without a copy. `split_groups` is that view. (SAM's packed projection gives q, k and v
side by side and not contiguous. The model's dilated layers pay one copy for that, undilated ones none.)

**The kernel.** `dense_attention` runs the groups. `backend="auto"` takes the fastest kernel that can run. A named
backend runs that kernel, or raises an error with the reason (`why_not`).

Tensors are (B, N, H, D): batch, tokens, heads, head dimension. Only the functions for transformers' AttentionInterface,
at the end of the file, take its (B, H, N, D).
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface


DILATED_FLASH_ATTENTION = "dilated_flash_attention"

DILATION_OFFSETS = ("all", "per_head")
BACKENDS = ("auto", "flash_attention_4", "cudnn", "flash", "sdpa", "blocks")

_BLOCK_QUERIES = 512  # of backend "blocks": with 2,048 keys, their scores are 2 MB


def check_pattern(
    num_tokens: int, num_heads: int, segment_length: int, dilation_rate: int, dilation_offsets: str, where: str = ""
):
    """Check that a pattern is possible for `num_tokens` tokens in `num_heads` heads.

    Args:
        where: text that follows the field's name in messages, such as " in layer 3".

    Raises:
        ValueError: if it is not; the message has both numbers and the fix.
    """
    for name, value in (("segment_length", segment_length), ("dilation_rate", dilation_rate)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}{where} must be a positive integer.")
    if num_tokens % segment_length:
        raise ValueError(
            f"segment_length={segment_length}{where} must divide the {num_tokens} tokens. "
            "Use a divisor, or None for all of them."
        )
    if segment_length % dilation_rate:
        raise ValueError(f"dilation_rate={dilation_rate}{where} must divide segment_length={segment_length}.")
    if dilation_offsets not in DILATION_OFFSETS:
        raise ValueError(f"dilation_offsets={dilation_offsets!r}{where} must be one of {', '.join(DILATION_OFFSETS)}.")
    if dilation_offsets == "per_head" and num_heads % dilation_rate:
        raise ValueError(
            f'dilation_offsets="per_head"{where} needs dilation_rate={dilation_rate} to divide '
            f'num_attention_heads={num_heads}. Change one of them, or use "all".'
        )


def split_groups(
    tokens: torch.Tensor, segment_length: int, dilation_rate: int, dilation_offsets: str = "all"
) -> torch.Tensor:
    """Split tokens (B, N, H, D) into the groups that attend among themselves.

    Returns:
        (B*N/w, w/r, r*H, D), a view if the input is contiguous; with `"per_head"` (B*N/w, w/r, H, D), a copy of 1/r of
        it.
    """
    batch_size, num_tokens, num_heads, head_dim = tokens.shape
    num_segments = batch_size * (num_tokens // segment_length)
    group_length = segment_length // dilation_rate
    if dilation_rate == 1 or dilation_offsets == "all":
        return tokens.reshape(num_segments, group_length, dilation_rate * num_heads, head_dim)
    # (segments, w/r, residue class, heads/r, residue class of the head, D): on the diagonal each head has its own
    # class.
    tokens = tokens.reshape(
        num_segments, group_length, dilation_rate, num_heads // dilation_rate, dilation_rate, head_dim
    )
    own_class = tokens.diagonal(dim1=2, dim2=4)  # (segments, w/r, H/r, D, r)
    return own_class.transpose(3, 4).reshape(num_segments, group_length, num_heads, head_dim)


def merge_groups(
    groups: torch.Tensor,
    num_tokens: int,
    num_heads: int,
    segment_length: int,
    dilation_rate: int,
    dilation_offsets: str = "all",
) -> torch.Tensor:
    """Invert `split_groups`: return (B, N, H, D). With `"per_head"` the rows of other residue classes are zero."""
    head_dim = groups.shape[-1]
    if dilation_rate > 1 and dilation_offsets == "per_head":
        num_segments, group_length = groups.shape[:2]
        own_class = groups.reshape(num_segments, group_length, num_heads // dilation_rate, dilation_rate, head_dim)
        groups = torch.diag_embed(own_class.transpose(3, 4), dim1=2, dim2=4)
    return groups.reshape(-1, num_tokens, num_heads, head_dim)


def dilated_attention_mask(
    num_tokens: int,
    num_heads: int,
    segment_length: int,
    dilation_rate: int,
    dilation_offsets: str = "all",
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return the pattern by its definition: bool (H, N, N), True where query n of head h may see key m."""
    token = torch.arange(num_tokens, device=device)
    segment = token // segment_length
    residue_class = (token % segment_length) % dilation_rate
    same_group = (segment[:, None] == segment) & (residue_class[:, None] == residue_class)
    if dilation_offsets == "all":
        return same_group.expand(num_heads, -1, -1)
    head = torch.arange(num_heads, device=device)
    in_own_class = residue_class == (head % dilation_rate)[:, None]  # (H, N)
    return same_group & in_own_class[:, :, None] & in_own_class[:, None, :]


def dilated_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_length: int,
    dilation_rate: int = 1,
    dilation_offsets: str = "all",
    scaling: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `dilated_attention` as a masked softmax over all N keys: slow, simple, in any dtype.

    Returns:
        The output (B, N, H, D) and the attention weights (B, H, N, N).
    """
    _, num_tokens, num_heads, head_dim = query.shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    mask = dilated_attention_mask(
        num_tokens, num_heads, segment_length, dilation_rate, dilation_offsets, device=query.device
    )
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scaling
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1) * mask  # with per_head, rows of other residue classes see no key
    return torch.einsum("bhnm,bmhd->bnhd", weights, value), weights


def dilated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_length: int | None = None,
    dilation_rate: int = 1,
    dilation_offsets: str = "all",
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute dilated attention, differentiably; the top of this file describes the pattern.

    Args:
        query, key, value: (B, N, H, D) each, float. Contiguous ones are not copied with `"all"`.
        segment_length: w, in tokens; divides N. `None` is N.
        dilation_rate: r; divides w.
        dilation_offsets: `"all"` or `"per_head"` (r must then divide H).
        scaling: factor of the scores, 1/sqrt(D) if `None`.
        dropout: probability of dropping an attention weight.
        backend: one of `BACKENDS`; see `dense_attention`.

    Returns:
        (B, N, H, D).

    Raises:
        ValueError: for an impossible pattern, tensors of different shapes, or a named backend that cannot run here.
    """
    if not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(tokens.shape)) for tokens in (query, key, value))
        raise ValueError(f"query, key and value must have one shape (B, N, H, D), but have {shapes}.")
    _, num_tokens, num_heads, _ = query.shape
    segment_length = num_tokens if segment_length is None else segment_length
    check_pattern(num_tokens, num_heads, segment_length, dilation_rate, dilation_offsets)
    pattern = (segment_length, dilation_rate, dilation_offsets)
    query, key, value = (split_groups(tokens, *pattern) for tokens in (query, key, value))
    output = dense_attention(query, key, value, scaling=scaling, dropout=dropout, backend=backend)
    return merge_groups(output, num_tokens, num_heads, *pattern)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute full attention within each sequence of a batch, (B, L, H, D) x 3 -> (B, L, H, D).

    Args:
        query, key, value: (B, L, H, D) each, float.
        scaling: factor of the scores, 1/sqrt(D) if `None`.
        dropout: probability of dropping an attention weight.
        backend: one of `BACKENDS`. `"auto"` takes FlashAttention-4 where `_prefers_flash_attention_4` says so,
            "blocks" where `_prefers_blocks` says so, otherwise the choice of scaled_dot_product_attention, which
            prefers cuDNN to its built-in flash kernel on Hopper. `"sdpa"` always takes the latter. Any other name runs
            that kernel alone.

    Raises:
        ValueError: if the named kernel cannot run here, with the reason.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if backend == "auto":
        if (
            _prefers_flash_attention_4(query, key, value)
            and why_not("flash_attention_4", query, key, value, dropout) is None
        ):
            if torch.compiler.is_compiling():  # the choice is made when the compiled code runs or is captured
                return torch.ops.samlight_hf.dense_attention(query, key, value, scaling)
            backend = "flash_attention_4"
        elif _prefers_blocks(query) and why_not("blocks", query, key, value, dropout) is None:
            backend = "blocks"
    elif reason := why_not(backend, query, key, value, dropout):
        raise ValueError(f"Attention backend {backend!r} cannot run here: {reason}")
    if backend == "flash_attention_4":
        flash_attention_4, _ = _load_flash_attention_4()
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attention_4(query, key, value, softmax_scale=scaling, deterministic=deterministic)[0]
    if backend == "blocks":
        return _attend_in_blocks(query, key, value, scaling)

    query, key, value = (tokens.transpose(1, 2) for tokens in (query, key, value))  # (B, H, L, D)
    only = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}.get(backend)
    with sdpa_kernel(only) if only else contextlib.nullcontext():
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2)


def _prefers_flash_attention_4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether FlashAttention-4 is expected to be the fastest, from benchmarks/results/ on an H100.

    Its forward is the fastest for sequences of 1,024 tokens and more, and its backward for any length. Its launch from
    Python takes longer than cuDNN's, so it pays off in CUDA graphs, or if other kernels hide the launch. torch.compile
    does not know yet which case it compiles for, and asks again when its code runs.
    """
    batch_size, length, num_heads, head_dim = query.shape
    training = _needs_gradient(query, key, value)
    # An exported program must load where there is no FlashAttention-4. (Dynamo of torch 2.11 says is_exporting() to
    # compile.)
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if not query.is_cuda or (length < 1024 and not training) or exporting:
        return False
    flops = (14 if training else 4) * batch_size * num_heads * length**2 * head_dim
    return flops >= 2e11 or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _prefers_blocks(query: torch.Tensor) -> bool:
    """Return whether "blocks" are expected to be the fastest: in bfloat16 on a processor that multiplies it in AVX-512.

    scaled_dot_product_attention does not use these instructions there, but does use AMX where a processor has that.
    """
    if not query.is_cpu or query.dtype != torch.bfloat16 or query.shape[1] < 256:
        return False
    try:  # torch's own, but not documented
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    except AttributeError:
        return False


def _attend_in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Compute attention as matrix products, for the queries of a block and of a head at a time."""
    batch_size, length, num_heads, head_dim = query.shape
    # (B, L, H, D) -> (B * H, L, D)
    queries, keys, values = (tokens.transpose(1, 2).reshape(-1, length, head_dim) for tokens in (query, key, value))
    queries, output = queries * scaling, torch.empty_like(queries)
    for own, key, value, result in zip(queries, keys.transpose(1, 2), values, output):
        for start in range(0, length, _BLOCK_QUERIES):
            part = slice(start, start + _BLOCK_QUERIES)
            torch.mm(torch.mm(own[part], key).softmax(dim=-1), value, out=result[part])
    return output.view(batch_size, num_heads, length, head_dim).transpose(1, 2)


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def why_not(
    backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float = 0.0
) -> str | None:
    """Return why `backend` cannot run attention on these tensors (B, L, H, D), as a sentence, or None if it can."""
    if backend not in BACKENDS:
        return f"there is no such backend. Use one of {', '.join(BACKENDS)}."
    if backend in ("auto", "sdpa"):
        return None
    if backend == "blocks":
        if not query.is_cpu:
            return f"it needs tensors on the CPU, and these are on {query.device.type}."
        if dropout > 0:
            return f"it has no dropout, and dropout={dropout} was asked for."
        if _needs_gradient(query, key, value):
            return "it computes no gradients."
        return "it cannot be compiled or exported." if torch.compiler.is_compiling() else None
    if not query.is_cuda:
        return f"it needs CUDA tensors, and these are on {query.device.type}."
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, and these are {str(query.dtype).removeprefix('torch.')}."
    if backend == "flash_attention_4":
        if query.shape[-1] % 8 or query.shape[-1] > 128:
            return f"it needs a head dimension that is a multiple of 8 up to 128, and this is {query.shape[-1]}."
        if dropout > 0:
            return f"it has no dropout, and dropout={dropout} was asked for."
        if torch.compiler.is_compiling() and _needs_gradient(query, key, value):
            return "torch.compile cannot trace its backward pass."
        return _why_not_flash_attention_4(query.device.index)
    can_use = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "flash": torch.backends.cuda.can_use_flash_attention,
    }
    query, key, value = (tokens.transpose(1, 2) for tokens in (query, key, value))
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, dropout, False, False)
    if not can_use[backend](parameters, debug=True):
        return "scaled_dot_product_attention refuses it for these tensors; the warnings above say why."
    return None


@torch.compiler.assume_constant_result  # torch.compile calls the function instead of tracing it
def _why_not_flash_attention_4(device_index: int) -> str | None:
    if torch.cuda.get_device_capability(device_index)[0] < 9:
        return "it needs a GPU of compute capability 9.0 (Hopper) or newer."
    return _load_flash_attention_4()[1]


@functools.cache
def _load_flash_attention_4():
    """Load FlashAttention-4's differentiable function; return (function, None) or (None, reason).

    If it loads, `dense_attention`'s forward is also registered as a torch operator, which torch.compile does not trace.
    """
    try:
        from flash_attn.cute import flash_attn_func
    except Exception as error:  # a broken installation must not break the default either
        reason = f"flash_attn.cute cannot be imported ({error!r}). Install it with: pip install 'samlight-hf[flash]'."
        return None, reason

    @torch.library.custom_op("samlight_hf::dense_attention", mutates_args=())
    def operator(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        return dense_attention(query, key, value, scaling).contiguous()

    @operator.register_fake
    def _(query, key, value, scaling):
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    return flash_attn_func, None


def dilated_attention_forward(attention, module, query, key, value, **kwargs):
    """Run a dense attention function on the groups of a module's pattern.

    Args:
        attention: any function of transformers' AttentionInterface.
        module: the attention layer, with `segment_length`, `dilation_rate` and `dilation_offsets`.
        query, key, value: (B, H, N, D) each.

    Returns:
        The output (B, N, H, D), and the attention weights or None. The weights stay per group, as SAM's stay per
        window: (B*N/w, r*H, w/r, w/r), the second axis residue class by residue class, heads within; with `"per_head"`
        (B*N/w, H, w/r, w/r). With r=1 and w=N that is the usual (B, H, N, N).
    """
    _, num_heads, num_tokens, _ = query.shape
    pattern = (module.segment_length, module.dilation_rate, module.dilation_offsets)
    groups = (split_groups(tokens.transpose(1, 2), *pattern).transpose(1, 2) for tokens in (query, key, value))
    output, weights = attention(module, *groups, attention_mask=None, **kwargs)
    return merge_groups(output, num_tokens, num_heads, *pattern), weights


def _fastest_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    heads_last = (tokens.transpose(1, 2) for tokens in (query, key, value))
    return dense_attention(*heads_last, scaling=scaling, dropout=dropout), None


def dilated_flash_attention_forward(module, query, key, value, attention_mask=None, **kwargs):
    """Implement `attn_implementation="dilated_flash_attention"`, (B, H, N, D) x 3 -> (B, N, H, D), None.

    The pattern of `module` runs on the fastest kernel that can run here. A module without a pattern, such as one of the
    mask decoder, runs transformers' "sdpa".
    """
    if not hasattr(module, "segment_length"):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None:
        raise ValueError("Dilated attention takes no attention_mask: every token attends to its own group.")
    return dilated_attention_forward(_fastest_attention, module, query, key, value, **kwargs)


AttentionInterface.register(DILATED_FLASH_ATTENTION, dilated_flash_attention_forward)
