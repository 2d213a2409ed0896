"""Check that levels of every bit depth become 8 bits, that 8-bit levels are kept, and that changes are logged."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from samlight_hf.data.dataset import decode_image
from samlight_hf.data.lazy import LazySample
from samlight_hf.images import levels
from samlight_hf.images.levels import GDAL_NODATA_TAG, has_more_than_8_bits, stretch, to_rgb
from samlight_hf.images.preprocessing import image_tensor
from samlight_hf.images.reading import ImageError, open_image
from samlight_hf.inference.pipelines import _load


def gradient(low: int, high: int, dtype=np.uint16, size=(40, 60)) -> np.ndarray:
    return np.linspace(low, high, size[0] * size[1]).reshape(size).astype(dtype)


def png(pixels: np.ndarray) -> bytes:
    """Encode a PNG of 16 bits, (H, W, 2 to 4), which Pillow cannot write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tiff(pixels: np.ndarray, order="<", compressed=False, planar=False, orientation=1, nodata=None) -> bytes:
    """Encode a TIFF of several 16-bit channels, (H, W, C), which Pillow cannot write; the fourth is alpha."""
    height, width, channels = pixels.shape
    planes = [pixels[..., channel] for channel in range(channels)] if planar else [pixels]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    data, places = b"", []
    for strip in strips:
        places.append(8 + len(data))
        data += strip
    entries = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [16] * channels), 259: ("H", [8 if compressed else 1]),
        262: ("H", [2]), 273: ("I", places), 274: ("H", [orientation]), 277: ("H", [channels]), 278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]), 284: ("H", [2 if planar else 1]), 339: ("H", [1] * channels),
    }  # fmt: skip
    if channels == 4:
        entries[338] = ("H", [2])
    if nodata is not None:
        entries[GDAL_NODATA_TAG] = ("s", nodata.encode() + b"\0")
    directory = b""
    for tag, (kind, values) in sorted(entries.items()):
        value = values if kind == "s" else struct.pack(f"{order}{len(values)}{kind}", *values)
        place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", 8 + len(data))
        data += value if len(value) > 4 else b""
        directory += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4, "s": 2}[kind], len(values)) + place
    beginning = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return beginning + data + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


def grey_levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., 0]


@pytest.mark.parametrize("value", [65535, 0], ids=["hot", "dead"])
def test_one_pixel_takes_no_levels_from_the_others(value):
    pixels = gradient(1000, 1800)
    without, _ = stretch(pixels)
    pixels[3, 4] = value
    scaled, note = stretch(pixels)
    assert len(np.unique(scaled)) > 240
    assert np.abs(np.delete(scaled, 3 * 60 + 4).astype(int) - np.delete(without, 3 * 60 + 4)).max() <= 2
    assert "became 0 to 255" in note


def test_an_object_on_a_plain_ground_is_kept():
    pixels = np.full((100, 100), 700, dtype=np.uint16)
    pixels[2:4, 2:6] = 900  # fewer than the share that is clipped
    scaled, _ = stretch(pixels)
    assert np.unique(scaled).tolist() == [0, 255]


@pytest.mark.parametrize(
    "nodata", [-3.4028234663852886e38, -9999, np.nan, np.inf, -np.inf, 9.969209968386869e36, -32768]
)
def test_floats_without_data_are_black_and_do_not_count(nodata):
    pixels = gradient(200, 900, np.float32)
    expected, _ = stretch(pixels[4:])
    pixels[:4] = nodata
    scaled, note = stretch(pixels)
    assert (scaled[:4] == 0).all() and np.array_equal(scaled[4:], expected)
    assert f"{4 * 60} pixels without data became black" in note


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.float64])
def test_a_usual_nodata_value_counts_where_something_is_lower(dtype):
    pixels = gradient(-20000, 20000, dtype)
    pixels[20, 20] = -9999
    scaled, note = stretch(pixels)
    assert scaled[20, 20] == pytest.approx(64, abs=2) and "without data" not in note


@pytest.mark.parametrize("nodata, text", [(65535, "65535"), (0, "0 "), (1234, "1234.0")])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_the_nodata_tag_of_gdal(tmp_path, nodata, text, dtype):
    pixels = gradient(300, 900, dtype)
    expected, _ = stretch(pixels[4:])
    pixels[:4] = nodata
    Image.fromarray(pixels).save(tmp_path / "tagged.tif", tiffinfo={GDAL_NODATA_TAG: text})
    scaled = grey_levels(open_image(tmp_path / "tagged.tif"))
    assert (scaled[:4] == 0).all() and np.array_equal(scaled[4:], expected)
    if nodata == 65535:  # without the tag this is a level
        Image.fromarray(pixels).save(tmp_path / "plain.tif")
        assert grey_levels(open_image(tmp_path / "plain.tif"))[0, 0] == 255


