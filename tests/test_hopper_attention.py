"""The attention kernel for Hopper GPUs: it compiles anywhere without spilling registers, and computes what the reference does."""

import pytest
import torch
from samlight_hf.modeling.dilated_attention import dilated_attention_reference

from samlight_hf import hopper, hopper_attention
from samlight_hf.hopper_attention import STAGES, launch, source_of, warpgroups_of, why_not

from .test_hopper_linear import needs_compiler, needs_hopper, spilled_bytes


@needs_compiler
@pytest.mark.parametrize(("warpgroups", "stages"), STAGES.items())
@pytest.mark.parametrize("bfloat16", [0, 1])
def test_the_kernel_compiles_without_spilling(warpgroups, stages, bfloat16):
    constants = {"HEADS": 6, "GROUP": 2048, "DILATION": 2, "WARPGROUPS": warpgroups, "STAGES": stages}
    code, log = hopper.compile_source(source_of(BFLOAT16=bfloat16, **constants))
    assert code[:4] == b"\x7fELF" and spilled_bytes(log) == 0, log


def test_programs_are_as_large_as_leaves_all_multiprocessors_busy():
    """Of 132: a picture's whole image in two groups a head, its bands of 512 tokens, and those of eight pictures."""
    assert warpgroups_of(6 * 2, 2048, 132) == 3
    assert warpgroups_of(6 * 8, 512, 132) == 1
    assert warpgroups_of(8 * 6 * 8, 512, 132) == warpgroups_of(8 * 6 * 2, 2048, 132) == 2


def test_every_reason_not_to_run_it(monkeypatch):
    qkv = torch.zeros(1, 512, 2, 3, 64)
    assert "cpu" in why_not(qkv, None, 1, "all")
    monkeypatch.setattr(hopper, "why_not_hopper", lambda device, dtype: None)
    monkeypatch.setattr(hopper_attention, "_why_not_at_all", lambda device: None)
    assert why_not(qkv, None, 2, "all") is None
    assert "32 features" in why_not(qkv[..., :32], None, 1, "all")
    assert "per_head" in why_not(qkv, None, 2, "per_head")
    assert "groups of 64 tokens" in why_not(qkv, 128, 2, "all")
    assert "segments of 384" in why_not(qkv, 384, 1, "all")
    assert "3 groups" in why_not(qkv, 512, 3, "all")
    assert "0 tokens" in why_not(qkv[:, :0], None, 1, "all")
    assert "odd address" in why_not(torch.zeros(512 * 384 + 1)[1:].view(1, 512, 2, 3, 64), None, 1, "all")
    assert "not contiguous" in why_not(qkv.transpose(0, 1).expand(-1, 512, -1, -1, -1), None, 1, "all")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("warpgroups", [1, 2, 3, None])
@pytest.mark.parametrize("pattern", [(None, 1), (None, 2), (256, 1), (512, 4), (1024, 2)], ids=str)
def test_on_a_gpu_it_is_the_reference(pattern, warpgroups, dtype):
    """Scores that grow from key to key, so that what they are relative to changes; and groups that three do not divide."""
    assert why_not(torch.zeros(1, 512, 2, 3, 64, device="cuda", dtype=dtype), None, 1, "all") is None
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(2, 2048, 3, 3, 64, device="cuda", generator=generator)
    qkv[:, :, :, 1] *= torch.linspace(0.1, 4, 2048, device="cuda")[:, None, None]
    qkv = qkv.to(dtype)
    with torch.no_grad():
        expected, _ = dilated_attention_reference(*qkv.double().unbind(3), pattern[0] or 2048, pattern[1])
        found = launch(qkv, *pattern, 0.125, warpgroups).view_as(expected)
    assert found.isfinite().all()
    assert (found - expected).norm() < (4e-3 if dtype == torch.bfloat16 else 6e-4) * expected.norm()
