"""Test that images and masks are cropped, resized, mirrored and recoloured alike."""

import numpy as np
import pytest
from PIL import Image
from transformers import SamImageProcessor

from samlight_hf.data import (
    Augmentation,
    Sa1bDataset,
)
from samlight_hf.data import augmentation as augmentation_module
from samlight_hf.data.augmentation import Colours, View, resize, resize_box, to_cells
from samlight_hf.data.lazy import LazySample, decode_columns, planes

from .examples import examples, id_of
from .files import annotation, box_mask, coloured_objects, coloured_tar, jpeg, png, rle, sa1b_json, write_tar


S, M = 128, 32


def test_plain_examples_have_the_size_and_place_that_sam_gives(tmp_path):
    processor = SamImageProcessor(size={"longest_edge": S}, pad_size={"height": S, "width": S}, do_normalize=False)
    sizes = [(97, 61), (61, 97), (300, 200), (128, 128), (201, 3)]
    made = examples(Sa1bDataset(coloured_tar(tmp_path / "a.tar", sizes)), 5, S, augmentation=None, prompts=None)
    for example in made:
        width, height = sizes[id_of(example) % 5]
        image = Image.fromarray(coloured_objects(id_of(example) % 5, width, height)[0])
        expected = processor(image, return_tensors="pt", do_rescale=False)["pixel_values"][0].float()
        difference = (example["pixel_values"].float() - expected).abs()
        assert difference.mean() < 0.5 and difference.max() <= 6, (width, height)
        shown = tuple((example["pixel_values"].sum(0) > 0).nonzero().max(0).values + 1)
        assert shown == tuple((expected.sum(0) > 0).nonzero().max(0).values + 1)


def test_a_stretched_image_fits_the_frame_in_other_proportions():
    augmentation, generator = Augmentation(stretch=2.0), np.random.default_rng(0)
    sizes = [augmentation.view(generator, 200, 100, S).size for _ in range(200)]
    ratios = np.array([width / height / 2 for width, height in sizes])
    assert all(max(size) == S for size in sizes)
    assert 0.5 <= ratios.min() < 0.55 and 1.85 < ratios.max() <= 2.0
    assert 0.4 < np.mean(ratios > 1) < 0.6


def test_flipping_twice_and_cropping_nothing_is_nothing():
    _, masks = coloured_objects(3, 90, 70)
    encoded = rle(masks[0])
    plain = View(90, 70, (0, 0, 90, 70), (S, 100), False, S)
    flipped = View(90, 70, (0, 0, 90, 70), (S, 100), True, S)
    mask, box, share = plain.mask(encoded, M)
    other, other_box, _ = flipped.mask(rle(masks[0][:, ::-1]), M)
    np.testing.assert_array_equal(mask, other)
    np.testing.assert_allclose(box, other_box)
    assert share == 1.0


def test_a_mask_that_the_crop_cuts():
    mask = box_mask(x=10, y=10, width=40, height=20, image=(80, 100))
    view = View(100, 80, (30, 0, 80, 40), (100, 80), False, 128)
    cells, box, share = view.mask(rle(mask), 128)
    np.testing.assert_array_equal(box, [0, 20, 40, 60])
    assert share == 0.5
    np.testing.assert_array_equal(cells, box_mask(x=0, y=20, width=40, height=40, image=(128, 128)))
    assert View(100, 80, (60, 0, 80, 40), (100, 80), False, 128).mask(rle(mask), 128) is None
    hole = mask & ~box_mask(x=12, y=10, width=20, height=20, image=(80, 100))
    assert (
        View(100, 80, (14, 0, 30, 40), (100, 80), False, 128).mask(rle(hole), 128) is None
    )  # inside the box, outside the mask
    two = box_mask(x=10, y=10, width=10, height=20, image=(80, 100)) | box_mask(
        x=40, y=25, width=10, height=5, image=(80, 100)
    )
    cells, box, share = view.mask(rle(two), 128)  # the second object only, which starts after the edge of the crop
    np.testing.assert_array_equal(box, [20, 50, 40, 60])
    np.testing.assert_array_equal(cells, box_mask(x=20, y=50, width=20, height=10, image=(128, 128)))
    assert share == 0.2


@pytest.mark.parametrize("seed", range(8))
def test_cells_are_half_full(seed):
    generator = np.random.default_rng(seed)
    pixels = (generator.random((5, 7)) < 0.5).astype(np.uint8)
    left, top, cell = *generator.integers(0, 20, 2), 4
    grid = to_cells(pixels, left, top, cell, cell, 16)
    whole = np.zeros((64, 64))
    whole[top : top + 5, left : left + 7] = pixels
    np.testing.assert_array_equal(grid, whole.reshape(16, 4, 16, 4).mean((1, 3)) >= 0.5)