@pytest.mark.parametrize("tag", ["nan", "none", " ", "-1.7976931348623157e+308", "70000"])
def test_a_nodata_tag_that_means_no_level(tmp_path, tag):
    pixels = gradient(300, 900)
    Image.fromarray(pixels).save(tmp_path / "x.tif", tiffinfo={GDAL_NODATA_TAG: tag})
    assert np.array_equal(grey_levels(open_image(tmp_path / "x.tif")), stretch(pixels)[0])


def test_unsigned_levels_of_32_bits(tmp_path):
    pixels = gradient(0, 4_000_000_000, np.uint32)
    Image.fromarray(pixels.view(np.int32)).save(tmp_path / "x.tif")
    data = (tmp_path / "x.tif").read_bytes()  # Pillow writes them signed: sample format 2 becomes 1
    entry = struct.pack("<HHI", 339, 3, 1)
    assert data.count(entry) == 1
    place = data.index(entry) + len(entry)
    (tmp_path / "x.tif").write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    assert np.array_equal(grey_levels(open_image(tmp_path / "x.tif")), stretch(pixels)[0])


def test_nothing_but_holes_is_black():
    scaled, note = stretch(np.full((3, 4), np.nan, dtype=np.float32))
    assert not scaled.any() and "no data at all" in note


@pytest.mark.parametrize("pixels", [gradient(0, 65535), np.zeros((4, 5), np.uint16), np.full((4, 5), 2313, np.uint16)])
def test_16_bits_that_are_used_whole_and_constant_images_are_only_rounded(pixels):
    scaled, note = stretch(pixels)
    assert np.abs(scaled - pixels / 257).max() <= 2
    assert note is None or ("became" in note and pixels.max() == 65535)


