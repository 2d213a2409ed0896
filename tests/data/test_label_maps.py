"""Test that mask files are read as label maps or refused, and that grey levels never become objects."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from samlight_hf.data import SampleError, SkipReason
from samlight_hf.data.label_maps import (
    LABEL_MAP_TITLE,
    MaskReading,
    has_grey_levels,
    parse_ignore_label,
    read_labels,
    read_object,
)
from samlight_hf.masks.files import LABEL_MAP_TITLE as written_title
from samlight_hf.masks.files import save_label_map


WIDTH, HEIGHT = 100, 80


def two_blobs(scale=1) -> Image.Image:
    image = Image.new("L", (WIDTH * scale, HEIGHT * scale))
    for box in ([10, 10, 45, 50], [55, 30, 95, 70]):
        ImageDraw.Draw(image).ellipse([scale * side for side in box], fill=255)
    return image


def half_pixel_box(size, resample=Image.Resampling.BILINEAR) -> Image.Image:
    image = Image.new("L", (200, 160))
    ImageDraw.Draw(image).rectangle([21, 31, 120, 110], fill=255)
    return image.resize(size, resample)


def encoded(image: Image.Image | np.ndarray, file_format="PNG", **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, file_format, **options)
    return file.getvalue()


def decoded_jpeg(quality: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(two_blobs(), "JPEG", quality=quality))))


ROWS, COLUMNS = np.mgrid[:256, :256]
BLOBS = np.asarray(two_blobs()) > 0
HALVED = np.asarray(two_blobs(4).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))

GREY = {
    **{
        f"anti-aliased by {scale}, {resample.name}": np.asarray(two_blobs(scale).resize((WIDTH, HEIGHT), resample))
        for scale in (2, 3, 4, 8)
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.BOX, Image.Resampling.LANCZOS)
    },
    **{f"box at {size}": np.asarray(half_pixel_box(size)) for size in ((100, 80), (400, 320), (133, 97), (300, 240))},
    **{
        f"blurred by {radius}": np.asarray(two_blobs().filter(ImageFilter.GaussianBlur(radius)))
        for radius in (1, 2, 5, 20)
    },
    **{f"JPEG, quality {quality}": decoded_jpeg(quality) for quality in (50, 75, 90, 95)},
    "of 16 bits": HALVED.astype(np.uint16) * 257,
    "of 32 bits": HALVED.astype(np.int32) * 2**20,
    "dark": HALVED // 10,
    "a gradient": COLUMNS.astype(np.uint8),
    "a photograph's": np.asarray(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99), np.uint8)).filter(
            ImageFilter.GaussianBlur(2)
        )
    ),
}


@pytest.mark.parametrize("name", GREY)
def test_grey_levels_are_no_labels(name):
    assert has_grey_levels(GREY[name])
    assert has_grey_levels(np.ascontiguousarray(GREY[name].T)) and has_grey_levels(GREY[name][::-1, ::-1])


def nearest(seed: int, count: int, in_order: bool) -> np.ndarray:
    """Make touching cells, as of superpixels: the number of the nearest of some random points, from 1."""
    places = np.random.default_rng(seed).integers(0, 256, (count, 2))
    if in_order:
        places = places[np.lexsort((places[:, 1], places[:, 0]))]
    distances = (ROWS[..., None] - places[:, 0]) ** 2 + (COLUMNS[..., None] - places[:, 1]) ** 2
    return distances.argmin(-1) + 1


RIM = np.asarray(two_blobs().filter(ImageFilter.MaxFilter(3))) > 0
LABELS = {
    "two values": BLOBS * np.uint8(255),
    "bits": BLOBS,
    "nothing": np.zeros((9, 9), np.uint8),
    "one pixel": np.full((1, 1), 7, np.uint8),
    "two objects": np.where(COLUMNS < 99, 0, np.where(ROWS < 99, 127, 255)),
    "VOC: an object, void around it": np.where(BLOBS, 15, np.where(RIM, 255, 0)),
    "borders and what they enclose": np.where(BLOBS, 2, np.where(RIM, 1, 0)),
    "cells": nearest(0, 600, False),
    "cells in order": nearest(0, 600, True),
    "classes": nearest(0, 600, False) % 31,
    "a grid": (ROWS // 8) * 32 + COLUMNS // 8 + 1,
    "tiny cells apart": np.where((ROWS % 4 < 2) & (COLUMNS % 4 < 2), (ROWS // 4) * 64 + COLUMNS // 4 + 1, 0),
    "thin lines": np.where(ROWS % 20 == 5, ROWS, np.where(COLUMNS % 20 == 9, COLUMNS, 0)),
    "a number of its own for every speck": np.where((ROWS * 7 + COLUMNS * 13) % 29 == 0, ROWS * 256 + COLUMNS, 0),
    "few labels without order": np.random.default_rng(0).integers(0, 8, (99, 99)),
    "numbers of 32 bits": np.where(COLUMNS < 99, 0, np.where(ROWS < 99, 2**30, 5)),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_no_grey_levels(name):
    assert not has_grey_levels(LABELS[name])


def refused(data: bytes, reason: SkipReason, reading=MaskReading()):  # noqa: B008  frozen
    with pytest.raises(SampleError) as raised:
        read_labels(data, reading)
    assert raised.value.reason == reason


def test_an_anti_aliased_mask_of_two_blobs_is_refused_or_one_object():
    assert len(np.unique(HALVED)) > 100
    refused(encoded(HALVED), SkipReason.GREY_MASK)
    assert "threshold it" in SkipReason.GREY_MASK and "binary_masks" in SkipReason.GREY_MASK
    labels, void = read_labels(encoded(HALVED), MaskReading(binary=True))
    np.testing.assert_array_equal(labels, HALVED >= 128)
    assert void is None
    np.testing.assert_array_equal(read_object(encoded(HALVED), MaskReading()), HALVED >= 128)


@pytest.mark.parametrize("quality", [50, 75, 95, 100])
def test_a_jpeg_is_no_label_map_but_one_object(quality):
    data = encoded(two_blobs(), "JPEG", quality=quality)
    refused(data, SkipReason.GREY_MASK)
    np.testing.assert_array_equal(read_object(data, MaskReading()), BLOBS)
    np.testing.assert_array_equal(read_labels(data, MaskReading(binary=True))[0], BLOBS)


def test_a_jpeg_that_has_kept_two_values_is_a_label_map():
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, 8:] = 255  # whole blocks
    np.testing.assert_array_equal(read_labels(encoded(pixels, "JPEG", quality=95), MaskReading())[0], pixels)


@pytest.mark.parametrize("largest", [1, 25, 255, 4095])
def test_one_object_is_what_is_half_as_bright_as_the_brightest(largest):
    pixels = np.zeros((9, 9), np.uint16)
    pixels[:, 3:] = largest
    labels, _ = read_labels(encoded(pixels), MaskReading(binary=True))
    np.testing.assert_array_equal(labels, pixels > 0)
    assert not read_labels(encoded(pixels * 0), MaskReading(binary=True))[0].any()


VOID = np.where(BLOBS, 15, np.where(RIM, 255, 0)).astype(np.uint8)


@pytest.mark.parametrize(
    ("others", "ignore_label", "expected", "void"),
    [
        ([], "auto", [255], None),  # a plain mask
        ([1], "auto", [1], 255),
        ([15, 20], "auto", [15, 20], 255),
        ([126], "auto", [126], 255),
        ([127], "auto", [127, 255], None),  # objects painted at even distances
        ([85, 170], "auto", [85, 170, 255], None),
        ([1, 254], "auto", [1, 254, 255], None),
        ([1, 300], "auto", [1, 255, 300], None),
        ([1], None, [1, 255], None),
        ([181], 255, [181], None),  # COCO-Stuff, with its void label given
        ([], 255, [], None),
        ([7, 9], 7, [9, 255], None),
        ([7, 9], 0, [7, 9, 255], None),
    ],
)
def test_which_label_is_void(others, ignore_label, expected, void):
    pixels = np.zeros((40, 60), np.uint16)
    for number, label in enumerate([*others, 255]):
        pixels[5:30, 5 + 15 * number : 15 + 15 * number] = label
    pixels = pixels if pixels.max() > 255 else pixels.astype(np.uint8)
    labels, taken_out = read_labels(encoded(pixels), MaskReading(ignore_label))
    assert np.unique(labels[labels > 0]).tolist() == expected and taken_out == void
    for label in expected:
        np.testing.assert_array_equal(labels == label, pixels == label)


def test_readings_that_do_not_fit():
    for label in ("255", 2.5, True):
        with pytest.raises(ValueError, match="ignore_label="):
            MaskReading(label)
    with pytest.raises(ValueError, match="binary_masks=True"):
        MaskReading(255, binary=True)
    assert [parse_ignore_label(text) for text in ("auto", "None", "255", 255)] == ["auto", None, 255, 255]
    with pytest.raises(ValueError, match="ignore_label=void must be a label's number, auto or none"):
        parse_ignore_label("void")


TWO = np.zeros((40, 60), np.uint8)
TWO[5:20, 5:20], TWO[10:30, 30:50] = 3, 9


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.concatenate([colours, alpha[..., None].astype(np.uint8)], -1)


RGB = np.stack([TWO] * 3, -1)
OPAQUE = np.full_like(TWO, 255)


@pytest.mark.parametrize(
    ("image", "file_format"),
    [
        (RGB, "PNG"),
        (RGB, "BMP"),
        (RGB, "TIFF"),
        (with_alpha(RGB, OPAQUE), "PNG"),
        (with_alpha(RGB, (TWO > 0) * 255), "PNG"),
        (with_alpha(np.where(TWO[..., None] > 0, RGB, [9, 200, 30]).astype(np.uint8), (TWO > 0) * 255), "PNG"),
        (Image.merge("LA", [Image.fromarray(TWO), Image.fromarray(OPAQUE)]), "PNG"),
        (TWO.astype(np.uint16), "PNG"),
        (TWO.astype(np.uint16), "TIFF"),
        (TWO.astype(np.int32), "TIFF"),
        (TWO.astype(np.float32), "TIFF"),
    ],
)
def test_equal_channels_and_any_number_of_bits_are_labels(image, file_format):
    labels, void = read_labels(encoded(image, file_format), MaskReading())
    np.testing.assert_array_equal(labels, TWO)
    assert void is None


def test_a_shape_in_the_alpha_channel_alone_is_an_object():
    white = np.full((*TWO.shape, 3), 255, np.uint8)
    labels, _ = read_labels(encoded(with_alpha(white, (TWO > 0) * 255)), MaskReading())
    np.testing.assert_array_equal(labels, (TWO > 0) * 255)


def test_a_soft_alpha_channel_is_a_grey_edge():
    white = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    refused(encoded(with_alpha(white, HALVED)), SkipReason.GREY_MASK)
    np.testing.assert_array_equal(read_object(encoded(with_alpha(white, HALVED)), MaskReading()), HALVED >= 128)


def written_out(rows: list[bytes], width: int, bits: int, colour_type: int) -> bytes:
    """Encode a PNG of a bit depth that Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [2, 4])
