"""`samlight segment --tile`: results where the objects are, resuming tile by tile, and input that cannot be."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samlight_hf.commands import cli
from samlight_hf.commands.segment_tiles import FolderStore
from samlight_hf.images import rasters
from samlight_hf.inference import mask_generation
from samlight_hf.masks.rle import RunLengthMasks
from tests.inference.test_tiles import all_right, shapes


TILES = ["--tile", "64", "--overlap", "16", "--device", "cpu", "--points-per-side", "2"]
KEEP_ALL = ["--pred-iou-thresh", "0", "--stability-score-thresh", "0"]


@pytest.fixture
def samlight(capsys, checkpoint):
    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(["segment", *map(str, arguments), "--model", checkpoint])
        stdout, stderr = capsys.readouterr()
        assert "Traceback" not in stdout + stderr
        return status, stdout, stderr

    return run


@pytest.fixture
def exact(monkeypatch):
    """Segment by colour instead of by the model, so that the right masks are known; return the tiles that were seen."""
    tiles = []

    def generate(self, image, settings, *args, **kwargs):
        tiles.append(image)
        return all_right(image)

    monkeypatch.setattr(mask_generation.MaskGenerator, "generate", generate)
    return tiles


@pytest.fixture
def image(tmp_path):
    pixels, truth = shapes(160, 112)
    path = tmp_path / "shapes.png"
    Image.fromarray(pixels).save(path)
    return path, truth


def raster_file(path: Path, levels: np.ndarray, **options) -> Path:
    """Write a GeoTIFF of (bands, h, w): half a metre a pixel, in UTM 33 unless said."""
    rasterio = pytest.importorskip("rasterio")
    count, height, width = levels.shape
    options = {
        "crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000), "tiled": True,
        "blockxsize": 32, "blockysize": 32, **options,
    }  # fmt: skip
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=levels.dtype, **options
    ) as file:
        file.write(levels)
    return path


def masks_of_coco(path: Path) -> list[np.ndarray]:
    from pycocotools import mask as coco_mask

    document = json.loads(path.read_text())
    return [coco_mask.decode(annotation["segmentation"]).astype(bool) for annotation in document["annotations"]]


def rasterized(geometries: list[dict], transform, shape) -> list[np.ndarray]:
    from rasterio.features import rasterize

    return [rasterize([geometry], shape, transform=transform).astype(bool) for geometry in geometries]


def as_set(masks) -> set[bytes]:
    return {np.ascontiguousarray(mask).tobytes() for mask in masks}


def test_coco_has_each_object_once(samlight, exact, image, tmp_path):
    path, truth = image
    status, out, _ = samlight(path, "--out", tmp_path / "out", "--format", "coco", *TILES)
    assert status == 0
    assert "everything, 6 tiles" in out
    found = masks_of_coco(tmp_path / "out" / "shapes.json")
    assert as_set(found) == as_set(truth)
    assert len(found) == len(truth)
    assert not list((tmp_path / "out").glob(".*.tiles"))


def test_the_model_itself(samlight, image, tmp_path):
    path, _ = image
    status, _, _ = samlight(path, "--out", tmp_path / "out", "--format", "coco", *TILES, *KEEP_ALL)
    assert status == 0
    document = json.loads((tmp_path / "out" / "shapes.json").read_text())
    assert document["images"][0]["width"] == 160
    assert len({tuple(annotation["crop_box"]) for annotation in document["annotations"]}) > 1


@pytest.mark.parametrize("file_format", ["gpkg", "geojson"])
@pytest.mark.parametrize("rotation", [0, 25])
def test_polygons_lie_where_the_objects_are(samlight, exact, tmp_path, file_format, rotation):
    rasterio = pytest.importorskip("rasterio")
    pyogrio = pytest.importorskip("pyogrio")
    pixels, truth = shapes(160, 112)
    transform = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000) @ rasterio.Affine.rotation(rotation)
    path = raster_file(tmp_path / "a.tif", pixels.transpose(2, 0, 1), transform=transform)
    status, _, err = samlight(path, "--out", tmp_path / "out", "--format", file_format, *TILES)
    assert (status, err) == (0, "")
    result = tmp_path / "out" / f"a.{file_format}"
    assert pyogrio.read_info(result)["crs"] == "EPSG:32633"
    geometries = geometries_of(result, tmp_path)
    assert as_set(rasterized(geometries, transform, (112, 160))) == as_set(truth)
    assert len(geometries) == len(truth)
    _, _, _, fields = pyogrio.raw.read(result, columns=["area"])
    assert sorted(fields[0]) == sorted(mask.sum() * 0.25 for mask in truth)
    assert sorted(os.listdir(tmp_path / "out")) == [".samlight.json", f"a.{file_format}"]


def geometries_of(path: Path, tmp_path: Path) -> list[dict]:
    """Read polygons by pyogrio, and return them as GeoJSON has them."""
    import pyogrio

    meta, _, geometry, fields = pyogrio.raw.read(path)
    copy = tmp_path / "copy.geojson"
    pyogrio.raw.write(
        copy, geometry, fields, list(meta["fields"]), driver="GeoJSON", geometry_type="MultiPolygon", crs=meta["crs"]
    )
    return [feature["geometry"] for feature in json.loads(copy.read_text())["features"]]


def test_bands_and_levels_of_the_whole_file(samlight, exact, tmp_path):
    """Levels of 16 bits: the same ones in every tile. Band 2 is hidden by --bands."""
    pixels, _ = shapes(160, 112)
    levels = np.zeros((4, 112, 160), dtype=np.uint16)
    levels[[0, 2, 3]] = pixels.transpose(2, 0, 1).astype(np.uint16) * 16 + 100
    levels[1] = 65_000
    levels[:, :8] = 65_000  # 7 % of the pixels, so that one level is 255 in all bands
    path = raster_file(tmp_path / "a.tif", levels)
    status, _, err = samlight(path, "--out", tmp_path / "out", "--format", "coco", "--bands", "1,3,4", *TILES)
    assert status == 0
    assert "levels 100 to 65000 became 0 to 255" in err
    assert len(exact) == 6
    scaled = np.rint((levels[[0, 2, 3]].astype(float) - 100) * 255 / 64_900)
    np.testing.assert_array_equal(exact[0], scaled[:, :64, :64])
    np.testing.assert_array_equal(exact[-1], scaled[:, 48:, 96:])


def test_pixels_without_data_are_in_no_mask(samlight, exact, tmp_path):
    levels = np.full((1, 64, 112), 500, dtype=np.uint16)
    levels[:, :, 56:] = 9999
    levels[:, 20:40, 40:70] = 800
    levels[:, 30:40] = 0
    path = raster_file(tmp_path / "a.tif", levels, nodata=0)
    assert samlight(path, "--out", tmp_path / "out", "--format", "coco", *TILES)[0] == 0
    masks = masks_of_coco(tmp_path / "out" / "a.json")
    assert masks
    assert not any(mask[30:40].any() for mask in masks)


def test_all_nodata(samlight, exact, tmp_path):
    for dtype in (np.uint16, np.uint8, np.float32):
        path = raster_file(tmp_path / "a.tif", np.zeros((1, 70, 70), dtype=dtype), nodata=0)
        status, _, err = samlight(path, "--out", tmp_path / "out", "--format", "coco", *TILES)
        assert status == 1
        assert "a.tif: holds no data at all." in err
    nan = raster_file(tmp_path / "a.tif", np.full((1, 70, 70), np.nan, dtype=np.float32))
    assert "holds no data at all." in samlight(nan, "--out", tmp_path / "out", "--format", "coco", *TILES)[2]


def test_rasters_without_a_place_on_the_earth(samlight, exact, tmp_path):
    rasterio, pyogrio = pytest.importorskip("rasterio"), pytest.importorskip("pyogrio")
    pixels, truth = shapes(160, 112)
    no_crs = raster_file(tmp_path / "no_crs.tif", pixels.transpose(2, 0, 1), crs=None)
    status, _, err = samlight(no_crs, "--out", tmp_path / "out", "--format", "gpkg", *TILES)
    assert status == 0
    assert "names no coordinate system (CRS), and results are in the units of its transform" in err
    result = tmp_path / "out" / "no_crs.gpkg"
    assert pyogrio.read_info(result)["crs"] is None or "Undefined" in pyogrio.read_info(result)["crs"]
    transform = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)
    assert as_set(rasterized(geometries_of(result, tmp_path), transform, (112, 160))) == as_set(truth)
    nowhere = raster_file(tmp_path / "nowhere.tif", pixels.transpose(2, 0, 1), crs=None, transform=None)
    status, _, err = samlight(nowhere, "--out", tmp_path / "out", "--format", "geojson", *TILES)
    assert status == 0
    assert "has no place on the earth, and results are in pixels" in err
    features = json.loads((tmp_path / "out" / "nowhere.geojson").read_text())
    assert "crs" not in features
    shapes_found = [feature["geometry"] for feature in features["features"]]
    assert as_set(rasterized(shapes_found, rasterio.Affine.identity(), (112, 160))) == as_set(truth)


def test_a_coordinate_system_without_a_number_needs_a_geopackage(samlight, exact, tmp_path):
    pyogrio = pytest.importorskip("pyogrio")
    own = "+proj=tmerc +lat_0=3 +lon_0=7.5 +k=0.9 +ellps=WGS84 +units=m"
    path = raster_file(tmp_path / "a.tif", shapes(64, 64)[0].transpose(2, 0, 1), crs=own)
    status, _, err = samlight(path, "--out", tmp_path / "out", "--format", "geojson", *TILES)
    assert status == 1
    assert "no number in EPSG's list, by which GeoJSON could name it: use --format gpkg" in err
    assert samlight(path, "--out", tmp_path / "out", "--format", "gpkg", *TILES)[0] == 0
    assert "7.5" in pyogrio.read_info(tmp_path / "out" / "a.gpkg")["crs"]


def test_a_truncated_raster_is_skipped_and_its_tiles_stay(samlight, exact, tmp_path):
    pixels, truth = shapes(160, 112)
    path = raster_file(tmp_path / "a.tif", pixels.transpose(2, 0, 1), blockysize=16, blockxsize=16, interleave="pixel")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])  # of the last tile
    other = raster_file(tmp_path / "b.tif", pixels.transpose(2, 0, 1))
    status, _, err = samlight(path, other, "--out", tmp_path / "out", "--format", "coco", *TILES)
    assert status == 0  # the other image is done
    assert "a.tif: truncated or damaged at" in err
    assert as_set(masks_of_coco(tmp_path / "out" / "b.json")) == as_set(truth)
    assert not (tmp_path / "out" / "a.json").exists()
    assert list((tmp_path / "out" / ".a.json.tiles").glob("*.npz"))
    path.write_bytes(whole)  # another file by its size: all tiles are segmented again
    assert samlight(path, other, "--out", tmp_path / "out", "--format", "coco", "--resume", *TILES)[0] == 0
    assert as_set(masks_of_coco(tmp_path / "out" / "a.json")) == as_set(truth)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_resuming_tile_by_tile(samlight, exact, image, tmp_path, monkeypatch, interrupt):
    path, truth = image
    put, finished = FolderStore.put, []

    def put_three(self, tile, masks):
        if len(finished) == 3:
            raise interrupt
        finished.append(tile)
        put(self, tile, masks)

    from samlight_hf.commands import segment_tiles

    if interrupt is KeyboardInterrupt:
        monkeypatch.setattr(FolderStore, "put", put_three)
    else:
        save = segment_tiles._save

        def save_three(aside, arrays):
            if len(finished) == 3:
                raise interrupt
            finished.append(aside)
            save(aside, arrays)

        monkeypatch.setattr(segment_tiles, "_save", save_three)
    options = [path, "--out", tmp_path / "out", "--format", "coco", *TILES]
    status, _, err = samlight(*options)
    assert status == (130 if interrupt is KeyboardInterrupt else 1)
    assert "--resume" in err
    monkeypatch.setattr(FolderStore, "put", put)
    if interrupt is not KeyboardInterrupt:
        monkeypatch.setattr(segment_tiles, "_save", save)
    exact.clear()
    status, _, err = samlight(*options, "--resume")
    assert status == 0
    assert "3 of 6 tiles done before" in err
    assert len(exact) == 3
    assert as_set(masks_of_coco(tmp_path / "out" / "shapes.json")) == as_set(truth)
    assert "1 image done before" in samlight(*options, "--resume")[1]
    exact.clear()
    status, _, err = samlight(*options[:-2], "--points-per-side", "3", "--resume")
    assert status == 2
    assert "--points-per-side was 2 and is 3" in err
    assert samlight(*options)[0] == 0  # without --resume all tiles are segmented again
    assert len(exact) == 6


@pytest.mark.slow
def test_a_disk_that_is_full(checkpoint, image, tmp_path):
    """A limit of the size of files stands for the disk: the process gets the error of the system itself."""
    path, _ = image
    options = [path, "--out", tmp_path / "out", "--format", "coco", *TILES, *KEEP_ALL, "--model", checkpoint]
    code = "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from samlight_hf.cli import main; "
    command = [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", "segment", *map(str, options)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # noqa: E731
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "shapes.json").exists()


@contextmanager
def files_up_to(num_bytes: int):
    """Let no file of this process grow beyond a size: the system's own error, as of a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("file_format", ["coco", "geojson", "gpkg"])