COLOURS = np.stack([gradient(300, 900), gradient(1800, 1200), gradient(500, 900)], axis=-1)
FILES = {
    "png": png(COLOURS),
    **{
        f"tiff {order} {compressed}": tiff(COLOURS, order, compressed) for order in "<>" for compressed in (False, True)
    },
    "ppm": b"P6 60 40 65535\n" + COLOURS.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", FILES)
def test_colours_of_16_bits_keep_their_levels_and_their_hue(tmp_path, name):
    """Stretch all channels together: Pillow alone gives levels 1 to 7."""
    expected, _ = stretch(COLOURS)
    assert len(np.unique(expected)) > 200
    assert (expected.reshape(-1, 3).mean(axis=0).argsort() == COLOURS.reshape(-1, 3).mean(axis=0).argsort()).all()
    path = tmp_path / f"x.{name[:4].strip()}"
    path.write_bytes(FILES[name])
    assert np.array_equal(open_image(path), expected)
    image = Image.open(path)
    assert has_more_than_8_bits(image)
    for _ in range(2):  # twice: the image is not changed
        assert np.array_equal(image_tensor(image).permute(1, 2, 0), expected)
    assert np.array_equal(_load(str(path), None), expected)
    assert np.array_equal(decode_image(FILES[name], (60, 40)), expected)
    assert np.array_equal(LazySample("x", Image.open(io.BytesIO(FILES[name])), []).decode()[0], expected)


def test_the_page_that_was_chosen_is_read(tmp_path):
    """Read the second page of 16-bit colours, whose file is opened again: the first directory links to the second."""
    first, second = tiff(COLOURS), tiff(COLOURS[::-1])
    place = struct.unpack("<I", second[4:8])[0]
    (count,) = struct.unpack("<H", second[place : place + 2])
    directory = bytearray(second[place:])
    for number in range(count):  # offsets, shifted by the length of the first file
        at = 2 + 12 * number
        tag, kind, length, value = struct.unpack("<HHII", directory[at : at + 12])
        if tag == 273 or length * {2: 1, 3: 2, 4: 4}[kind] > 4:
            directory[at + 8 : at + 12] = struct.pack("<I", value + len(first))
    joined = first[:-4] + struct.pack("<I", len(first) + place) + second[:place] + bytes(directory)
    (tmp_path / "x.tif").write_bytes(joined)
    image = Image.open(tmp_path / "x.tif")
    for page, expected in ((1, COLOURS[::-1]), (0, COLOURS)):
        image.seek(page)
        assert np.array_equal(to_rgb(image), stretch(expected)[0])


def test_planes_of_16_bits(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(COLOURS, compressed=True, planar=True))
    scaled = np.asarray(open_image(tmp_path / "x.tif")).astype(int)
    assert np.abs(scaled - stretch(COLOURS)[0]).max() <= 60 and scaled.max() == 255  # only the high bytes, stretched
    (tmp_path / "x.tif").write_bytes(tiff(COLOURS, planar=True))
    with pytest.raises(ImageError, match="separate planes cannot be read. Save them interleaved"):
        open_image(tmp_path / "x.tif")


def test_deep_colours_are_turned_upright(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(COLOURS, orientation=6))
    scaled = np.asarray(open_image(tmp_path / "x.tif"))
    assert np.array_equal(scaled, np.rot90(stretch(COLOURS)[0], -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGBA", "CMYK", "I", "F"])
def test_a_tiff_without_compression_is_turned_upright(tmp_path, mode, orientation):
    """Pillow maps such files to memory, and takes the turned width for that of the stored rows."""
    image = Image.effect_noise((60, 40), 90).convert(mode.replace("I;16", "I"))
    image = Image.fromarray(np.asarray(image).astype(np.uint16)) if mode == "I;16" else image
    assert image.mode == mode
    image.save(tmp_path / "x.tif", tiffinfo={ExifTags.Base.Orientation: orientation})
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[orientation]
    expected = np.rot90(np.asarray(to_rgb(image)), turns)
    if orientation in (2, 4, 5, 7):
        expected = expected[:, ::-1]
    assert np.array_equal(open_image(tmp_path / "x.tif"), expected)
    opened = Image.open(tmp_path / "x.tif")
    assert np.array_equal(image_tensor(opened).permute(1, 2, 0), expected)
    assert opened.filename  # as it was


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])  # Pillow itself inverts 8 bits
def test_grey_whose_zero_is_white(tmp_path, dtype):
    pixels = gradient(1, 30_000, dtype)
    pixels[0, :5] = 0
    Image.fromarray(pixels).save(tmp_path / "x.tif", tiffinfo={262: 0, GDAL_NODATA_TAG: "0"})
    upright, _ = stretch(pixels, nodata=0)
    assert np.array_equal(grey_levels(open_image(tmp_path / "x.tif")), np.where(pixels > 0, 255 - upright, 0))


def test_signed_levels_of_8_bits(tmp_path):
    pixels = gradient(-100, 100, np.int8)
    Image.fromarray(pixels.view(np.uint8)).save(tmp_path / "x.tif", tiffinfo={339: 2})
    assert has_more_than_8_bits(Image.open(tmp_path / "x.tif"))
    assert np.array_equal(grey_levels(open_image(tmp_path / "x.tif")), stretch(pixels)[0])


def test_colours_without_data_are_black_where_all_channels_lack_them(tmp_path):
    pixels = COLOURS.copy()
    pixels[:4] = 65535
    pixels[10, 10, 1] = 65535  # overexposed in one channel
    (tmp_path / "x.tif").write_bytes(tiff(pixels, nodata="65535"))
    scaled = np.asarray(open_image(tmp_path / "x.tif"))
    assert (scaled[:4] == 0).all() and scaled[10, 10, 1] == 255
    assert np.abs(scaled[11:].astype(int) - stretch(COLOURS[4:])[0][7:]).max() <= 1


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("write", [png, tiff], ids=["png", "tiff"])
def test_alpha_of_16_bits(tmp_path, channels, write):
    if (channels, write) == (2, tiff):
        pytest.skip("Pillow reads no TIFF of grey and alpha of 16 bits")
    alpha = np.full((40, 60, 1), 65535, dtype=np.uint16)
    alpha[:, :30] = 0
    colours = COLOURS[..., : channels - 1].copy()
    expected, _ = stretch(colours[:, 30:])
    colours[:, :30] = 60000  # invisible
    path = tmp_path / "x"
    path.write_bytes(write(np.concatenate([colours, alpha], axis=-1)))
    scaled = np.asarray(open_image(path))
    assert (scaled[:, :30] == 255).all() and np.array_equal(scaled[:, 30:], np.broadcast_to(expected, (40, 30, 3)))
    path.write_bytes(write(np.concatenate([COLOURS[..., : channels - 1], alpha * 0], axis=-1)))
    shown = stretch(COLOURS[..., : channels - 1])[0]
    assert np.array_equal(open_image(path), np.broadcast_to(shown, (40, 60, 3)))


@pytest.mark.parametrize("most_opaque", [0, 1])
def test_an_alpha_that_hides_everything_is_ignored(tmp_path, caplog, most_opaque):
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(np.concatenate([colours, np.full((6, 8, 1), most_opaque, np.uint8)], axis=-1))
    for name in ("x.png", "x.tif"):
        image.save(tmp_path / name)
        caplog.clear()
        assert np.array_equal(open_image(tmp_path / name), colours)
        assert f"{name}: its alpha hides the whole image and is ignored." in caplog.text
    assert np.array_equal(image_tensor(image).permute(1, 2, 0), colours)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "RGBA", "1", "CMYK"])
