"""Tests that the kernels find the deepest pixel of each mask.

The kernels run in Triton's interpreter, and on a GPU if there is one.
"""

import pytest
import torch

from samlight_hf.data.clicks import deepest_point
from samlight_hf.kernels import deepest_pixels
from samlight_hf.kernels.deepest_pixels import (
    deepest_pixels_reference,
    launch_deepest_pixels,
    triton,
    why_not_triton,
)

from .interpreter import run_in_tritons_interpreter


SIZES = [(1, 1), (1, 9), (9, 1), (13, 31), (5, 300)]  # the last has several thread blocks in a row


def random_masks(height: int, width: int) -> torch.Tensor:
    """Make masks (5, H, W): full, empty, one pixel outside, few pixels outside, and half of them."""
    masks = torch.ones(5, height, width, dtype=torch.bool)
    masks[1] = masks[2, height // 3, width // 4] = False
    noise = torch.rand(2, height, width, generator=torch.Generator().manual_seed(height))
    masks[3:] = noise > torch.tensor([0.03, 0.5])[:, None, None]
    return masks


def check_kernels(size: tuple[int, int], device: str = "cpu"):
    masks = random_masks(*size)
    assert torch.equal(launch_deepest_pixels(masks.to(device)).cpu(), deepest_pixels_reference(masks)), size


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_finds_what_the_search_finds(size):
    masks = random_masks(*size)
    for mask, (x, y, squared) in zip(masks, deepest_pixels_reference(masks).tolist(), strict=True):
        assert ((x, y), pytest.approx(squared**0.5)) == deepest_point(mask.numpy())


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(SIZES)} checks\n"


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("kernel", ["_row_distances_kernel", "_depths_kernel"])
def test_the_kernels_are_compiled_for_none_of_their_integers(kernel):
    """`launch_again` requires it."""
    parameters = [each for each in getattr(deepest_pixels, kernel).params if not each.is_constexpr]
    assert [each.name for each in parameters if each.do_not_specialize] == ["height", "width"]
    assert len(parameters) == 4


def test_masks_that_the_kernels_cannot_take():
    assert "cpu" in (why_not_triton(torch.ones(1, 4, 4, dtype=torch.bool)) or "")


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    assert why_not_triton(torch.ones(1, 4, 4, dtype=torch.bool, device="cuda")) is None
    assert "wider" in why_not_triton(torch.ones(1, 1, 2**15 + 1, dtype=torch.bool, device="cuda"))
    for size in SIZES:
        check_kernels(size, "cuda")
    assert launch_deepest_pixels(torch.ones(0, 4, 4, dtype=torch.bool, device="cuda")).shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(700, 1100), (1024, 1024), (40, 2**15)])
def test_large_masks_on_a_gpu(size):
    """Blobs, a mask that fills the image, one without a column, and stripes with many equally deep pixels."""
    noise = torch.randn(2, 1, 10, 12, generator=torch.Generator().manual_seed(0))
    blobs = torch.nn.functional.interpolate(noise, size, mode="bicubic")[:, 0] > 0
    others = torch.ones(3, *size, dtype=torch.bool)
    others[1, :, size[1] // 3] = False
    others[2, ::9] = False
    masks = torch.cat([blobs, others])
    for mask, (x, y, squared) in zip(masks, launch_deepest_pixels(masks.cuda()).tolist(), strict=True):
        assert ((x, y), pytest.approx(squared**0.5)) == deepest_point(mask.numpy())


if __name__ == "__main__":
    assert deepest_pixels._why_not_tried(torch.device("cpu"), 32) is None
    print(f"{sum(check_kernels(size) is None for size in SIZES)} checks")
