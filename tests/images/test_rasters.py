"""Windows of files are what the whole file holds, whatever its layout; levels are those of the whole file."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from samlight_hf.images import rasters
from samlight_hf.images.levels import stretch
from samlight_hf.images.rasters import ArrayRaster, open_raster
from samlight_hf.images.reading import ImageError


BOX = (33, 41, 99, 87)  # across blocks of 32 and 64
random = np.random.default_rng(0)


def pixels_of(shape, dtype=np.uint16) -> np.ndarray:
    return (random.random(shape) * 200).astype(dtype)


def window(levels: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = BOX
    return levels[..., y1:y2, x1:x2]


@pytest.mark.parametrize(
    "layout",
    [
        {"tile": (32, 64)}, {"tile": (64, 64), "compression": "zlib", "predictor": True}, {"rowsperstrip": 7}, {},
        {"tile": (64, 64), "compression": "jpeg"}, {"tile": (64, 64), "compression": "lzw"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.ome.tif", "a.svs"])
@pytest.mark.parametrize(("shape", "kind"), [((110, 130), "grey"), ((110, 130, 3), "rgb"), ((3, 110, 130), "planes")])
def test_windows_of_tiff(tmp_path, layout, name, shape, kind):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    pixels = pixels_of(shape, np.uint8 if layout.get("compression") == "jpeg" else np.uint16)
    photometric = "rgb" if kind == "rgb" else "minisblack"
    tifffile.imwrite(tmp_path / name, pixels, photometric=photometric, ome=name.endswith(".ome.tif"), **layout)
    whole = tifffile.imread(tmp_path / name)  # JPEG has changed it
    whole = whole[None] if kind == "grey" else np.moveaxis(whole, -1, 0) if kind == "rgb" else whole
    raster = open_raster(tmp_path / name)
    assert (raster.height, raster.width) == (110, 130)
    levels, valid = raster.read_levels(BOX)
    np.testing.assert_array_equal(levels, window(whole))
    assert valid.all()
    if kind != "grey":
        levels, _ = open_raster(tmp_path / name, bands=(3,)).read_levels(BOX)
        np.testing.assert_array_equal(levels, window(whole[2:]))


def test_imagej_stacks_and_axes_that_cannot_be_read(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    planes = pixels_of((3, 110, 130))
    tifffile.imwrite(tmp_path / "a.lsm", planes, imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(open_raster(tmp_path / "a.lsm").read_levels(BOX)[0], window(planes))
    tifffile.imwrite(tmp_path / "b.ome.tif", pixels_of((2, 3, 50, 60)), metadata={"axes": "ZCYX"})
    with pytest.raises(ImageError, match=r"b.ome.tif: has the axes ZCYX of 2x3x50x60: only one plane with channels"):
        open_raster(tmp_path / "b.ome.tif")


def test_a_truncated_pyramid_names_the_place(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.svs"
    tifffile.imwrite(path, pixels_of((110, 130)), tile=(32, 32))
    path.write_bytes(path.read_bytes()[:-100])
    open_raster(path).read_levels((0, 0, 32, 32))
    with pytest.raises(ImageError, match=r"a.svs: cannot be read at 96,64 to 130,110 \(tile 19 has 1948 of 2048 bytes"):
        open_raster(path).read_levels((96, 64, 130, 110))
    path.write_bytes(b"II*\0" + bytes(100))
    with pytest.raises(ImageError, match="a.svs: cannot be opened"):
        open_raster(path)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_other_files_and_arrays(tmp_path, suffix):
    pixels = pixels_of((110, 130, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    for raster in (open_raster(path), ArrayRaster(pixels), ArrayRaster(torch.from_numpy(pixels.transpose(2, 0, 1)))):
        tensor, valid = raster.read(BOX)
        np.testing.assert_array_equal(tensor, window(pixels.transpose(2, 0, 1)))
        assert tensor.dtype == torch.uint8
        assert valid.shape == (46, 66)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32])
def test_levels_are_scaled_as_those_of_small_images(tmp_path, dtype):
    """Between the percentiles of the whole file, within a level of `stretch`, which sees it at once."""
    rasterio = pytest.importorskip("rasterio")
    levels = (random.normal(3000, 500, (1, 110, 130))).astype(dtype)
    levels[0, 0, :3] = 30_000  # hot pixels, fewer than 0.5 %
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=130, height=110, count=1, dtype=dtype, nodata=-9999 if
        np.dtype(dtype).kind != "u" else 0, crs="EPSG:4326", transform=rasterio.Affine(1e-3, 0, 7, 0, -1e-3, 50),
    ) as file:  # fmt: skip
        file.write(levels)
    expected, _ = stretch(levels[0])
    tensor, _ = open_raster(tmp_path / "a.tif").read(BOX)
    difference = np.abs(tensor[0].numpy().astype(int) - window(expected))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.95 or dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.uint32])
def test_a_few_hot_levels_leave_the_others_apart(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    levels = (random.random((300, 400)) * (1 if dtype == np.float32 else 1000)).astype(dtype)
    levels[5, :3] = 4e9
    tifffile.imwrite(tmp_path / "a.tif", levels)
    low, high = open_raster(tmp_path / "a.tif").find_range()
    expected_low, expected_high = np.percentile(levels, [0.5, 99.5])
    assert low == pytest.approx(expected_low, abs=0.002 * expected_high)
    assert high == pytest.approx(expected_high, rel=0.002)


@pytest.mark.parametrize(
    ("dtype", "photometric", "shape", "words"),
    [
        (np.uint8, "miniswhite", (64, 64), None),  # GDAL has a palette of it
        (np.uint16, "miniswhite", (64, 64), "MINISWHITE"),
        (np.float32, "miniswhite", (64, 64), "MINISWHITE"),
        (np.uint16, "palette", (64, 64), "palette of uint16"),
        (np.uint16, "separated", (64, 64, 4), "CMYK"),
    ],
)
def test_kinds_of_tiff_whose_levels_are_not_brightness_are_refused(tmp_path, dtype, photometric, shape, words):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("rasterio")
    from samlight_hf.images.tiff_rasters import TiffRaster

    levels = np.full(shape, 40, dtype)
    colours = {"colormap": np.zeros((3, 65536), np.uint16)} if photometric == "palette" else {}
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric=photometric, **colours)
    with pytest.raises(ImageError, match=f"{photometric.upper()}: only grey and RGB are read in parts"):
        TiffRaster(tmp_path / "a.tif")
    if words is None:
        assert open_raster(tmp_path / "a.tif").read_levels((0, 0, 1, 1))[0].tolist() == [[[215]]] * 3
        return
    with pytest.raises(ImageError, match=f"{words}: only grey and RGB are read in parts"):
        open_raster(tmp_path / "a.tif")
    assert open_raster(tmp_path / "a.tif", bands=(1,)).read_levels((0, 0, 1, 1))[0] == 40  # as it was asked for


def test_errors_of_gdal_are_one_line(tmp_path):
    """GDAL tells of the wrong unit once it is asked for the kinds of bands, and rasterio raises its error as it is."""
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("rasterio")
    tifffile.imwrite(tmp_path / "a.tif", pixels_of((110, 130, 3)), photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        place = file.pages[0].tags["ResolutionUnit"].valueoffset
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[place] = 246
    (tmp_path / "a.tif").write_bytes(content)
    try:
        open_raster(tmp_path / "a.tif").read_levels(BOX)  # as other releases of GDAL may do
    except ImageError as error:
        assert "ResolutionUnit" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("package", ["rasterio", "tifffile"])
@pytest.mark.parametrize("kind", ["cut", "no rows in a strip"])
def test_damaged_files_are_one_line_by_either_package(tmp_path, monkeypatch, package, kind):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip(package)
    compression = None if kind == "cut" else "zlib"
    tifffile.imwrite(tmp_path / "a.tif", pixels_of((110, 130), np.uint8), rowsperstrip=7, compression=compression)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        place = file.pages[0].tags["RowsPerStrip"].valueoffset
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[place : place + 2] = (7 if kind == "cut" else 0).to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes(content[: -3000 if kind == "cut" else None])
    monkeypatch.setattr(rasters, "_is_installed", lambda name: name == package)
    with pytest.raises(ImageError, match=f"{tmp_path}.* (damaged at|cannot be opened)") as raised:
        open_raster(tmp_path / "a.tif").read_levels((0, 0, 130, 110))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("package", ["rasterio", "tifffile"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_raster_that_is_not_turned_says_so(tmp_path, monkeypatch, package, orientation):
    pytest.importorskip("tifffile")
    pytest.importorskip(package)
    monkeypatch.setattr(rasters, "_is_installed", lambda name: name == package)
    Image.fromarray(pixels_of((110, 130), np.uint8)).save(tmp_path / "a.tif", tiffinfo={274: orientation})
    raster = open_raster(tmp_path / "a.tif")
    assert (raster.height, raster.width) == (110, 130)
    told = [note for note in raster.notes if "orientation (6)" in note]
    assert len(told) == (orientation == 6)


def test_palettes_alpha_and_masks(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    options = {"driver": "GTiff", "width": 130, "height": 110, "dtype": "uint8", "crs": "EPSG:32633",
               "transform": rasterio.Affine(1, 0, 5, 0, -1, 9)}  # fmt: skip
    levels = pixels_of((4, 110, 130), np.uint8)
    with rasterio.open(tmp_path / "palette.tif", "w", count=1, photometric="palette", **options) as file:
        file.write(levels[:1])
        file.write_colormap(1, {level: (level, 255 - level, 7, 255) for level in range(256)})
    read, _ = open_raster(tmp_path / "palette.tif").read_levels(BOX)
    level = window(levels[0])
    np.testing.assert_array_equal(read, np.stack([level, 255 - level, np.full_like(level, 7)]))
    levels[3] = 255 * (levels[3] > 50)
    with rasterio.open(tmp_path / "alpha.tif", "w", count=4, photometric="rgb", alpha="yes", **options) as file:
        file.write(levels)
    raster = open_raster(tmp_path / "alpha.tif")
    read, valid = raster.read_levels(BOX)
    np.testing.assert_array_equal(read, window(levels[:3]))
    np.testing.assert_array_equal(valid, np.broadcast_to(window(levels[3]) > 0, valid.shape))
    assert raster.read(BOX)[0].numpy()[:, ~valid[0]].max() == 0


OPTIONS = {"driver": "GTiff", "width": 130, "height": 110, "crs": "EPSG:32633"}


def geotiff(path, levels: np.ndarray, **options):
    rasterio = pytest.importorskip("rasterio")
    transform = rasterio.Affine(1, 0, 5, 0, -1, 9)
    options = {**OPTIONS, "count": len(levels), "dtype": levels.dtype, "transform": transform, **options}
    with rasterio.open(path, "w", **options) as file:
        file.write(levels)
    return path


def test_a_band_without_data_does_not_count_for_the_levels(tmp_path):
    """Band 1 has none in the upper rows, and no band in the first columns."""
    levels = pixels_of((3, 110, 130), np.int16) + 1000
    levels[0, :50] = levels[:, :, :9] = -9999
    path = geotiff(tmp_path / "a.tif", levels, nodata=-9999)
    for bands in ((1, 2, 3), (1,), (3, 2, 1)):
        raster = open_raster(path, bands)
        low, high = raster.find_range()
        assert 1000 <= low < high < 1200
        read, valid = raster.read((0, 0, 130, 110))
        assert not read[:, :, :9].any() and not valid[:, :9].any()
        assert valid[:50, 9:].all() == (len(bands) == 3) and valid[50:, 9:].all()
        assert not read[bands.index(1), :50].any() and read[bands.index(1), 50:, 9:].float().mean() > 50


def test_8_bit_colours_with_a_band_at_the_nodata_value_stay(tmp_path):
    levels = pixels_of((3, 110, 130), np.uint8) + 1
    levels[1:, :50], levels[:, 50:60] = 0, 0
    read, valid = open_raster(geotiff(tmp_path / "a.tif", levels, nodata=0)).read((0, 0, 130, 110))
    np.testing.assert_array_equal(read, levels)  # pure red is a colour
    assert valid[:50].all() and not valid[50:60].any() and valid[60:].all()


@pytest.mark.parametrize(("dtype", "sentinel"), [(np.int16, -32768), (np.int16, -9999), (np.float32, -9999)])
def test_levels_that_mean_no_data_by_convention_are_those_of_small_images(tmp_path, dtype, sentinel):
    levels = (random.normal(3000, 500, (1, 110, 130))).astype(dtype)
    levels[0, :40] = sentinel
    expected, note = stretch(levels[0])
    assert "5,200 pixels without data became black" in note
    tensor, valid = open_raster(geotiff(tmp_path / "a.tif", levels)).read(BOX)
    assert np.abs(tensor[0].numpy().astype(int) - window(expected)).max() <= 1
    levels[0, 50, 50] = sentinel - 1 if sentinel > -32768 else sentinel  # a lower level: then it is one, too
    if sentinel == -9999:
        assert open_raster(geotiff(tmp_path / "b.tif", levels)).read(BOX)[1].all()
    np.testing.assert_array_equal(valid, window(np.broadcast_to(np.arange(110)[:, None] >= 40, (110, 130))))


def test_bands_of_several_dtypes(tmp_path):
    levels = pixels_of((3, 110, 130), np.uint16) + 300
    geotiff(tmp_path / "deep.tif", levels)
    geotiff(tmp_path / "flat.tif", levels[:1].astype(np.uint8))
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{number}"><SimpleSource><SourceFilename relativeToVRT="1">{name}'
        f"</SourceFilename><SourceBand>{source}</SourceBand></SimpleSource></VRTRasterBand>"
        for number, (kind, name, source) in enumerate(
            [("Byte", "flat.tif", 1), ("UInt16", "deep.tif", 2), ("Int16", "deep.tif", 3)], 1
        )
    )
    path = tmp_path / "mixed.vrt"
    path.write_text(f'<VRTDataset rasterXSize="130" rasterYSize="110">{bands}</VRTDataset>')
    raster = open_raster(path)
    assert raster.dtype == np.int32
    read, _ = raster.read_levels(BOX)
    expected = np.stack([levels[0].astype(np.uint8), *levels[1:]])
    np.testing.assert_array_equal(read, window(expected.astype(np.int32)))


@pytest.mark.parametrize("has_place", [True, False])
def test_the_place_of_a_smaller_level(tmp_path, has_place):
    rasterio = pytest.importorskip("rasterio")
    options = {} if has_place else {"transform": None, "crs": None}
    path = geotiff(tmp_path / "a.tif", pixels_of((1, 110, 130), np.uint8), **options)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4])
    whole, small = open_raster(path), open_raster(path, level=2)
    assert (small.height, small.width) == (28, 33) and small.notes == whole.notes
    corners = []
    for raster in (small, whole):
        a, b, c, d, e, f = raster.transform or (1, 0, 0, 0, 1, 0)
        x, y = raster.width, raster.height
        corners.append((a * x + b * y + c, d * x + e * y + f))
    np.testing.assert_allclose(*corners)
    assert (whole.transform is None) == (not has_place)


def test_files_and_levels_that_cannot_be(tmp_path):
    reads_tiff = any(map(find_spec, ("rasterio", "tifffile")))  # an extra, which Pillow stands in for
    (tmp_path / "empty.tif").touch()
    (tmp_path / "damaged.tif").write_bytes(b"II*\0" + bytes(50))
    Image.fromarray(pixels_of((10, 10, 3), np.uint8)).save(tmp_path / "a.png")
    for path, level, message in (
        ("none.tif", 0, "no such file"), ("empty.tif", 0, "the file is empty"), (".", 0, "is a folder"),
        ("damaged.tif", 0, "cannot be opened" if reads_tiff else "not an image"), ("a.png", -1, "level=-1 must be 0"),
        ("a.png", 1, "has no level 1 that can be read: use level 0"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=message):
            open_raster(tmp_path / path, level=level)
    with pytest.raises(ImageError, match="bands 4 cannot be read: give one or three numbers from 1 to 3"):
        open_raster(tmp_path / "a.png", bands=(4,))