def test_columns_of_a_mask_are_those_of_pycocotools():
    mask = np.random.default_rng(0).random((23, 31)) < 0.4
    for start, stop in ((0, 31), (5, 6), (7, 30), (30, 31)):
        np.testing.assert_array_equal(decode_columns(rle(mask), start, stop), mask.T[start:stop])


@pytest.mark.parametrize("size", [(2250, 1500), (2251, 1499), (1023, 700)])
def test_large_images_decoded_at_a_fraction_look_like_the_whole_ones(tmp_path, size):
    """Decoding a JPEG at a reduced size does not shift the crop."""
    photograph = Image.open("examples/images/coffee.jpg").convert("RGB").resize(size)
    file = tmp_path / "a.jpg"
    photograph.save(file, quality=95)
    content = sa1b_json(annotation(mask=box_mask(image=size[::-1])), width=size[0], height=size[1])
    tar = Sa1bDataset(write_tar(tmp_path / "a.tar", {"a.jpg": file.read_bytes(), "a.json": content}))
    whole = tar[0].image
    for crop in ((0, 0, *size), (101, 37, size[0] - 3, size[1] - 11)):
        shown = (S, round(S * (crop[3] - crop[1]) / (crop[2] - crop[0])))
        view = View(*size, crop, shown, False, S)
        lazy = tar.open(0)
        image = view.pixels(lazy).transpose(1, 2, 0)
        assert lazy.image.size[0] < size[0]
        expected = whole.resize(shown, Image.Resampling.BILINEAR, crop)
        difference = np.abs(np.asarray(image, np.float32) - np.asarray(expected, np.float32))
        shifted = np.abs(np.asarray(expected, np.float32)[:, 1:] - np.asarray(expected, np.float32)[:, :-1])
        assert difference.mean() < 0.25 * shifted.mean()  # far less than for a shift by one pixel


@pytest.mark.parametrize("size", [(96, 72), (40, 31), (200, 40), (64, 48)])
def test_whole_pixels_are_resized_as_fractions_of_them_are(size):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 64), dtype=np.uint8)
    expected = resize_box(pixels, size, (0, 0, 64, 48))
    resized = resize(pixels[:, :, ::-1][:, :, ::-1], size)
    assert resized.shape == expected.shape == (3, size[1], size[0])
    assert np.abs(resized.astype(int) - expected).max() <= 1


def test_which_way_of_resizing_runs(tmp_path, monkeypatch):
    ran = []
    for name in ("resize", "resize_box"):
        function = getattr(augmentation_module, name)
        monkeypatch.setattr(augmentation_module, name, lambda *a, n=name, f=function: ran.append(n) or f(*a))
    for side, expected in ((100, "resize"), (300, "resize_box")):  # the larger JPEG is decoded at a half
        content = sa1b_json(width=side, height=side)
        tar = Sa1bDataset(write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(side, side), "a.json": content}))
        examples(tar, 1, S, augmentation=None, prompts=None)[0]
        assert ran.pop() == expected and not ran


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_colours_are_the_same_whether_changed_before_or_after_resizing(tmp_path, scale):
    photograph = Image.open("examples/images/coffee.jpg").convert("RGB").resize((150, 100))
    sample = LazySample("a", photograph, [])
    view = View(150, 100, (20, 10, 120, 90), (round(100 * scale), round(80 * scale)), True, 256)
    colours = Colours(0.7, 0.1, 20.0)  # nothing is clipped at black or white
    expected = colours(resize_box(planes(photograph)[:, 10:90, 20:120], view.size, (0, 0, 100, 80)))[:, :, ::-1]
    assert np.abs(view.pixels(sample, colours).astype(int) - expected).max() <= 2


def test_colours_vary_and_by_default_do_not(tmp_path):
    grey = write_tar(
        tmp_path / "a.tar",
        {"a.png": png(np.full((32, 32, 3), 100, np.uint8)), "a.json": sa1b_json(width=32, height=32)},
    )
    plain = examples(Sa1bDataset(grey), 20, 32, augmentation=None, prompts=None)
    assert all((example["pixel_values"] == 100).all() for example in plain)
    bright = examples(Sa1bDataset(grey), 200, 32, augmentation=Augmentation(brightness=0.3), prompts=None)
    levels = [int(example["pixel_values"][0, 0, 0]) for example in bright]
    assert 70 <= min(levels) < 75 and 125 < max(levels) <= 130
    assert all((e["pixel_values"] == e["pixel_values"][0, 0, 0]).all() for e in bright)  # grey stays grey
