"""Tests of the attention kernel for Hopper GPUs: it compiles without spilling registers and equals the reference."""

import re
from pathlib import Path

import pytest
import torch
from samlight_hf.modeling.dilated_attention import dilated_attention_reference

from samlight_hf.kernels import records
from samlight_hf.kernels import support as triton_support
from samlight_hf.kernels.hopper import attention as hopper_attention
from samlight_hf.kernels.hopper import runtime as hopper
from samlight_hf.kernels.hopper.attention import (
    QUERY_FACTOR,
    STAGES,
    attention_of_tokens,
    launch_attention,
    source_of,
    warpgroups_of,
    why_not,
)

from .test_linear import needs_compiler, needs_hopper, spilled_bytes


TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


@needs_compiler
@pytest.mark.parametrize(("warpgroups", "stages"), STAGES.items())
@pytest.mark.parametrize("bfloat16", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("per_head", [0, 1])
def test_the_kernel_compiles_without_spilling(per_head, warpgroups, stages, bfloat16):
    shape = {"HEADS": 6, "GROUP": 2048, "DILATION": 2, "PER_HEAD": per_head}
    constants = {**shape, "WARPGROUPS": warpgroups, "STAGES": stages}
    code, log = hopper.compile_source(source_of(BFLOAT16=bfloat16, **constants))
    assert code[:4] == b"\x7fELF" and spilled_bytes(log) == 0, log
    assert re.findall(r"(\d+) bytes stack frame", log) == ["0"], log  # no array outside registers


def test_what_is_rounded_to_zero_is_little_even_together():
    """The largest weight may be 2^-MARGIN. The others may all be just too small for the dtype."""
    source = Path(hopper_attention.__file__).with_suffix(".cu").read_text()
    margins = re.findall(r"MARGIN = BFLOAT16 \? (\d+) : (\d+);", source)[0]
    for (dtype, tolerance), margin in zip(TOLERANCES.items(), margins, strict=True):
        numbers = torch.finfo(dtype)
        lost = numbers.tiny * numbers.eps / 2  # half of the smallest number
        assert 4096 * lost < tolerance * 2 ** -int(margin)


@pytest.mark.parametrize("warpgroups", STAGES)
def test_as_many_thread_blocks_fit_as_are_counted_on(warpgroups):
    """The kernel is compiled for their registers. A multiprocessor has 228 KiB, of which one is lost for each."""
    size = hopper_attention._shared_bytes({"WARPGROUPS": warpgroups, "STAGES": STAGES[warpgroups]})
    assert (4 - warpgroups) * (size + 1024) <= 228 * 1024


@needs_compiler
def test_the_kernel_and_its_launch_agree_on_shared_memory(monkeypatch):
    constants = {"BFLOAT16": 1, "HEADS": 6, "GROUP": 512, "DILATION": 1, "PER_HEAD": 0, "WARPGROUPS": 1, "STAGES": 2}
    size = hopper_attention._shared_bytes(constants)
    monkeypatch.setattr(hopper_attention, "_shared_bytes", lambda constants: size - 8)
    with pytest.raises(RuntimeError, match="static assertion failed"):
        hopper.compile_source(source_of(**constants))


@pytest.mark.parametrize("pattern", [(256, 1, "all"), (256, 2, "all"), (256, 4, "per_head")], ids=str)
def test_attention_of_tokens_equals_the_reference(pattern):
    qkv, tokens = torch.randn(1, 256, 8, 3, 64), torch.tensor([0, 1, 6, 127, 128, 255])
    expected, _ = dilated_attention_reference(*qkv.unbind(3), *pattern)
    qkv[:, :, :, 0] *= QUERY_FACTOR
    found = attention_of_tokens(qkv[0], tokens, pattern[1], pattern[2] == "per_head")
    assert torch.allclose(found, expected[0, tokens], atol=1e-5)


def test_thread_blocks_keep_all_multiprocessors_busy():
    """With 132 multiprocessors: one image in two groups per head or one, its bands of 512 tokens, and eight images."""
    assert warpgroups_of(6 * 2, 2048, 132) == 3
    assert warpgroups_of(6, 2048, 132) == warpgroups_of(6 * 8, 512, 132) == 1
    assert warpgroups_of(8 * 6 * 8, 512, 132) == warpgroups_of(8 * 6 * 2, 2048, 132) == 2


def test_every_reason_not_to_run_it(monkeypatch):
    qkv = torch.zeros(1, 512, 2, 3, 64)
    assert "cpu" in why_not(qkv, None, 1, "all")
    monkeypatch.setattr(hopper, "why_not_hopper", lambda device, dtype: None)
    monkeypatch.setattr(hopper, "num_processors", lambda device: 132)
    monkeypatch.setattr(hopper_attention, "why_not_tried", lambda *arguments: None)
    assert why_not(qkv, None, 2, "all") is None and why_not(qkv, None, 2, "per_head") is None
    assert "32 features" in why_not(qkv[..., :32], None, 1, "all")
    assert "dilation_rate=4 to divide num_attention_heads=2" in why_not(qkv, None, 4, "per_head")
    assert "groups of 64 tokens" in why_not(qkv, 128, 2, "all")
    assert "segment_length=384 must divide the 512 tokens" in why_not(qkv, 384, 1, "all")
    assert "dilation_rate=3 must divide segment_length=512" in why_not(qkv, 512, 3, "all")
    assert "segment_length=0 must be" in why_not(qkv[:, :0], None, 1, "all")
    assert "no images" in why_not(qkv[:0], None, 1, "all")
    assert "odd address" in why_not(torch.zeros(512 * 384 + 1)[1:].view(1, 512, 2, 3, 64), None, 1, "all")
    assert "not contiguous" in why_not(qkv.transpose(0, 1).expand(-1, 512, -1, -1, -1), None, 1, "all")


PATTERNS = [
    *((*pattern, "all") for pattern in ((None, 1), (None, 2), (256, 1), (512, 4), (1024, 2))),
    *((*pattern, "per_head") for pattern in ((None, 2), (256, 1), (512, 4))),
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("warpgroups", [1, 2, 3, None])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_on_a_gpu_it_is_the_reference(pattern, warpgroups, dtype, monkeypatch):
    """Scores grow from key to key, so that a relative softmax is rescaled; and 3 warpgroups do not divide groups."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(2, 2048, 3 if pattern[2] == "all" else 4, 3, 64, device="cuda", generator=generator)
    qkv[:, :, :, 1] *= torch.linspace(0.1, 4, 2048, device="cuda")[:, None, None]
    qkv = with_factor(qkv, dtype)
    assert why_not(qkv, *pattern) is None
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: tensor.new_full(size, float("nan")))
    with torch.no_grad():
        expected = reference(qkv, pattern)
        found = launch_attention(qkv, *pattern, warpgroups).view_as(expected)
    assert found.isfinite().all() and (found[expected == 0] == 0).all()  # "per_head": tokens of other heads
    assert (found - expected).norm() < TOLERANCES[dtype] * expected.norm()


def with_scores(scores, dtype):
    """Make q, k and v of 2048 tokens with scores of a kind."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(1, 2048, 4, 3, 64, device="cuda", generator=generator)
    query, key, value = qkv.unbind(3)
    if scores == "low":
        query.abs_(), key.abs_().mul_(-40)
    elif scores == "jump":
        key[:, 1024:] *= 100
    elif scores == "one query":
        # The last query is in a thread block with queries for fewer warpgroups than it has, if these are three.
        query[:, [1100, 2047]] *= 100
    elif scores == "sink":  # the first key, without value: 12 more than for the others, together a hundredth of it
        query.mul_(0.5), value.add_(1)
        query[..., 0], key[..., 0] = 8, 0
        key[:, 0], value[:, 0] = 0, 0
        key[:, 0, :, 0] = 12
    return with_factor(qkv, dtype)


# Groups of 16, 1, 2, 4 and 1 blocks of keys.
EXTREME_PATTERNS = [(None, 1, "all"), (128, 1, "all"), (256, 1, "all"), (1024, 2, "all"), (512, 4, "per_head")]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("pattern", EXTREME_PATTERNS, ids=str)
@pytest.mark.parametrize("scores", ["low", "jump", "one query", "sink"])
def test_on_a_gpu_scores_may_all_be_low_or_jump_or_one_be_large(scores, pattern, warpgroups, dtype):
    """Relative to 0, or to scores of earlier keys, weights would be 0 or infinite; or too small for float16."""
    qkv = with_scores(scores, dtype)
    with torch.no_grad():
        expected = reference(qkv, pattern)
        found = launch_attention(qkv, *pattern, warpgroups).view_as(expected)
    assert found.isfinite().all()
    assert (found - expected).norm() < TOLERANCES[dtype] * expected.norm()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("pattern", EXTREME_PATTERNS, ids=str)
@torch.no_grad()
def test_a_second_pass_runs_for_extreme_scores_alone(pattern, warpgroups, monkeypatch):
    kinds = {kind: with_scores(kind, torch.bfloat16) for kind in ("usual", "sink", "low", "jump", "one query")}
    both = {kind: launch_attention(qkv, *pattern, warpgroups) for kind, qkv in kinds.items()}

    def first_pass(**constants):
        source = source_of(**constants)
        assert source.count("if (relative) break;") == 1
        return source.replace("if (relative) break;", "break;")

    monkeypatch.setattr(hopper_attention, "source_of", first_pass)
    hopper_attention._kernel.cache_clear()
    try:
        first = {kind: launch_attention(qkv, *pattern, warpgroups) for kind, qkv in kinds.items()}
    finally:
        hopper_attention._kernel.cache_clear()
    assert [kind for kind in kinds if torch.equal(first[kind], both[kind])] == ["usual", "sink"]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("score", [-95, -90, -75, 60, 75, 85])
@torch.no_grad()
def test_sums_of_weights_near_the_limits_of_the_first_pass(score, warpgroups):
    """2048 weights of about 2^score; the limits are 2^-80 and 2^80."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(1, 2048, 2, 3, 64, device="cuda", generator=generator)
    qkv[:, :, :, :2] /= 4
    qkv[:, :, :, 0, 0], qkv[:, :, :, 1, 0] = 8, score / 8
    qkv = qkv.to(torch.bfloat16)
    expected = reference(qkv, (None, 1, "all"))
    found = launch_attention(qkv, None, 1, "all", warpgroups).view_as(expected)
    assert (found - expected).norm() < TOLERANCES[torch.bfloat16] * expected.norm()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_stays_in_its_group(number, part, warpgroups, dtype):
    qkv = with_scores("usual", dtype)
    expected = launch_attention(qkv, 512, 1, "all", warpgroups)
    qkv[:, 700, :, part] = number
    found = launch_attention(qkv, 512, 1, "all", warpgroups)
    others = torch.arange(2048, device="cuda") // 512 != 1
    assert torch.equal(found[others], expected[others]) and not found[700].isfinite().any()


def with_factor(qkv, dtype):
    """Multiply the queries by the kernel's factor, and round."""
    qkv[:, :, :, 0] *= QUERY_FACTOR
    return qkv.to(dtype)


def reference(qkv, pattern):
    """Compute the kernel's result in float64."""
    queries, keys, values = qkv.double().unbind(3)
    queries = queries / QUERY_FACTOR
    return dilated_attention_reference(queries, keys, values, pattern[0] or qkv.shape[1], *pattern[1:])[0]


@pytest.mark.gpu
@needs_hopper
@torch.no_grad()
def test_the_result_may_lie_behind_queries_keys_and_values():
    memory = (torch.randn(2 * 2048 * 3 * 4 * 64, device="cuda") / 2).bfloat16()
    qkv, room = memory[: len(memory) // 4 * 3].view(2, 2048, 3, 3, 64), memory[len(memory) // 4 * 3 :]
    for pattern in ((512, 1, "all"), (None, 2, "all")):
        expected = launch_attention(qkv, *pattern)
        actual = launch_attention(qkv, *pattern, out=room)
        assert actual.data_ptr() == room.data_ptr() and torch.equal(actual, expected)


@pytest.mark.gpu
@needs_hopper
@torch.no_grad()
def test_each_variant_is_tried_by_itself(monkeypatch):
    """The variant with three warpgroups cannot be compiled; those with one and two run."""
    monkeypatch.setattr(triton_support, "_reasons", {})
    monkeypatch.setattr(records, "machine_of", lambda device: None)  # nor are there records of other processes
    monkeypatch.setattr(triton_support, "_warned", set())
    compiled = hopper.compiled

    def breaks(source: str) -> bytes:
        if "#define WARPGROUPS 3" in source:
            raise RuntimeError("too many registers")
        return compiled(source)

    monkeypatch.setattr(hopper, "compiled", breaks)
    hopper_attention._kernel.cache_clear()
    one, three = torch.randn(1, 4096, 6, 3, 64, device="cuda", dtype=torch.bfloat16), (None, 2, "all")
    with pytest.warns(UserWarning, match="CUDA kernel for attention does not run here: too many registers"):
        assert "too many registers" in why_not(one, *three)
    assert why_not(one, 512, 1, "all") is None and why_not(one.repeat(8, 1, 1, 1, 1), *three) is None
    assert why_not(one.half(), 512, 1, "all") is None  # and another dtype by itself
    tried = {dict(constants)["WARPGROUPS"] for _, _, _, constants in triton_support._reasons}
    assert tried == {1, 2, 3}


@pytest.mark.gpu
@needs_hopper
@torch.no_grad()
def test_the_kernel_is_tried_again_after_memory_ran_out(monkeypatch):
    monkeypatch.setattr(triton_support, "_reasons", {})
    monkeypatch.setattr(records, "machine_of", lambda device: None)  # nor are there records of other processes
    qkv = torch.randn(1, 512, 2, 3, 64, device="cuda", dtype=torch.bfloat16)

    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(hopper_attention, "launch_attention", fails)
        with pytest.raises(torch.OutOfMemoryError, match="to try the CUDA kernel for attention"):
            why_not(qkv, None, 1, "all")
    assert why_not(qkv, None, 1, "all") is None
