"""Rasters with a place on the earth, and what else GDAL opens, read by rasterio (extra `geo`)."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window as RasterioWindow

from .rasters import Raster, Window, image_errors
from .reading import ImageError


# GDAL keeps decoded blocks, up to 5 % of the machine's memory by default. Rows of tiles share few of them.
_CACHE_MB = 128


class GeoRaster(Raster):
    """A file that rasterio reads; see `Raster`.

    Pixels are without data where the file says so: by a nodata value, a mask or an alpha band. A palette is applied.

    Args:
        path: the file.
        bands: as in `Raster`.
        level: 0 for the full size, n for the n-th overview.
    """

    def __init__(self, path: Path, bands: Sequence[int] | None = None, level: int = 0):
        with image_errors(path, "cannot be opened"):
            self._open(path, bands, level)

    def _open(self, path: Path, bands: Sequence[int] | None, level: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # said in `notes`
            self._file = rasterio.open(path)
            overviews = self._file.overviews(1) if self._file.count else []
            # Of the full size: a smaller level of a file without a transform has an arbitrary one.
            transform, has_gcps, full = self._file.transform, bool(self._file.gcps[0]), self._file.shape
            if level:
                self._file.close()
                if level > len(overviews):
                    raise ImageError(f"{path}: has no level {level}: its last level is {len(overviews)}.")
                self._file = rasterio.open(path, overview_level=level - 1)
                _ = self._file.transform  # rasterio warns at its first use
        file = self._file
        colours = list(file.colorinterp)
        if bands is None and (kind := _unreadable_kind(file)):
            file.close()
            raise ImageError(f"{path}: is stored as {kind}: only grey and RGB are read in parts. Convert it to RGB.")
        self._palette = _palette(file) if colours[:1] == [ColorInterp.palette] and bands is None else None
        if bands is None and all(c in colours for c in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)):
            bands = [1 + colours.index(c) for c in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)]
        elif bands is None and ColorInterp.alpha in colours[:3]:
            bands = (1,)  # grey with alpha
        chosen = bands or ((1, 2, 3) if file.count >= 3 else (1,))
        # One dtype that holds the levels of all bands.
        dtypes = [file.dtypes[band - 1] for band in chosen if 1 <= band <= file.count]
        dtype = np.result_type(*dtypes) if dtypes else np.dtype(np.uint8)
        super().__init__(path, (file.height, file.width), file.count, bands, dtype)
        self._has_masks = any(MaskFlags.all_valid not in flags for flags in file.mask_flag_enums)
        if file.crs:
            self.crs, self.epsg = file.crs.to_wkt(), file.crs.to_epsg()
        has_transform = not transform.is_identity
        if has_transform or level:
            a, b, c, d, e, f = tuple(transform)[:6]
            x, y = full[1] / self.width, full[0] / self.height  # pixels of the full size for one of this level
            self.transform = a * x, b * y, c, d * x, e * y, f
        if has_gcps:
            self.notes.append("its ground control points are not applied, and results are in pixels: use gdalwarp")
        elif not has_transform:
            self.notes.append("it has no place on the earth, and results are in pixels")
        elif self.crs is None:
            self.notes.append("it names no coordinate system (CRS), and results are in the units of its transform")

    def read_levels(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        x1, y1, x2, y2 = window
        part = RasterioWindow(x1, y1, x2 - x1, y2 - y1)
        with image_errors(self.path, f"truncated or damaged at {x1},{y1} to {x2},{y2}"), _small_cache():
            # One by one, because rasterio refuses bands of several dtypes.
            levels = np.stack([self._file.read(band, window=part).astype(self.dtype) for band in self.bands])
            valid = self._file.read_masks(list(self.bands), window=part) > 0 if self._has_masks else None
        if self._palette is not None:
            levels = self._palette[levels[0]].transpose(2, 0, 1)
        return levels, self._measured(levels, valid)

    def close(self) -> None:
        self._file.close()


def _small_cache() -> rasterio.Env:
    """Return a context in which GDAL chooses the size of its cache, at its first use; a user's own choice stays."""
    return rasterio.Env() if "GDAL_CACHEMAX" in os.environ else rasterio.Env(GDAL_CACHEMAX=_CACHE_MB)


def _unreadable_kind(file) -> str | None:
    """Return what the levels of a file are where they are neither grey nor RGB and GDAL does not convert them."""
    structure, colours = file.tags(ns="IMAGE_STRUCTURE"), file.colorinterp
    if colours[:1] == (ColorInterp.palette,):
        if file.dtypes[0] == "uint8":
            return None
        return "MINISWHITE" if "MINISWHITE" in structure else f"a palette of {file.dtypes[0]}"
    if ColorInterp.cyan in colours:  # of 16 bits: GDAL converts 8 bits
        return "CMYK"
    return "MINISWHITE" if "MINISWHITE" in structure else None


def _palette(file) -> np.ndarray:
    """Return the colours of the first band, uint8 (256, 3)."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    for level, colour in file.colormap(1).items():
        palette[level] = colour[:3]
    return palette