def test_a_disk_that_fills_up_with_the_result_alone(samlight, exact, image, tmp_path, file_format):
    """The tiles fit, the result does not: nothing is left of it, and the tiles are not segmented again."""
    if file_format == "gpkg":
        pytest.importorskip("pyogrio")
    path, truth = image
    options = [path, "--out", tmp_path / "out", "--format", file_format, *TILES]
    with files_up_to(4000):
        status, _, err = samlight(*options)
    assert status == 1
    (place,) = [line for line in err.splitlines() if "cannot be written" in line]
    assert f"shapes.{file_format.replace('coco', 'json')} cannot be written: File too large" in place
    assert len(exact) == 6
    left = {name for name in os.listdir(tmp_path / "out") if not name.endswith(".tiles")}
    assert left <= {".samlight.json"}
    exact.clear()
    assert samlight(*options, "--resume")[0] == 0
    assert not exact
    if file_format == "coco":
        assert as_set(masks_of_coco(tmp_path / "out" / "shapes.json")) == as_set(truth)


def test_a_tile_larger_than_the_image(samlight, exact, image, tmp_path):
    path, truth = image
    options = [path, "--out", tmp_path / "out", "--format", "coco", "--device", "cpu"]
    status, out, _ = samlight(*options, "--tile", "100000")
    assert status == 0
    assert "everything, 1 tile" in out
    assert len(exact) == 1
    assert as_set(masks_of_coco(tmp_path / "out" / "shapes.json")) == as_set(truth)


