"""Tests that the Triton kernel of the decoder's end computes the same logits as the step-by-step reference."""

import warnings

import pytest
import torch
from torch import nn

from samlight_hf.kernels import mask_head
from samlight_hf.kernels.layer_norm import add_layer_norm_reference
from samlight_hf.kernels.mask_head import HeadWeights, _in_float32, launch_head, masks_of, run_head, why_not_triton
from samlight_hf.kernels.support import triton

from .interpreter import run_in_tritons_interpreter


CASES = [(128, torch.float16), (256, torch.float16), (128, torch.bfloat16), (256, torch.bfloat16)]
INTERPRETED = CASES[:2]  # the interpreter multiplies bfloat16 by its bits
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def weights_of(channels, dtype, device):
    generator = torch.Generator().manual_seed(channels)

    def numbers(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    norm = nn.LayerNorm(channels // 4, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return HeadWeights(
        numbers(channels, channels, scale=0.1), numbers(channels), norm.to(device, dtype),
        numbers(channels // 2, channels // 4, scale=0.2), numbers(channels // 2),
    )  # fmt: skip


def relative_error(channels, dtype, device="cpu", grid=(5, 14)) -> float:
    """Return the error of the kernel against the reference in float32; some masks are left out, and order is kept."""
    weights = weights_of(channels, dtype, device)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, grid[0] * grid[1], channels, generator=generator).to(device, dtype)
    hyper = torch.randn(3, 3, channels // 8, generator=generator).to(device)
    kept = torch.tensor([1, 2, 6, 8], device=device)  # none of the second prompt
    slots = torch.full((9,), -1, dtype=torch.int32, device=device)
    slots[kept] = torch.arange(len(kept), dtype=torch.int32, device=device)
    with torch.no_grad():
        found = launch_head(image, hyper, slots.view(3, 3), len(kept), grid, weights)
        expected = run_head(image.float(), hyper, grid, _in_float32(weights), add_layer_norm_reference)
    expected = expected.flatten(0, 1)[kept]
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernel_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(INTERPRETED)} cases\n"


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(7, 10), (64, 64)], ids=str)
@pytest.mark.parametrize("channels, dtype", CASES, ids=str)
def test_the_kernel_on_a_gpu(channels, dtype, grid):
    assert why_not_triton(weights_of(channels, dtype, "cuda")) is None
    assert relative_error(channels, dtype, "cuda", grid) < TOLERANCES[dtype]


def test_the_steps_are_transposed_convolutions():
    """The reference equals torch's own layers, in their layout."""
    channels, (height, width) = 32, (3, 5)
    first = nn.ConvTranspose2d(channels, channels // 4, 2, 2)
    second = nn.ConvTranspose2d(channels // 4, channels // 8, 2, 2)
    norm = nn.LayerNorm(channels // 4)
    nn.init.normal_(norm.weight)
    linear = [(layer.weight.permute(2, 3, 1, 0).flatten(0, 2), layer.bias.repeat(4)) for layer in (first, second)]
    image, hyper = torch.randn(2, height * width, channels), torch.randn(2, 3, channels // 8)
    with torch.no_grad():
        hidden = first(image.transpose(1, 2).unflatten(2, (height, width)))
        hidden = nn.functional.gelu(norm(hidden.movedim(1, 3))).movedim(3, 1)
        expected = torch.einsum("pmc,pchw->pmhw", hyper, nn.functional.gelu(second(hidden)))
        found = run_head(image, hyper, (height, width), HeadWeights(*linear[0], norm, *linear[1]))
    assert torch.allclose(found, expected, atol=1e-5)


def test_where_the_kernel_cannot_be_compiled_the_steps_make_the_same_masks():
    weights, image, hyper = weights_of(128, torch.float32, "cpu"), torch.randn(3, 6, 128), torch.randn(3, 2, 16)
    slots = torch.tensor([[-1, 2], [0, -1], [-1, 1]], dtype=torch.int32)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = masks_of(image, hyper, slots, 3, (2, 3), weights)
        expected = run_head(image, hyper, (2, 3), weights, add_layer_norm_reference).flatten(0, 1)[[2, 5, 1]]
        assert masks_of(image, hyper, torch.full_like(slots, -1), 0, (2, 3), weights).shape == (0, 8, 12)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-6)
    assert [str(warning.message)[:61] for warning in caught] == [
        "the Triton kernel for the end of the mask decoder does not ru"
    ]


@pytest.mark.gpu
def test_more_prompts_than_the_second_axis_of_a_grid_has_programs():
    weights, grid = weights_of(128, torch.float16, "cuda"), (8, 8)
    generator = torch.Generator("cuda").manual_seed(0)
    image = torch.randn(70_000, 64, 128, device="cuda", dtype=torch.float16, generator=generator)
    hyper = torch.randn(70_000, 1, 16, device="cuda", generator=generator)
    some = torch.tensor([0, 65_534, 65_535, 65_536, 69_999], device="cuda")
    slots, few = (torch.full((70_000, 1), -1, dtype=torch.int32, device="cuda") for _ in range(2))
    slots[some, 0] = few[: len(some), 0] = torch.arange(len(some), dtype=torch.int32, device="cuda")
    with torch.no_grad():
        found = launch_head(image, hyper, slots, len(some), grid, weights)
        expected = launch_head(image[some], hyper[some], few[: len(some)], len(some), grid, weights)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_why_the_kernel_does_not_run():
    assert triton is None or "on cpu" in why_not_triton(weights_of(256, torch.bfloat16, "cpu"))


@pytest.mark.gpu
def test_why_the_kernel_does_not_run_on_a_gpu():
    assert "float32" in why_not_triton(weights_of(256, torch.float32, "cuda"))
    assert "64 channels" in why_not_triton(weights_of(64, torch.bfloat16, "cuda"))


if __name__ == "__main__":
    for case in INTERPRETED:
        error = relative_error(*case)
        assert error < TOLERANCES[case[1]], (case, error)
    mask_head._THREAD_BLOCKS = 1  # as with many prompts: each makes all parts of its image tokens
    assert relative_error(*INTERPRETED[0]) < TOLERANCES[INTERPRETED[0][1]]
    assert mask_head._why_not_tried(torch.device("cpu"), 128, torch.float16) is None
    print(f"{len(INTERPRETED)} cases")
