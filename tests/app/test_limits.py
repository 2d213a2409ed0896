"""Uploads: formats, sizes, and messages that name no folder of the server."""

import numpy as np
import pytest
from PIL import Image

from samlight_hf.app.limits import Limits, read_upload, short_name
from samlight_hf.images.reading import ImageError
from tests.images.test_reading import png_of_size


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_usual_formats_are_read(tmp_path, suffix):
    Image.new("RGB", (5, 4), "red").save(tmp_path / f"x.{suffix}")
    image = read_upload(tmp_path / f"x.{suffix}", Limits())
    assert image.mode == "RGB" and image.size == (5, 4)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jpg", b"hello", "not an image"),
        ("drawing.svg", SVG, "not an image"),
        ("empty.png", b"", "empty"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\x00\x00", "not an image|damaged"),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        ("page.pdf", b"%PDF-1.4\n", "not an image"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=words) as raised:
        read_upload(tmp_path / name, Limits())
    assert str(raised.value).startswith(f"{name}: ") and str(tmp_path) not in str(raised.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ImageError, match=r"x\.jpg: the upload is gone"):
        read_upload(tmp_path / "x.jpg", Limits())


def test_large_files_and_large_images_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")  # 1.4 MB
    with pytest.raises(ImageError, match="1 MB, and the limit is 1 MB"):
        read_upload(tmp_path / "large.png", Limits(upload_mb=1))
    with pytest.raises(ImageError, match="490,000 pixels, and the limit is 489,999"):
        read_upload(tmp_path / "large.png", Limits(pixels=489_999))
    assert read_upload(tmp_path / "large.png", Limits(pixels=490_000)).size == (700, 700)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    with pytest.raises(ImageError, match="pixels"):
        read_upload(tmp_path / "bomb.png", Limits())


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("photo.jpg", "photo.jpg"), ("../../etc/passwd", "etc passwd"), ("a\x00b\nc.png", "a b c.png"), ("", "image"),
        ("..", "image"), ("x" * 99, "x" * 80), ("C:\\me\\x.png", "C: me x.png"), ("Käse 中.png", "Käse 中.png"),
    ],
)  # fmt: skip
def test_names_are_text(name, short):
    assert short_name(name) == short


def test_limits_are_positive():
    with pytest.raises(ValueError, match="queue=0"):
        Limits(queue=0)
