"""Files of the objects of large images, written one object after another: COCO's JSON, GeoJSON and GeoPackage.

Polygons follow the edges of pixels exactly. Their coordinates are those of the raster's coordinate system, or pixels of
the image, x to the right and y down, where it has no place on the earth.
"""

import glob
import json
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.atomic_files import atomic_write
from ..utils.messages import one_line
from .rle import compress_runs
from .spans import SpanMask
from .tracing import trace


OBJECT_ENDINGS = {"coco": ".json", "geojson": ".geojson", "gpkg": ".gpkg"}
_CHUNK = 1000  # objects written to a GeoPackage at once


@dataclass(frozen=True)
class Place:
    """Where an image lies.

    Attributes:
        size: (width, height) in pixels.
        transform: (a, b, c, d, e, f), see `images.rasters.Raster`; None for pixels.
        crs: the coordinate system as WKT, or None.
        epsg: its number in EPSG's list, or None.
    """

    size: tuple[int, int]
    transform: tuple[float, ...] | None = None
    crs: str | None = None
    epsg: int | None = None

    def coordinates(self, ring: np.ndarray) -> np.ndarray:
        """Return the closed ring in coordinates, float64 (n + 1, 2)."""
        closed = np.concatenate([ring, ring[:1]]).astype(np.float64)
        if self.transform is None:
            return closed
        a, b, c, d, e, f = self.transform
        x, y = closed.T
        return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)

    @property
    def pixel_area(self) -> float:
        """The area of a pixel in square units of the coordinate system."""
        if self.transform is None:
            return 1.0
        a, b, _, d, e, _ = self.transform
        return abs(a * e - b * d)


def write_objects(path: Path, file_format: str, image_name: str, place: Place, objects: Iterable) -> int:
    """Write the objects of an image to a file; an interruption leaves the earlier one as it was.

    Args:
        path: where it is written.
        file_format: "coco", one document of COCO's shape with run lengths at the image's size; "geojson"; "gpkg", which
            needs the extra `geo`.
        image_name: the image's name in COCO's JSON.
        place: where the image lies.
        objects: with `mask`, `score`, `stability_score`, `point_xy`, `tile_box_xyxy`, `num_tiles` and `is_cut`, see
            `inference.tile_merging.TiledObject`. They are taken one by one.

    Returns:
        The number of objects.

    Raises:
        ValueError: for GeoJSON in a coordinate system without a number in EPSG's list, and for a missing extra.
        OSError: if it cannot be written.
    """
    counted = _Counted(objects)
    if file_format == "gpkg":
        write_raw = _geopackage_writer()
        # Names of layers that begin like this are GeoPackage's own.
        layer = f"layer_{path.stem}" if path.stem.lower().startswith(("gpkg", "sqlite_")) else path.stem
        atomic_write(path, lambda aside: _write_geopackage(aside, layer, place, counted, write_raw))
    elif file_format == "geojson":
        head = _geojson_head(place)
        atomic_write(path, lambda aside: _write_json(aside, head, "features", _features(place, counted), ""))
    else:
        width, height = place.size
        head = {"images": [{"id": 1, "file_name": image_name, "width": width, "height": height}]}
        tail = ', "categories": [{"id": 1, "name": "object"}]'
        atomic_write(path, lambda aside: _write_json(aside, head, "annotations", _annotations(place, counted), tail))
    return counted.number


class _Counted:
    def __init__(self, objects: Iterable):
        self.number, self._objects = 0, objects

    def __iter__(self):
        for one in self._objects:
            self.number += 1
            yield one


def _properties(number: int, one, place: Place) -> dict[str, Any]:
    area = one.mask.area
    return {
        "object_id": number, "predicted_iou": round(one.score, 6), "stability_score": round(one.stability_score, 6),
        "area_px": area, "area": area * place.pixel_area, "num_tiles": one.num_tiles, "is_cut": one.is_cut,
    }  # fmt: skip


