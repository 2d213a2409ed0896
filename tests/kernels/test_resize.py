"""Tests that the reference and the Triton kernel resize images exactly as torch does on a CPU.

The kernel runs in Triton's interpreter, and on a GPU if there is one.
"""

from functools import partial

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from samlight_hf.kernels import resize as resize_kernel
from samlight_hf.kernels.resize import (
    launch_resize,
    resize_into,
    resize_into_reference,
    resize_uint8,
    triton,
    why_not_triton,
)

from .interpreter import run_in_tritons_interpreter


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(683, 1024), (1, 1), (7, 300), (300, 7), (1200, 801), (64, 64)]
# Sizes of image, resized image and pixel values: smaller and larger, one or both axes unchanged, and one pixel thick.
CASES = [
    ((61, 37), (40, 24), (40, 40)),
    ((37, 61), (24, 40), (40, 40)),
    ((9, 300), (1, 40), (40, 40)),
    ((120, 4), (40, 1), (40, 40)),
    ((7, 5), (40, 29), (40, 40)),
    ((1, 2), (20, 40), (40, 40)),
    ((40, 24), (40, 24), (40, 40)),
    ((40, 40), (40, 40), (40, 40)),
    ((23, 40), (11, 40), (16, 48)),
    ((1, 1), (1, 1), (3, 3)),
    ((5, 700), (8, 1400), (9, 1500)),  # several blocks wide
    ((200, 333), (24, 40), (24, 40)),  # many neighbours
]
LAYOUTS = {
    "planes": lambda image: image,
    "an image file's": lambda image: image.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "grey": lambda image: image[:1].expand(3, -1, -1),
    "a crop": lambda image: torch.nn.functional.pad(image, (3, 2, 1, 4), value=99)[:, 1:-4, 3:-2],
    "transposed": lambda image: image.mT.contiguous().mT,
}
# Strides of an image (3, 5, 6) that exceed 32-bit offsets; the last one exceeds 32 bits itself.
FAR_APART = [(2**30 + 9, 50, 3), (20, 2**29 + 9, 3), (20, 70, 2**29 + 9), (2**31 + 9, 50, 3)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_image(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def check_kernel(size, resized, padded, layout="planes", dtype=torch.float32, device="cpu"):
    """Check that the kernel writes every pixel value, equal to torch's on a CPU."""
    image = random_image(*size)
    levels = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.empty(3, *padded, dtype=dtype)
    resize_into_reference(expected, LAYOUTS[layout](image), resized, levels)
    found = torch.full((3, *padded), torch.nan, dtype=dtype, device=device)
    launch_resize(found, LAYOUTS[layout](image.to(device)), resized, levels.to(device))
    assert torch.equal(found.cpu(), expected), (size, resized, padded, layout, dtype)


def check_far_apart(strides, device="cpu"):
    image, levels = random_image(5, 6).to(device), torch.rand(3, 256, device=device)
    spread = torch.empty_strided(image.shape, strides, dtype=torch.uint8, device=device).copy_(image)
    found, expected = torch.empty(2, 3, 4, 5, device=device)
    launch_resize(found, spread, (4, 5), levels)
    resize_into_reference(expected, image, (4, 5), levels)
    assert torch.equal(found, expected), strides


def every_check():
    """Yield checks for the interpreter, which is slow: layouts and dtypes are checked on one case only."""
    yield from (partial(check_kernel, *case) for case in CASES)
    yield from (partial(check_kernel, *CASES[1], layout) for layout in LAYOUTS)
    yield from (partial(check_kernel, *CASES[1], dtype=dtype) for dtype in DTYPES[1:])
    yield from (partial(check_far_apart, strides) for strides in FAR_APART)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(64, 43), (511, 700)])
def test_resizing_is_torchs_own_on_a_cpu(size, target, device):
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("without AVX2 torchvision resizes in floating point")
    image = random_image(*size)
    resized = resize_uint8(image.to(device), target).cpu()
    assert torch.equal(resized, tv.resize(image, list(target), antialias=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_levels_become_what_the_table_says_and_the_rest_zeros(layout):
    image, levels = LAYOUTS[layout](random_image(4, 6)), torch.arange(3 * 256.0).view(3, 256) + 1
    pixel_values = torch.full((3, 8, 8), torch.nan)
    resize_into(pixel_values, image, (4, 6), levels)
    assert torch.equal(pixel_values[:, :4, :6], image + 256 * torch.arange(3).view(3, 1, 1) + 1.0)
    assert pixel_values[:, 4:].eq(0).all() and pixel_values[:, :, 6:].eq(0).all()


@pytest.mark.parametrize("size", [(9, 4), (4, 9)])
def test_what_does_not_fit_is_not_written(size):
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]} pixels does not fit into 8x8.*longest_edge"):
        resize_into(torch.empty(3, 8, 8), random_image(4, 6), size, torch.zeros(3, 256))


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernel_in_tritons_interpreter():
    assert run_in_tritons_interpreter(__name__) == f"{len(list(every_check()))} checks\n"


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_kernel_is_compiled_for_none_of_its_integers():
    """`launch_again` requires it."""
    parameters = [parameter for parameter in resize_kernel._resize_kernel.params if not parameter.is_constexpr]
    tensors = [parameter.name for parameter in parameters if not parameter.do_not_specialize]
    assert tensors == ["image", "table_y", "table_x", "levels", "pixel_values"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_on_a_gpu(layout, dtype):
    assert why_not_triton(torch.empty(1, 1, 1, device="cuda")) is None
    for case in [*CASES, ((683, 1021), (685, 1024), (1024, 1024)), ((3024, 4032), (768, 1024), (1024, 1024))]:
        check_kernel(*case, layout, dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("strides", FAR_APART, ids=str)
def test_pixels_far_apart_on_a_gpu(strides):
    check_far_apart(strides, "cuda")


@pytest.mark.gpu
def test_what_the_kernel_cannot_take_goes_to_the_reference():
    pixel_values, levels = torch.empty(3, 8, 16, device="cuda")[..., ::2], torch.rand(3, 256)
    assert "not contiguous" in why_not_triton(pixel_values)
    resize_into(pixel_values, random_image(12, 9).cuda(), (8, 6), levels.cuda())
    expected = torch.empty(3, 8, 8)
    resize_into_reference(expected, random_image(12, 9), (8, 6), levels)
    assert torch.equal(pixel_values.cpu(), expected)


if __name__ == "__main__":
    assert resize_kernel._why_not_tried(torch.device("cpu"), 3, torch.float16) is None
    print(f"{sum(check() is None for check in every_check())} checks")
