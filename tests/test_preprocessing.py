"""On any device the pixel values and the masks' size are what transformers' image processor makes on a CPU, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers import SamImageProcessor

from samlight_hf.preprocessing import (
    check_size,
    picture_tensor,
    preprocess,
    resize_uint8,
    resized_size,
    upscale_logits,
    why_not_on_device,
)


SIZES = [(683, 1024), (1, 1), (7, 300), (300, 7), (1200, 801), (64, 64)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_picture(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(64, 43), (511, 700)])
def test_resizing_is_torchs_own_on_a_cpu(size, target, device):
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("without AVX2 torchvision resizes in floating point")
    picture = random_picture(*size)
    resized = resize_uint8(picture.to(device), target).cpu()
    assert torch.equal(resized, tv.resize(picture, list(target), antialias=True))


@pytest.mark.gpu
def test_pixel_values_of_a_gpu_are_those_of_the_cpu():
    processor = SamImageProcessor()
    pictures = [random_picture(*size) for size in SIZES if min(size) > 1]
    expected = processor([*pictures], return_tensors="pt")["pixel_values"]
    assert torch.equal(preprocess(processor, pictures, torch.device("cuda")).cpu(), expected)


@pytest.mark.parametrize(
    "settings, words",
    [({"resample": 3}, "not bilinear"), ({"do_pad": False}, "do_pad"), ({"do_normalize": False}, "do_n")],
)
def test_other_image_processors_are_left_to_themselves(settings, words):
    assert words in why_not_on_device(SamImageProcessor(**settings))
    assert why_not_on_device(SamImageProcessor()) is None


@pytest.mark.parametrize("size", [*SIZES, (1024, 1024), (500, 1500)])
def test_logits_reach_the_pictures_size_as_the_image_processor_brings_them(size):
    processor = SamImageProcessor()
    resized = resized_size(*size, 1024)
    logits = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = processor.post_process_masks([logits[None]], [size], [resized], binarize=False)[0][0]
    assert torch.equal(upscale_logits(logits, (1024, 1024), resized, size), expected)


def test_pictures_of_every_kind(tmp_path):
    levels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    expected = torch.from_numpy(levels).permute(2, 0, 1)
    Image.fromarray(levels).save(tmp_path / "x.png")
    for picture in (
        Image.fromarray(levels),
        levels,
        levels[:, ::-1][:, ::-1],
        expected,
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
    ):
        assert torch.equal(picture_tensor(picture), expected)
    grey = levels[..., 0]
    for picture in (Image.fromarray(grey), grey, torch.from_numpy(grey)):
        assert torch.equal(picture_tensor(picture), torch.from_numpy(grey).expand(3, -1, -1))
    turned = Image.fromarray(levels)
    turned.getexif()[0x0112] = 6
    assert picture_tensor(turned).shape == (3, 9, 6)


@pytest.mark.parametrize(
    "picture, words",
    [
        (np.zeros((4, 5, 3)), "float64, and must be uint8"),
        (torch.zeros(3, 4, 5), "float32, and must be uint8"),
        (np.zeros((4, 5, 4), dtype=np.uint8), r"\(4, 5, 4\), and must be \(H, W\) or \(H, W, 3\)"),
        (torch.zeros(5, 6, 3, dtype=torch.uint8), r"must be \(H, W\) or \(3, H, W\)"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "no pixels"),
        (17, "int, and must be a path"),
        ("nowhere.jpg", "no such file"),
    ],
)
def test_what_is_no_picture(picture, words):
    with pytest.raises(ValueError, match=words):
        picture_tensor(picture)


def test_pictures_that_are_too_thin():
    check_size(SamImageProcessor(), 1, 2048)
    with pytest.raises(ValueError, match=r"2049x1 pixels is too thin.*2048:1"):
        check_size(SamImageProcessor(), 1, 2049)
