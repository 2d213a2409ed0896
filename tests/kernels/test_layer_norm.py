"""Tests that the Triton kernel computes torch's layer norm, in Triton's interpreter and on a GPU."""

import itertools

import pytest
import torch
from torch import nn

from samlight_hf.kernels import layer_norm
from samlight_hf.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    launch_layer_norm,
    triton,
    why_not_triton,
)

from .interpreter import run_in_tritons_interpreter


CASES = list(itertools.product((8, 64, 256), (torch.float32, torch.bfloat16, torch.float16), (0, 1, 3), (False, True)))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def relative_error(width, dtype, num_residuals, gelu, device="cpu"):
    """Return the error of the kernel in `dtype` against the reference in float64, for the same rounded numbers."""
    torch.manual_seed(width)
    norm = nn.LayerNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm = norm.to(device, dtype)
    values = torch.randn(3, 37, width, device=device).to(dtype) + 2
    residual = torch.randn(num_residuals, 37, width, device=device).to(dtype) if num_residuals else None
    with torch.no_grad():
        output = launch_layer_norm(values.clone(), norm, residual, gelu)
        assert (output.dtype, output.shape) == (dtype, values.shape)
        expected = add_layer_norm_reference(
            values.double(), norm.double(), None if residual is None else residual.double(), gelu
        )
    return ((output.double() - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernel_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(CASES)} cases\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_a_gpu(case):
    assert why_not_triton(torch.ones(1, 1, 64, device="cuda"), nn.LayerNorm(64, device="cuda")) is None
    assert relative_error(*case, device="cuda") < TOLERANCES[case[1]]


def test_elsewhere_it_is_the_reference():
    norm, values = nn.LayerNorm(64), torch.randn(2, 3, 64)
    assert triton is None or "cpu" in why_not_triton(values, norm)
    with torch.no_grad():
        expected = nn.functional.gelu(norm(values + values[:1]))
        assert torch.allclose(add_layer_norm(values, norm, values[:1], gelu=True), expected, atol=1e-6)


@pytest.mark.gpu
def test_what_the_kernel_cannot_take_goes_to_the_reference():
    values, norm = torch.randn(2, 3, 48, device="cuda"), nn.LayerNorm(48, device="cuda")
    assert "no power of two" in why_not_triton(values, norm)
    assert "not contiguous" in why_not_triton(torch.randn(2, 64, 3, device="cuda").mT, nn.LayerNorm(64, device="cuda"))
    assert "without a gain" in why_not_triton(
        values[..., :32].contiguous(), nn.LayerNorm(32, bias=False, device="cuda")
    )
    with torch.no_grad():
        assert torch.allclose(add_layer_norm(values, norm), norm(values), atol=1e-6)


if __name__ == "__main__":
    for case in CASES:
        assert relative_error(*case) < TOLERANCES[case[1]], case
    for types in ((torch.float16, torch.float16, torch.float16), (torch.float32, torch.float32, None)):
        assert layer_norm._why_not_tried(torch.device("cpu"), 64, True, *types) is None
    print(f"{len(CASES)} cases")
