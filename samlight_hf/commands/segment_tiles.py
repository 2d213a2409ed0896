"""`samlight segment --tile`: images of any size in overlapping tiles, read in windows and resumed tile by tile."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .options import add_tile_options, parse_not_negative, tiles_from_options
from .result_folder import Place, ResultFolder, identity_of
from .summary import Row, Summary, count, report_skipped, telling_where


if TYPE_CHECKING:
    from ..images.rasters import Raster
    from ..inference.tile_merging import TiledObject
    from ..inference.tiles import Tile, TileGrid
    from ..masks.results import GeneratedMasks
    from .segment_run import EverythingSegmenter


OBJECT_FORMATS = ("geojson", "gpkg")
_FORMATS = ("overlay", "coco", *OBJECT_FORMATS)
_PREVIEW_SIDE = 2048  # of an overlay, in pixels
_MAX_PREVIEWED = 1000


def add_tile_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("large images and small objects: everything mode in tiles (docs/sizes.md)")
    add_tile_options(group)
    group.add_argument(
        "--bands", type=_parse_bands, metavar="R,G,B",
        help="numbers of three bands, or of one, from 1 (red, green and blue as the file names them, else the first)",
    )  # fmt: skip
    group.add_argument("--level", type=parse_not_negative, default=0, metavar="N", help="of a pyramid (0, full size)")


def check_tile_options(args: argparse.Namespace):
    """Raise ArgumentTypeError for options that do not go together."""
    tiles_from_options(args)
    if args.tile is None:
        for option, value in (("--bands", args.bands), ("--level", args.level or None)):
            if value is not None:
                raise argparse.ArgumentTypeError(f"{option} is for tiles: give --tile too, such as --tile 1024.")
        if args.format in OBJECT_FORMATS:
            raise argparse.ArgumentTypeError(f"--format {args.format} is for tiles: give --tile too, such as 1024.")
        return
    if args.box or args.point or args.points or args.prompts:
        raise argparse.ArgumentTypeError("--tile is for everything mode: leave boxes, points and prompts out.")
    if args.min_hole_area or args.min_region_area:
        raise argparse.ArgumentTypeError("--min-hole-area and --min-region-area are not possible with --tile.")
    if args.max_masks is not None:
        raise argparse.ArgumentTypeError("--max-masks is not possible with --tile: use the thresholds or --min-area.")
    if args.format not in _FORMATS:
        raise argparse.ArgumentTypeError(
            f"--format {args.format} keeps each mask at the image's size, which is too much for large images: with "
            f"--tile use {', '.join(_FORMATS)}."
        )
    if args.format == "gpkg":
        from ..masks.object_files import check_geopackage

        check_geopackage()


def tile_settings(args: argparse.Namespace) -> dict:
    """Return the options that results depend on, for the note of a folder of results."""
    tiles = tiles_from_options(args)
    return {
        "--tile": args.tile,
        "--overlap": tiles and tiles.overlap,
        "--bands": args.bands and list(args.bands),
        "--level": args.level,
    }


def run_tiled_jobs(
    places: Sequence[Place], segmenter: "EverythingSegmenter", args: argparse.Namespace, summary: Summary,
    results: ResultFolder, replaced: Collection[Place], shown: Callable[[Path], str] = str,
):  # fmt: skip
    """Segment images one after the other, add them to the summary, and note each finished result.

    An image that cannot be read or written is skipped, and its finished tiles are kept for `--resume`.

    Args:
        places: the images, and where their results go.
        segmenter: segments a tile.
        summary: gets a row for each image.
        results: the folder of results, whose note has been begun.
        replaced: places with an earlier result.
        shown: returns how messages name an image.
    """
    from .summary import DiskError

    begin = time.perf_counter()
    for place in places:
        try:
            row = _run_image(place, segmenter, args, results.settings or {}, shown(place.image))
        except DiskError:
            raise
        except Exception as error:
            report_skipped(error, place.image, shown(place.image))
            summary.skipped += 1
            if not any(_tile_folder(place).glob("*.npz")):  # nothing to go on from
                shutil.rmtree(_tile_folder(place), ignore_errors=True)
            continue
        with telling_where(results.note, ends_the_run=True):
            results.finish(place)
        shutil.rmtree(_tile_folder(place), ignore_errors=True)
        summary.add(row, None)
        summary.replaced += place in replaced
    summary.seconds = time.perf_counter() - begin


def _run_image(place: Place, segmenter, args: argparse.Namespace, settings: dict, shown: str) -> Row:
    from ..images.rasters import open_raster
    from ..images.reading import ImageError
    from ..inference.tile_merging import merge_tiles
    from ..inference.tiles import TileGrid, segment_tiles

    start = time.perf_counter()
    raster = open_raster(place.image, args.bands, args.level)
    try:
        for note in raster.notes:
            print(f"samlight: {shown}: {note}.", file=sys.stderr)
        if raster.dtype.kind != "b" and raster.dtype != np.uint8:
            low, high = raster.find_range()
            print(f"samlight: {shown}: levels {low:.6g} to {high:.6g} became 0 to 255.", file=sys.stderr)
        grid = TileGrid(raster.height, raster.width, tiles_from_options(args))
        identity = [settings, identity_of(place.image), grid.shape, raster.bands, raster.level_range]
        store = FolderStore(_tile_folder(place), identity, keep=args.resume)
        with _progress(grid, store, place.image.name) as bar:
            generate = lambda pixels: segmenter.generator.generate(pixels, segmenter.settings)  # noqa: E731
            segment_tiles(generate, raster, grid, store, bar)
        if all(store.is_empty(tile) for tile in grid) and not _has_data(raster, grid):
            shutil.rmtree(store.folder, ignore_errors=True)
            raise ImageError(f"{place.image}: holds no data at all.")
        objects = merge_tiles(grid, store, segmenter.settings.crops_nms_thresh)
        large = (one for one in objects if one.mask.area >= args.min_area)
        number = _write(place, args.format, raster, large)
        size = (raster.width, raster.height)
    finally:
        raster.close()
    tiles = f"everything, {count(len(grid), 'tile')}"
    return Row(shown, size, tiles, number, time.perf_counter() - start, place.output)


def _write(place: Place, file_format: str, raster: "Raster", objects: "Iterator[TiledObject]") -> int:
    from ..masks import object_files

    where = object_files.Place((raster.width, raster.height), raster.transform, raster.crs, raster.epsg)
    with telling_where(place.output):
        place.output.parent.mkdir(parents=True, exist_ok=True)
        if file_format == "overlay":
            return _write_preview(place.output, raster, objects)
        return object_files.write_objects(place.output, file_format, place.name, where, objects)


def _write_preview(path: Path, raster: "Raster", objects: "Iterator[TiledObject]") -> int:
    """Write a small image under the largest masks, and return the number of all masks."""
    from dataclasses import replace

    from PIL import Image

    from ..inference.tile_merging import generated_masks
    from ..masks.drawing import draw_overlay
    from ..utils.atomic_files import atomic_write

    step = -(-max(raster.width, raster.height) // _PREVIEW_SIDE)
    small = [replace(one, mask=one.mask.thinned(step)) for one in objects]
    shown = sorted((one for one in small if len(one.mask.spans)), key=lambda one: -one.mask.area)[:_MAX_PREVIEWED]
    image = Image.fromarray(_thinned_pixels(raster, step))
    overlay = draw_overlay(image, generated_masks(shown, image.height, image.width))
    atomic_write(path, lambda aside: overlay.save(aside, format="PNG", compress_level=4))
    if step > 1 or len(shown) < len(small):
        print(f"{path}: one pixel in {step} and the {len(shown)} largest masks; --format coco or gpkg keeps all.")
    return len(small)


def _thinned_pixels(raster: "Raster", step: int) -> np.ndarray:
    """Return every `step`-th pixel of the image, uint8 (h, w, 3), read in strips."""
    rows = max(1, (1 << 22) // (raster.width * step)) * step
    strips = []
    for top in range(0, raster.height, rows):
        pixels, _ = raster.read((0, top, raster.width, min(top + rows, raster.height)))
        strips.append(pixels[:, ::step, ::step].permute(1, 2, 0).numpy())
    return np.concatenate(strips)


def _has_data(raster: "Raster", grid: "TileGrid") -> bool:
    return any(raster.read_levels(tile.box_xyxy)[1].any() for tile in grid)


def _tile_folder(place: Place) -> Path:
    from ..utils.atomic_files import fit_name

    return place.output.with_name(fit_name(f".{place.output.name}", ".tiles", place.output.parent))


def _progress(grid: "TileGrid", store: "FolderStore", name: str):
    from tqdm import tqdm

    done = sum(store.has(tile) for tile in grid)
    if done:
        print(f"samlight: {name}: {done} of {count(len(grid), 'tile')} done before.", file=sys.stderr)
    return tqdm(total=len(grid), initial=done, desc=name, unit="tile", leave=False, delay=2, disable=None)


def _parse_bands(text: str) -> tuple[int, ...]:
    try:
        bands = tuple(int(number) for number in text.split(","))
    except ValueError:
        bands = ()
    if len(bands) not in (1, 3) or min(bands) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not R,G,B, one or three numbers of bands from 1.")
    return bands


class FolderStore:
    """Masks of finished tiles in files, from which an interrupted run goes on; see `inference.tiles.TileStore`.

    Args:
        folder: created where it is missing.
        identity: what the tiles depend on, as JSON can hold it.
        keep: whether finished tiles of the same identity are kept; others are removed.
    """

    def __init__(self, folder: Path, identity, keep: bool):
        self.folder = folder
        note, text = folder / "identity.json", json.dumps(identity)
        if not (keep and note.is_file() and note.read_text(encoding="utf-8") == text):
            shutil.rmtree(folder, ignore_errors=True)
            with telling_where(folder):
                folder.mkdir(parents=True)
                note.write_text(text, encoding="utf-8")

    def has(self, tile: "Tile") -> bool:
        return self._path(tile).is_file()

    def put(self, tile: "Tile", masks: "GeneratedMasks") -> None:
        from ..utils.atomic_files import atomic_write

        arrays = {name: values for name, values in vars(masks).items() if name != "masks"}
        lengths = masks.masks
        arrays |= {
            "runs": lengths.runs.astype(np.int32),
            "offsets": lengths.offsets,
        }  # a tile is small
        arrays["size"] = np.array([lengths.height, lengths.width])
        with telling_where(self._path(tile)):
            atomic_write(self._path(tile), lambda aside: _save(aside, arrays))

    def get(self, tile: "Tile") -> "GeneratedMasks":
        from ..masks.results import GeneratedMasks
        from ..masks.rle import RunLengthMasks

        with np.load(self._path(tile)) as file:
            arrays = dict(file)
        height, width = arrays.pop("size").tolist()
        masks = RunLengthMasks(height, width, arrays.pop("runs").astype(np.int64), arrays.pop("offsets"))
        return GeneratedMasks(masks=masks, **arrays)

    def is_empty(self, tile: "Tile") -> bool:
        """Return whether a finished tile has no masks."""
        return not len(self.get(tile))

    def _path(self, tile: "Tile") -> Path:
        return self.folder / f"{tile.row:05}_{tile.column:05}.npz"


def _save(path: Path, arrays: dict):
    with path.open("wb") as file:
        np.savez(file, **arrays)
