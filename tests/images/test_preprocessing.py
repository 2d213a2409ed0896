"""Compare pixel values and mask sizes on any device with transformers' image processor on a CPU, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamImageProcessor

from samlight_hf.images.preprocessing import (
    check_size,
    image_tensor,
    normalised_levels,
    preprocess,
    resized_size,
    why_not_on_device,
)
from samlight_hf.kernels.resize import resize_into, why_not_triton
from samlight_hf.masks.upscaling import upscale_logits


SIZES = [(683, 1024), (1, 1), (7, 300), (300, 7), (1200, 801), (64, 64)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_image(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_pixel_values_are_those_of_the_cpu_on_any_device(device, dtype):
    """Resize by the kernel on a GPU, from every layout and size."""
    if device == "cuda":
        assert why_not_triton(torch.empty(1, 1, 1, device=device)) is None
    processor = SamImageProcessor()
    images = [random_image(*size) for size in SIZES if min(size) > 1]
    images += [image_tensor(image.permute(1, 2, 0).numpy()) for image in images]
    expected = processor([*images], return_tensors="pt")["pixel_values"].to(dtype)
    pixel_values = preprocess(processor, images, torch.device(device), dtype)
    assert pixel_values.dtype == dtype
    assert torch.equal(pixel_values.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"image_mean": [0.1, 0.2, 0.3]}, {"image_std": [0.5, 0.6, 0.7]}, {"rescale_factor": 0.01}]
)
def test_resized_levels_are_normalised_as_the_image_processor_does(settings, dtype):
    """Change the image processor after its levels were computed."""
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("without AVX2 torchvision resizes in floating point")
    processor, image = SamImageProcessor(), random_image(700, 333)
    for name, value in settings.items():
        normalised_levels(processor, dtype, torch.device("cpu"))
        setattr(processor, name, value)
    expected = processor(image, return_tensors="pt")["pixel_values"][0].to(dtype)
    levels = normalised_levels(processor, dtype, torch.device("cpu"))
    resize_into(resized := torch.empty(3, 1024, 1024, dtype=dtype), image, resized_size(700, 333, 1024), levels)
    assert torch.equal(resized, expected)


@pytest.mark.gpu
def test_a_warm_call_launches_one_kernel_an_image_and_copies_nothing():
    processor, images = SamImageProcessor(), [random_image(683, 1024).cuda(), random_image(500, 333).cuda()]

    def run():
        preprocess(processor, images, images[0].device, torch.bfloat16)
        torch.cuda.synchronize()

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    assert on_device == ["_resize_kernel"] * len(images)


@pytest.mark.parametrize(
    "settings, words",
    [({"resample": 3}, "not bilinear"), ({"do_pad": False}, "do_pad"), ({"do_normalize": False}, "do_n")],
)
def test_other_image_processors_are_left_to_themselves(settings, words):
    assert words in why_not_on_device(SamImageProcessor(**settings))
    assert why_not_on_device(SamImageProcessor()) is None


@pytest.mark.parametrize("size", [*SIZES, (1024, 1024), (500, 1500)])
def test_logits_reach_the_images_size_as_the_image_processor_brings_them(size):
    processor = SamImageProcessor()
    resized = resized_size(*size, 1024)
    logits = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = processor.post_process_masks([logits[None]], [size], [resized], binarize=False)[0][0]
    assert torch.equal(upscale_logits(logits, (1024, 1024), resized, size), expected)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "LA", "P"])
def test_an_image_is_what_its_file_is(mode, tmp_path):
    levels = np.random.default_rng(0).integers(0, 255, (6, 5), dtype=np.uint8)
    image = Image.fromarray(levels.astype(np.uint16) * 99) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(levels))
    image.save(tmp_path / "image.png")
    assert torch.equal(image_tensor(image), image_tensor(tmp_path / "image.png"))


def test_images_of_every_kind(tmp_path):
    levels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    expected = torch.from_numpy(levels).permute(2, 0, 1)
    Image.fromarray(levels).save(tmp_path / "x.png")
    for image in (
        Image.fromarray(levels),
        levels,
        levels[:, ::-1][:, ::-1],
        expected,
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
    ):
        assert torch.equal(image_tensor(image), expected)
    grey = levels[..., 0]
    for image in (Image.fromarray(grey), grey, torch.from_numpy(grey)):
        assert torch.equal(image_tensor(image), torch.from_numpy(grey).expand(3, -1, -1))
    turned = Image.fromarray(levels)
    turned.getexif()[0x0112] = 6
    assert image_tensor(turned).shape == (3, 9, 6)


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((4, 5, 3), dtype=bool), "bool, and must be integers or floats"),
        (torch.zeros(3, 4, 5, dtype=torch.bool), "torch.bool, and must be integers or floats"),
        (np.zeros((4, 5), dtype=complex), "complex128, and must be"),
        (np.zeros((4, 5, 4), dtype=np.uint8), r"\(4, 5, 4\), and must be \(H, W\) or \(H, W, 3\)"),
        (torch.zeros(5, 6, 3, dtype=torch.uint8), r"must be \(H, W\) or \(3, H, W\)"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "no pixels"),
        (17, "int, and must be a path"),
        ("nowhere.jpg", "no such file"),
    ],
)
def test_what_is_no_image(image, words):
    with pytest.raises(ValueError, match=words):
        image_tensor(image)


def test_images_that_are_too_thin():
    check_size(SamImageProcessor(), 1, 2048)
    with pytest.raises(ValueError, match=r"2049x1 pixels is too thin.*2048:1"):
        check_size(SamImageProcessor(), 1, 2049)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (3, 3), (3, 1), (7, 1)])
def test_columns_of_narrow_images_are_not_taken_for_channels(monkeypatch, size):
    monkeypatch.setattr("transformers.image_utils.logger.warning", lambda message, *rest: pytest.fail(message))
    image, processor = random_image(*size), SamImageProcessor()
    pixel_values = preprocess(processor, [image], torch.device("cpu"))[0]
    height, width = resized_size(*size, 1024)
    levels = normalised_levels(processor, torch.float32, torch.device("cpu"))
    assert pixel_values.shape == (3, 1024, 1024)
    for row, column in ((0, 0), (-1, -1)):  # at the corners of the image, levels are not mixed
        corner = pixel_values[:, :height, :width][:, row, column]
        torch.testing.assert_close(corner, levels.gather(1, image[:, row, column, None].long())[:, 0])