def _write_json(path: Path, head: dict, name: str, entries: Iterator[dict], tail: str):
    """Write a JSON object whose list `name` is too long for memory."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + f', "{name}": [')
        for number, entry in enumerate(entries):
            file.write((",\n" if number else "\n") + json.dumps(entry))
        file.write(f"\n]{tail}}}\n")


def _annotations(place: Place, objects: Iterable) -> Iterator[dict]:
    width, height = place.size
    for number, one in enumerate(objects, start=1):
        runs = one.mask.runs(width)
        x1, y1, x2, y2 = one.mask.box_xyxy
        left, top, right, bottom = one.tile_box_xyxy
        yield {
            "id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": one.mask.area,
            "segmentation": {"size": [height, width], "counts": compress_runs(runs, np.array([0, len(runs)]))[0]},
            "bbox": [x1, y1, x2 - x1, y2 - y1], "predicted_iou": one.score, "stability_score": one.stability_score,
            "point_coords": [list(one.point_xy)], "crop_box": [left, top, right - left, bottom - top],
            "num_tiles": one.num_tiles, "is_cut": one.is_cut,
        }  # fmt: skip


def _geojson_head(place: Place) -> dict:
    head: dict[str, Any] = {"type": "FeatureCollection"}
    if place.crs is not None:
        if place.epsg is None:
            raise ValueError(
                "the raster's coordinate system has no number in EPSG's list, by which GeoJSON could name it: use "
                "--format gpkg."
            )
        # The form of 2008, which GDAL, QGIS and geopandas read. RFC 7946 allows longitudes and latitudes alone.
        head["crs"] = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{place.epsg}"}}
    return head


def _features(place: Place, objects: Iterable) -> Iterator[dict]:
    for number, one in enumerate(objects, start=1):
        polygons = [
            [_wound(place.coordinates(ring), number > 0).tolist() for number, ring in enumerate(rings)]
            for rings in trace(one.mask)
        ]
        yield {
            "type": "Feature",
            "properties": _properties(number, one, place),
            "geometry": {"type": "MultiPolygon", "coordinates": polygons},
        }


def _wound(ring: np.ndarray, is_hole: bool) -> np.ndarray:
    """Turn a closed ring counterclockwise, and a hole clockwise, as RFC 7946 says."""
    x, y = (ring - ring[0]).T
    is_counterclockwise = (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0
    return ring if is_counterclockwise != is_hole else ring[::-1]


def well_known_binary(mask: SpanMask, place: Place) -> bytes:
    """Return the outline of a mask as a MultiPolygon in WKB, little endian."""
    polygons = trace(mask)
    parts = [struct.pack("<BII", 1, 6, len(polygons))]
    for polygon in polygons:
        parts.append(struct.pack("<BII", 1, 3, len(polygon)))
        for number, ring in enumerate(polygon):
            closed = _wound(place.coordinates(ring), number > 0)
            parts += [struct.pack("<I", len(closed)), closed.astype("<f8").tobytes()]
    return b"".join(parts)


def check_geopackage():
    """Raise ValueError where GeoPackages cannot be written, with the fix."""
    _geopackage_writer()


def _geopackage_writer():
    try:
        from pyogrio.raw import write
    except ImportError as error:
        raise ValueError("--format gpkg needs pyogrio: pip install 'samlight-hf[geo]'.") from error
    return write


def _write_geopackage(path: Path, layer: str, place: Place, objects: Iterable, write_raw):
    aside = path.with_name(f"{path.name}.gpkg")  # GDAL wants the suffix, and makes further files named after it
    rest, number = iter(objects), 0
    try:
        while (chunk := list(islice(rest, _CHUNK))) or not number:
            columns = [_properties(number + index, one, place) for index, one in enumerate(chunk, start=1)]
            _append(aside, layer, place, [one.mask for one in chunk], columns, write_raw, append=number > 0)
            number += len(chunk)
            if not chunk:
                break
        os.replace(aside, path)
    except RuntimeError as error:  # of GDAL, which does not tell the number of an error of the disk
        _write_probe(path.with_name(f"{aside.name}.probe"))
        raise OSError(f"GDAL cannot write it ({one_line(error, 200)})") from error
    finally:
        for file in path.parent.glob(f"{glob.escape(aside.name)}*"):
            file.unlink()


def _write_probe(path: Path):
    """Write a megabyte, so that a full or broken disk raises the system's own OSError. The caller removes the file."""
    with path.open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())


_TYPES = {
    "object_id": np.int64, "predicted_iou": np.float64, "stability_score": np.float64, "area_px": np.int64,
    "area": np.float64, "num_tiles": np.int32, "is_cut": np.bool_,
}  # fmt: skip


def _append(
    path: Path, layer: str, place: Place, masks: Sequence[SpanMask], columns: Sequence[dict], write_raw, append: bool
):
    geometry = np.array([well_known_binary(mask, place) for mask in masks], dtype=object)
    fields: list[np.ndarray] = [np.array([row[name] for row in columns], dtype=dtype) for name, dtype in _TYPES.items()]
    options = {"append": True} if append else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a missing coordinate system, which the raster lacks too
        write_raw(
            str(path), geometry, fields, list(_TYPES), layer=layer, driver="GPKG", geometry_type="MultiPolygon",
            crs=place.crs, **options,
        )  # fmt: skip
