"""Tests of the decoder's end for Hopper GPUs: it compiles without spilling registers and equals the reference."""

import pytest
import torch

from samlight_hf.kernels import mask_head
from samlight_hf.kernels.hopper import head as hopper_head
from samlight_hf.kernels.hopper import runtime as hopper
from samlight_hf.kernels.hopper.head import MOST_MASKS, source_of, why_not
from samlight_hf.kernels.layer_norm import add_layer_norm_reference
from samlight_hf.kernels.mask_head import _in_float32, launch_hopper, masks_of, run_head, why_not_hopper
from tests.kernels.test_mask_head import TOLERANCES, weights_of

from .test_linear import needs_compiler, needs_hopper, spilled_bytes


@needs_compiler
@pytest.mark.parametrize("masks", range(1, MOST_MASKS + 1))
@pytest.mark.parametrize("bfloat16", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_kernel_compiles_without_spilling(bfloat16, masks):
    code, log = hopper.compile_source(source_of(BFLOAT16=bfloat16, MASKS=masks))
    assert code[:4] == b"\x7fELF" and spilled_bytes(log) == 0, log


@needs_compiler
def test_the_kernel_and_its_launch_agree_on_shared_memory(monkeypatch):
    monkeypatch.setattr(hopper_head, "_SHARED_BYTES", hopper_head._SHARED_BYTES - 8)
    with pytest.raises(RuntimeError, match="static assertion failed"):
        hopper.compile_source(source_of(BFLOAT16=0, MASKS=1))


def test_every_reason_not_to_run_it(monkeypatch):
    weights = weights_of(256, torch.float16, "cpu")
    tokens, hyper = torch.zeros(2, 64, 256, dtype=torch.float16), torch.zeros(2, 3, 32)
    assert "cpu" in why_not(tokens, hyper, (8, 8), weights)
    monkeypatch.setattr(hopper, "why_not_hopper", lambda device, dtype: None)
    assert why_not(tokens, hyper, (8, 8), weights) is None
    assert "128 channels" in why_not(tokens, hyper, (8, 8), weights_of(128, torch.float16, "cpu"))
    assert "4 masks" in why_not(tokens, torch.zeros(2, 4, 32), (8, 8), weights)
    assert "0 masks" in why_not(tokens, torch.zeros(2, 0, 32), (8, 8), weights)
    assert "image tokens torch.bfloat16" in why_not(tokens.bfloat16(), hyper, (8, 8), weights)
    assert "7 x 9 image tokens" in why_not(torch.zeros(2, 63, 256, dtype=torch.float16), hyper, (7, 9), weights)
    assert "0 prompts" in why_not(tokens[:0], hyper[:0], (8, 8), weights)
    assert "not contiguous" in why_not(tokens.transpose(0, 1), hyper, (8, 8), weights)
    assert "not float32" in why_not(tokens, hyper.half(), (8, 8), weights)
    weights.norm.float()
    assert "not all weights are torch.float16" in why_not(tokens, hyper, (8, 8), weights)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masks", range(1, MOST_MASKS + 1))
@pytest.mark.parametrize("num_prompts, grid", [(1, (8, 8)), (3, (16, 8)), (9, (64, 64)), (70, (32, 64))], ids=str)
@torch.no_grad()
def test_on_a_gpu_it_is_the_reference(num_prompts, grid, masks, dtype):
    """Every third mask is left out, and all of some prompts; the others are in reverse order."""
    weights, generator = weights_of(256, dtype, "cuda"), torch.Generator("cuda").manual_seed(0)
    tokens = torch.randn(num_prompts, grid[0] * grid[1], 256, device="cuda", generator=generator).to(dtype)
    hyper = torch.randn(num_prompts, masks, 32, device="cuda", generator=generator)
    assert why_not_hopper(tokens, hyper, grid, weights) is None
    wanted = torch.arange(num_prompts * masks, device="cuda") % 3 != 1
    wanted.view(num_prompts, masks)[2::4] = False
    kept = wanted.nonzero().squeeze(1).flip(0)
    slots = torch.full((num_prompts * masks,), -1, dtype=torch.int32, device="cuda")
    slots[kept] = torch.arange(len(kept), dtype=torch.int32, device="cuda")
    out = torch.full((len(kept), 4 * grid[0], 4 * grid[1]), torch.nan, device="cuda")
    found = launch_hopper(tokens, hyper, slots.view(num_prompts, masks), len(kept), grid, weights, out)
    expected = run_head(tokens.float(), hyper, grid, _in_float32(weights), add_layer_norm_reference)
    expected = expected.flatten(0, 1)[kept]
    assert found.data_ptr() == out.data_ptr()
    assert (found - expected).norm() < TOLERANCES[dtype] * expected.norm()


@pytest.mark.gpu
@needs_hopper
@torch.no_grad()
def test_on_a_gpu_masks_of_takes_it_where_it_runs(monkeypatch):
    launched, launch = [], hopper_head.launch_head
    monkeypatch.setattr(hopper_head, "launch_head", lambda *arguments: (launched.append(256), launch(*arguments)))
    for channels in (256, 128):  # the second runs in Triton
        weights = weights_of(channels, torch.float16, "cuda")
        inputs = torch.randn(2, 64, channels, device="cuda").half(), torch.randn(2, 3, channels // 8, device="cuda")
        assert (why_not_hopper(*inputs, (8, 8), weights) is None) == (channels == 256)
        launched.clear()  # what was tried
        slots = torch.arange(6, dtype=torch.int32, device="cuda").view(2, 3)
        found = masks_of(*inputs, slots, 6, (8, 8), weights)
        assert launched == ([256] if channels == 256 else [])
        triton = mask_head.launch_head(*inputs, slots, 6, (8, 8), weights)
        assert (found - triton).norm() < 2e-3 * triton.norm()