def test_pngs_of_few_bits_have_the_labels_that_were_written(bits):
    pixels = TWO // 3
    packed = np.unpackbits(pixels[..., None], axis=-1)[..., -bits:].reshape(len(pixels), -1)
    data = written_out([row.tobytes() for row in np.packbits(packed, axis=-1)], pixels.shape[1], bits, 0)
    labels, void = read_labels(data, MaskReading())
    np.testing.assert_array_equal(labels, pixels)
    assert void is None


def test_colours_of_16_bits_which_pillow_halves_are_refused():
    data = written_out([row.tobytes() for row in RGB.astype(">u2").reshape(len(RGB), -1)], RGB.shape[1], 16, 2)
    assert not np.asarray(Image.open(io.BytesIO(data))).any()  # every label would be lost
    refused(data, SkipReason.DEEP_COLOUR_MASK)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(np.stack([TWO, TWO, TWO + np.uint8(1)], -1)), SkipReason.COLOURED_MASK),
        (encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"), SkipReason.COLOURED_MASK),
        (encoded(TWO)[:50], SkipReason.MALFORMED_MASK),
        (b"", SkipReason.MALFORMED_MASK),
        (encoded(TWO.astype(np.int32) - 1, "TIFF"), SkipReason.MALFORMED_MASK),
        (encoded(TWO / np.float32(2), "TIFF"), SkipReason.MALFORMED_MASK),
    ],
)
def test_files_that_are_no_label_maps(data, reason):
    refused(data, reason)
    with pytest.raises(SampleError, match=reason[:12]):
        read_object(data, MaskReading())


def test_a_png_that_says_that_it_is_a_label_map_is_one(tmp_path):
    """Read what `samlight segment --format labels` writes, though its numbers look like grey levels or void."""
    path, size = tmp_path / "labels.png", (120, 160)
    noise = np.random.default_rng(0).integers(0, 40, size).astype(np.uint16)
    void = np.zeros(size, dtype=np.uint16)
    void[:40], void[60:90] = 7, 255
    for labels, without_title in ((noise, None), (void, (void == 7) * 7)):
        save_label_map(path, labels)
        read, found = read_labels(path.read_bytes(), MaskReading())
        assert np.array_equal(read, labels) and found is None
        if without_title is None:
            with pytest.raises(SampleError):
                read_labels(encoded(labels), MaskReading())
        else:
            assert np.array_equal(read_labels(encoded(labels), MaskReading())[0], without_title)
    assert read_labels(path.read_bytes(), MaskReading(ignore_label=7))[0].max() == 255  # what is asked for is done
    assert written_title == LABEL_MAP_TITLE
