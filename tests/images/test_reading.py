"""Check that images of every mode are read as correct RGB, and that other files give a one-line error."""

import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from samlight_hf.data import SampleError, SkipReason
from samlight_hf.data.dataset import decode_image
from samlight_hf.data.label_maps import read_values
from samlight_hf.images import reading
from samlight_hf.images.formats import describe_left_out, image_suffixes, opening_hint
from samlight_hf.images.reading import ImageError, common_folder, find_images, open_image, read_ahead


def refused(path, *words):
    with pytest.raises(ImageError) as raised:
        open_image(path)
    message = str(raised.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message, message


def save(image, path, **options):
    image.save(path, **options)
    return path


def png_of_size(width, height) -> bytes:
    """Encode the beginning of a PNG whose header has this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + b"\0\0\0\x09IDAT"
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"])
def test_every_mode_gives_rgb(tmp_path, mode):
    image = Image.new("L", (5, 3), 200).convert(mode) if mode != "I;16" else Image.new(mode, (5, 3), 200)
    path = save(image, tmp_path / "x.tif")
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (5, 3))


def test_colours_of_cmyk_and_of_palettes(tmp_path):
    red = Image.new("RGB", (8, 8), (250, 10, 10))
    for image, name in ((red.convert("CMYK"), "x.jpg"), (red.quantize(4), "x.gif")):
        opened = open_image(save(image, tmp_path / name))
        assert np.asarray(opened).reshape(-1, 3).mean(axis=0) == pytest.approx([250, 10, 10], abs=6), image.mode


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 255, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    opened = open_image(save(image, tmp_path / "x.png"))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 255), (255, 255, 255)]
    palette = Image.new("P", (1, 1), 0)
    assert open_image(save(palette, tmp_path / "p.png", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("levels", [(0, 32768, 65535), (100, 2148, 4195)], ids=["16 bits used", "12 bits used"])
def test_grey_of_16_bits_is_stretched_not_clipped(tmp_path, levels):
    path = save(Image.fromarray(np.array([levels], dtype=np.uint16)), tmp_path / "x.png")
    assert [open_image(path).getpixel((x, 0))[0] for x in range(3)] == pytest.approx([0, 128, 255], abs=1)


def test_grey_of_floats_with_holes(tmp_path):
    path = save(Image.fromarray(np.array([[0.0, np.nan, 2.0]], dtype=np.float32)), tmp_path / "x.tif")
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 0, 255]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the left of the file is the top of the image
    opened = open_image(save(image, tmp_path / "x.jpg", exif=exif))
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 3))[0] > 200
    assert opened.getpixel((10, 36))[0] < 50


def test_small_and_long_images(tmp_path):
    for size in ((1, 1), (20_000, 5)):
        assert open_image(save(Image.new("RGB", size), tmp_path / "x.png")).size == size


def test_images_above_the_limit(tmp_path, monkeypatch):
    for width, height in ((20_000, 5_001), (20_000, 20_000), (2_000_000, 2_000_000)):
        path = tmp_path / "x.png"
        path.write_bytes(png_of_size(width, height))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused(path, "100,000,000")
    path.write_bytes(png_of_size(20_000, 20_000))
    with pytest.raises(ImageError, match=f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"):  # Pillow's own limit
        open_image(path, max_pixels=10**9)
    monkeypatch.setattr(reading, "MAX_PIXELS", 10)
    refused(save(Image.new("RGB", (4, 3)), tmp_path / "small.png"), "4x3", "12 pixels")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "bmp", "webp"])
def test_truncated_files(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = save(noise, tmp_path / f"x.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path)


def test_files_that_are_no_images(tmp_path):
    path = tmp_path / "x.jpg"
    refused(path, "no such file")
    refused(tmp_path, "is a folder")
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_text("Dear diary")
    refused(path, "not an image")


def test_no_program_is_started_for_a_drawing(tmp_path, monkeypatch):
    """Pillow would read it with Ghostscript, whatever its suffix says."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: pytest.fail("it is started"))
    path = tmp_path / "x.jpg"
    Image.new("RGB", (4, 4)).save(path, format="EPS")
    refused(path, "not an image")
    with pytest.raises(SampleError) as raised:
        decode_image(path.read_bytes())
    assert raised.value.reason == SkipReason.UNKNOWN_FORMAT
    with pytest.raises(SampleError):
        read_values(path.read_bytes())


def test_an_image_with_broken_exif_still_opens(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    (tmp_path / "x.jpg").write_bytes(buffer.getvalue())
    assert open_image(tmp_path / "x.jpg").size == (4, 4)


def test_finds_images_in_folders_files_and_patterns(tmp_path):
    for name in ("b.JPG", "a.png", "deep/er/c.Tiff", "notes.txt", ".hidden.png", ".git/d.png", "out/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*paths):
        images, problems = find_images([tmp_path / path for path in paths], exclude=tmp_path / "out")
        return [os.path.relpath(path, tmp_path) for path in images], len(problems)

    assert names(".") == (["a.png", "b.JPG", "deep/er/c.Tiff"], 0)
    assert names("*.p*g", "notes.txt") == (["a.png", "notes.txt"], 0)
    assert names("**/*.Tiff") == (["deep/er/c.Tiff"], 0)
    assert names("b.JPG", ".", "b.JPG") == (["b.JPG", "a.png", "deep/er/c.Tiff"], 0)
    assert names("a.png", "nothing*.png", "gone.jpg") == (["a.png"], 2)


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    path = tmp_path / "x[1].png"
    path.touch()
    assert find_images([path]) == ([path], [])


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    save(Image.new("RGB", (4, 4)), tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    images, (problem,) = find_images([""])
    assert not images and "an empty name" in str(problem)
    assert find_images(["."]) == ([Path("x.png")], [])


def test_an_empty_folder_is_a_problem(tmp_path):
    images, problems = find_images([tmp_path])
    assert not images
    assert "no images" in str(problems[0])


def test_items_are_read_ahead_in_their_order_and_no_further():
    taken, read = [], []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    def slowly(number):
        time.sleep(0.001 * (number % 3))
        read.append(number)
        return 10 * number

    results = read_ahead(slowly, items(), num_threads=2)
    assert [next(results) for _ in range(5)] == [0, 10, 20, 30, 40]
    assert len(taken) <= 5 + 3
    results.close()
    assert len(read) <= len(taken)
    assert list(read_ahead(slowly, range(7))) == [0, 10, 20, 30, 40, 50, 60]
    assert list(read_ahead(slowly, [])) == []


def test_what_reading_raises_comes_in_its_place():
    results = read_ahead(lambda number: 1 // number, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_what_the_iterable_raises_comes_behind_the_items_before():
    def items():
        yield from range(5)
        raise KeyError("no more")

    results, received = read_ahead(str, items()), []
    with pytest.raises(KeyError, match="no more"):
        for result in results:
            received.append(result)
    assert received == ["0", "1", "2", "3", "4"]


def test_an_iterable_is_not_closed():
    items = (number for number in range(9))
    results = read_ahead(str, items)
    assert next(results) == "0"
    results.close()
    assert next(items) == 3  # one was yielded, and two were read ahead


def test_an_address_is_called_one():
    address = "https://example.com/a.jpg"
    with pytest.raises(ImageError, match=f"{address}: is an address.* Download it"):
        open_image(address)
    images, (problem,) = find_images([address])
    assert not images and str(problem).startswith(f"{address}: is an address")


def test_all_suffixes_of_images_that_pillow_opens(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    kinds = ["jpg", "jfif", "JPE", "png", "gif", "bmp", "tif", "tga", "pcx", "ppm", "qoi", "dds", "ico", "webp", "AVIF"]
    kinds += ["jp2"] if features.check("jpg_2000") else []
    saved = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
    kinds = [kind for kind in kinds if f".{kind.lower()}" in saved]  # Pillow before 11.3 has no AVIF
    assert len(kinds) > 10
    for kind in kinds:
        Image.fromarray(colours).save(tmp_path / f"{kind}.{kind}")
    left_out = Counter()
    images, problems = find_images([tmp_path], left_out=left_out)
    assert sorted(path.stem for path in images) == sorted(kinds)
    assert not problems and not left_out
    assert all(open_image(path).mode == "RGB" for path in images)
    assert not image_suffixes() & {
        ".pdf",
        ".eps",
        ".ps",
        ".mpg",
        ".mpeg",
        ".wmf",
        ".emf",
        ".h5",
        ".hdf",
        ".grib",
        ".txt",
    }
    assert {".mpo", ".jp2", ".tiff", ".psd", ".fits"} <= image_suffixes()


def test_files_that_are_left_out_are_counted(tmp_path):
    for name in ("a.png", "b.TXT", "c.txt", "d.mov", "Makefile", ".hidden.txt", "deep/e.cr2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    left_out = Counter()
    assert len(find_images([tmp_path], left_out=left_out)[0]) == 1
    assert left_out == {".txt": 2, ".mov": 1, "": 1, ".cr2": 1}
    assert describe_left_out(left_out) == (
        "left out 5 files of other formats: 1 .cr2 (camera raw: convert it to TIFF), 2 .txt, "
        "1 without a suffix, 1 .mov."
    )
    assert describe_left_out(Counter()) is None
    assert describe_left_out(Counter({f".{n}": 1 for n in range(20)})).endswith(", 12 further kinds.")
    left_out = Counter()
    (problem,) = find_images([tmp_path / "*.txt"], left_out=left_out)[1]
    assert "no image matches this pattern: left out 1 file" in str(problem) and left_out == {".txt": 1}
    (problem,) = find_images([tmp_path / "deep"])[1]
    assert "no images in this folder" in str(problem) and "camera raw" in str(problem)


HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)


def test_what_opens_heic_is_named_where_it_is_missing(tmp_path):
    """Run a process in which the plugin cannot be imported."""
    (tmp_path / "phone.jpg").write_bytes(HEIC)
    (tmp_path / "x.HEIC").write_bytes(HEIC)
    (tmp_path / "y.heif").write_bytes(HEIC)
    script = """
import sys
from collections import Counter
sys.modules["pillow_heif"] = None
from samlight_hf.images.formats import describe_left_out
from samlight_hf.images.reading import find_images, open_image
left_out = Counter()
images, _ = find_images([sys.argv[1]], left_out=left_out)
print(len(images), describe_left_out(left_out))
for name in ("phone.jpg", "x.HEIC"):
    try:
        open_image(f"{sys.argv[1]}/{name}")
    except ValueError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    folder, renamed, named = result.stdout.splitlines()
    assert folder.startswith("1 left out 2 files")
    assert "1 .heic (pip install pillow-heif), 1 .heif (pip install pillow-heif)" in folder
    assert "phone.jpg" in renamed and "pip install pillow-heif" in renamed
    assert "x.HEIC" in named and "pip install pillow-heif" in named


def test_heic_is_opened_where_its_plugin_is_installed(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "x.HEIC", format="HEIF")
    (path,), _ = find_images([tmp_path])
    assert open_image(path).size == (40, 30)


def test_hints_for_avif_that_cannot_be_opened(monkeypatch):
    assert opening_hint(".tif") is None
    monkeypatch.setattr("samlight_hf.images.formats.image_suffixes", lambda: frozenset({".png"}))
    for hint in (opening_hint(".AVIF"), opening_hint(".jpg", b"\0\0\0\x20ftypavif\0\0\0\0")):
        assert "pillow>=11.3" in hint and "pillow-heif" in hint


def test_links_in_a_circle_are_one_bad_file(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "c.png")
    images, _ = find_images([tmp_path])
    assert len(images) >= 1
    refused(tmp_path / "a.png")


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["a"], "a"), (["a/x.jpg"], "a"), (["a", "b"], "."), (["a/x.jpg", "a/deep/x.jpg"], "a"), (["a/*/x.jpg"], "a"),
        (["a/x.jpg", "b/x.jpg"], "."), (["*/x.jpg"], "."), (["a", "gone.jpg", "b/no*.jpg"], "a"), (["a/../b"], "b"),
        (["gone"], None), (["a", "https://example.com/x.jpg"], "a"),
    ],
)  # fmt: skip
def test_the_folder_that_was_asked_for(tmp_path, monkeypatch, paths, expected):
    for name in ("a/x.jpg", "a/deep/x.jpg", "b/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert common_folder(paths) == (expected and Path(os.path.normpath(tmp_path / expected)))
    if "https" not in paths[-1]:
        absolute = [f"{tmp_path}/{path}" for path in paths]
        assert common_folder(absolute) == (expected and Path(os.path.normpath(tmp_path / expected)))