def test_pyramids_and_levels(samlight, exact, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels, truth = shapes(160, 112)
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels.repeat(2, 0).repeat(2, 1), subifds=1, tile=(32, 32), photometric="rgb", compression="zlib")
        file.write(pixels, subfiletype=1, tile=(32, 32), photometric="rgb", compression="zlib")
    status, _, _ = samlight(path, "--out", tmp_path / "out", "--format", "coco", "--level", "1", *TILES)
    assert status == 0
    assert as_set(masks_of_coco(tmp_path / "out" / "slide.ome.json")) == as_set(truth)
    assert samlight(path, "--out", tmp_path / "out", "--format", "geojson", "--level", "1", *TILES)[0] == 0
    feature = json.loads((tmp_path / "out" / "slide.ome.geojson").read_text())["features"][0]
    x, y = np.array(feature["geometry"]["coordinates"][0][0]).max(axis=0)
    assert (x, y) == (320, 14)  # the bar from side to side, in pixels of the full size
    status, _, err = samlight(path, "--out", tmp_path / "out", "--format", "coco", "--level", "2", *TILES)
    assert status == 1
    assert "has no level 2: its last level is 1" in err


def test_an_overlay_of_a_line(samlight, exact, tmp_path, monkeypatch):
    from samlight_hf.commands import segment_tiles

    monkeypatch.setattr(segment_tiles, "_PREVIEW_SIDE", 80)
    Image.fromarray(shapes(400, 112)[0][:1]).save(tmp_path / "a.png")
    status, _, err = samlight(tmp_path / "a.png", "--out", tmp_path / "out", *TILES)
    assert status == 0, err
    assert Image.open(tmp_path / "out" / "a_masks.png").size == (80, 1)