def test_8_bits_stay_as_they_are_without_a_word(tmp_path, caplog, mode):
    pixels = np.random.default_rng(0).integers(3, 90, (6, 8), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "x.tif", tiffinfo={GDAL_NODATA_TAG: "7"})
    assert np.array_equal(open_image(tmp_path / "x.tif"), image.convert("RGB"))
    assert not has_more_than_8_bits(Image.open(tmp_path / "x.tif"))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_an_image_is_the_same_in_whatever_form_it_comes(tmp_path, caplog, dtype):
    pixels = gradient(300, 900, dtype)
    pixels[0, 0] = 30000
    image = Image.fromarray(pixels)
    image.save(tmp_path / "x.tif")
    expected = torch.from_numpy(stretch(pixels)[0]).expand(3, -1, -1)
    colours = np.stack([pixels] * 3, axis=-1)
    for given in (
        tmp_path / "x.tif",
        image,
        pixels,
        torch.from_numpy(pixels),
        colours,
        torch.from_numpy(colours).permute(2, 0, 1),
    ):
        caplog.clear()
        assert torch.equal(image_tensor(given), expected)
        assert "became 0 to 255" in caplog.text
    assert np.array_equal(to_rgb(image), np.asarray(expected.permute(1, 2, 0)))
    assert torch.equal(torch.from_numpy(np.array(_load(str(tmp_path / "x.tif"), None))).permute(2, 0, 1), expected)


def test_half_precision_tensors():
    pixels = torch.linspace(0, 1, 600, dtype=torch.bfloat16).reshape(20, 30)
    assert image_tensor(pixels).dtype == torch.uint8 and image_tensor(pixels.half()).max() == 255


def test_data_tell_once(caplog, monkeypatch):
    monkeypatch.setattr(levels, "_has_told", False)
    image = Image.fromarray(gradient(300, 900))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            to_rgb(image)
    assert caplog.text.count("became 0 to 255") == 1 and "not reported" in caplog.text


@pytest.mark.parametrize("orientation", [1, 6, 9])
def test_an_image_that_need_not_be_converted_is_copied_only_if_it_is_asked_for(orientation):
    image = Image.effect_noise((5, 4), 60).convert("RGB")
    image.getexif()[ExifTags.Base.Orientation] = orientation
    before = np.asarray(image)
    copy, own = to_rgb(image, upright=True), to_rgb(image, upright=True, copies=False)
    assert copy is not image
    assert (own is image) == (orientation == 1)
    assert np.array_equal(copy, np.rot90(before, -1) if orientation == 6 else before)
    assert np.array_equal(own, copy)
    copy.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(image, before)
    grey = Image.new("L", (5, 4), 7)
    assert to_rgb(grey, upright=True, copies=False).mode == "RGB"
    assert grey.mode == "L"


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif", "x.bmp"])
def test_an_image_from_a_file_keeps_neither_the_file_nor_a_decoder(tmp_path, name):
    """A decoder of WebP holds whole images, and a TIFF its tags, in which Photoshop has layers."""
    image, path = Image.effect_noise((64, 48), 60).convert("RGB"), tmp_path / name
    image.save(path)
    found = open_image(path)
    expected = np.asarray(Image.open(path))
    path.write_bytes(b"")
    assert (type(found) is Image.Image) == (name not in ("x.png", "x.jpg"))
    assert getattr(found, "fp", None) is None
    assert np.array_equal(found, expected)