@pytest.mark.parametrize("name", ["gpkg_scene", "sqlite_a", "GPKG", "rtree_x", "a b'\""])
def test_a_geopackage_of_any_name(samlight, exact, image, tmp_path, name):
    pyogrio = pytest.importorskip("pyogrio")
    path = image[0].rename(tmp_path / f"{name}.png")
    status, _, err = samlight(path, "--out", tmp_path / "out", "--format", "gpkg", *TILES)
    assert status == 0, err
    assert pyogrio.read_info(tmp_path / "out" / f"{name}.gpkg")["features"] == len(image[1])


def test_a_mosaic_whose_source_has_changed_begins_anew(samlight, exact, tmp_path):
    pixels, _ = shapes(160, 112)
    source = raster_file(tmp_path / "source.tif", pixels.transpose(2, 0, 1))
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename relativeToVRT="1">source.tif'
        f"</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    path = tmp_path / "mosaic.vrt"
    path.write_text(f'<VRTDataset rasterXSize="160" rasterYSize="112">{bands}</VRTDataset>')
    command = [path, "--out", tmp_path / "out", "--format", "coco", "--resume", *TILES]
    assert samlight(*command)[0] == 0 and len(exact) == 6
    assert samlight(*command)[0] == 0 and len(exact) == 6
    raster_file(source, pixels.transpose(2, 0, 1)[:, ::-1])
    assert samlight(*command)[0] == 0 and len(exact) == 12


def test_an_image_that_cannot_be_leaves_no_tiles(samlight, exact, tmp_path):
    empty = raster_file(tmp_path / "empty.tif", np.zeros((1, 70, 70), dtype=np.uint16), nodata=0)
    (tmp_path / "damaged.tif").write_bytes(empty.read_bytes()[:400])
    status, _, _ = samlight(empty, tmp_path / "damaged.tif", "--out", tmp_path / "out", "--format", "coco", *TILES)
    assert status == 1
    assert not list((tmp_path / "out").glob(".*.tiles"))


def test_overlay_is_small(samlight, exact, tmp_path, monkeypatch):
    from samlight_hf.commands import segment_tiles

    monkeypatch.setattr(segment_tiles, "_PREVIEW_SIDE", 80)
    Image.fromarray(shapes(160, 112)[0]).save(tmp_path / "a.png")
    status, out, _ = samlight(tmp_path / "a.png", "--out", tmp_path / "out", *TILES)
    assert status == 0
    assert "one pixel in 2" in out
    assert Image.open(tmp_path / "out" / "a_masks.png").size == (80, 56)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tile", "64", "--overlap", "64"], "overlap=64 of tiles must be smaller than their size=64"),
        (["--tile", "64", "--overlap", "100"], "overlap=100 of tiles must be smaller than their size=64"),
        (["--tile", "0"], "'0' is not a positive integer"),
        (["--overlap", "16"], "--overlap is for tiles: give --tile too"),
        (["--bands", "1"], "--bands is for tiles"),
        (["--level", "1"], "--level is for tiles"),
        (["--format", "gpkg"], "--format gpkg is for tiles"),
        (["--tile", "64", "--box", "1,2,3,4"], "leave boxes, points and prompts out"),
        (["--tile", "64", "--points", "3,4 5,6,0"], "leave boxes, points and prompts out"),
        (["--tile", "64", "--min-hole-area", "9"], "--min-region-area are not possible with --tile"),
        (["--tile", "64", "--max-masks", "4"], "--max-masks is not possible with --tile"),
        (["--tile", "64", "--format", "npz"], "with --tile use overlay, coco, geojson, gpkg"),
        (["--tile", "64", "--bands", "1,2"], "'1,2' is not R,G,B"),
        (["--tile", "64", "--bands", "0,1,2"], "is not R,G,B"),
    ],
)
def test_wrong_options(samlight, image, tmp_path, options, message):
    status, _, err = samlight(image[0], "--out", tmp_path / "out", *options)
    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_bands_that_the_file_does_not_have(samlight, tmp_path, image):
    status, _, err = samlight(image[0], "--out", tmp_path / "out", "--format", "coco", "--bands", "4,2,1", *TILES)
    assert status == 1
    assert "bands 4,2,1 cannot be read: give one or three numbers from 1 to 3, the bands of this file" in err


def test_a_missing_extra_is_named(samlight, tmp_path, monkeypatch):
    path = raster_file(tmp_path / "a.tif", np.ones((1, 70, 70), dtype=np.uint8))
    monkeypatch.setattr(rasters, "_is_installed", lambda package: False)
    _, _, err = samlight(path, "--out", tmp_path / "out", "--format", "coco", *TILES)
    assert "a.tif: is a GeoTIFF and needs rasterio: pip install 'samlight-hf[geo]'." in err
    (tmp_path / "b.svs").write_bytes(path.read_bytes())
    _, _, err = samlight(tmp_path / "b.svs", "--out", tmp_path / "out", "--format", "coco", *TILES)
    assert "b.svs: needs tifffile: pip install 'samlight-hf[tiff]'." in err
    monkeypatch.setitem(sys.modules, "pyogrio.raw", None)
    _, _, err = samlight(path, "--out", tmp_path / "out", "--format", "gpkg", *TILES)
    assert "--format gpkg needs pyogrio: pip install 'samlight-hf[geo]'." in err


def test_masks_of_a_tile_survive_the_file(tmp_path):
    from samlight_hf.inference.tiles import Tile

    masks = all_right(torch.from_numpy(shapes(64, 64)[0].transpose(2, 0, 1).copy()))
    store, tile = FolderStore(tmp_path / "tiles", ["identity"], keep=True), Tile(0, 1, (0, 0, 64, 64))
    store.put(tile, masks)
    again = FolderStore(tmp_path / "tiles", ["identity"], keep=True)
    assert again.has(tile)
    assert isinstance(again.get(tile).masks, RunLengthMasks)
    assert again.get(tile).masks.to_coco() == masks.masks.to_coco()
    np.testing.assert_array_equal(again.get(tile).points_xy, masks.points_xy)
    assert not FolderStore(tmp_path / "tiles", ["another"], keep=True).has(tile)
