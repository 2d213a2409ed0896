"""TIFF and its relatives of microscopes (OME, SVS, NDPI), with their pyramids, read by tifffile (extra `tiff`)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ..utils.messages import one_line
from .rasters import Raster, Window, image_errors
from .reading import ImageError


class TiffRaster(Raster):
    """The first image of a file, at one level of its pyramid; see `Raster`.

    Only the tiles and strips of a window are read. Channels that are pages of their own, as in OME-TIFF, are bands.

    Args:
        path: the file.
        bands: as in `Raster`.
        level: of the pyramid; 0 is the full size.
    """

    def __init__(self, path: Path, bands: Sequence[int] | None = None, level: int = 0):
        with image_errors(path, "cannot be opened"):
            self._open(path, bands, level)

    def _open(self, path: Path, bands: Sequence[int] | None, level: int):
        self._file = tifffile.TiffFile(path)
        levels = self._file.series[0].levels
        if level >= len(levels):
            raise ImageError(f"{path}: has no level {level}: its last level is {len(levels) - 1}.")
        series = levels[level]
        sizes = dict(zip(series.axes, series.shape, strict=True))
        channels = [axis for axis, length in sizes.items() if axis not in "YX" and length > 1]
        if not {"Y", "X"} <= sizes.keys() or len(channels) > 1 or (channels and channels[0] not in "CSIQ"):
            raise ImageError(
                f"{path}: has the axes {series.axes} of {'x'.join(map(str, series.shape))}: only one plane with "
                "channels can be read. Save the plane as a file of its own."
            )
        photometric = tifffile.PHOTOMETRIC(series.keyframe.photometric).name
        if photometric not in ("MINISBLACK", "RGB", "YCBCR"):
            raise ImageError(
                f"{path}: is stored as {photometric}: only grey and RGB are read in parts. Convert it to RGB."
            )
        num_bands = sizes[channels[0]] if channels else 1
        super().__init__(path, (sizes["Y"], sizes["X"]), num_bands, bands, series.dtype)
        if level:  # results lie in pixels of the full size
            full = dict(zip(levels[0].axes, levels[0].shape, strict=True))
            self.transform = (full["X"] / self.width, 0.0, 0.0, 0.0, full["Y"] / self.height, 0.0)
        pages: list[Any] = list(series.pages)
        self._stack: np.ndarray | None = None
        if len(pages) not in (1, num_bands) or (len(pages) == 1 and channels and pages[0].samplesperpixel == 1):
            try:  # ImageJ writes all planes behind the first page
                stack = tifffile.memmap(path, series=0, mode="r")
            except ValueError as error:
                raise ImageError(f"{path}: its planes cannot be read in parts ({one_line(error, 200)}).") from error
            self._stack = stack.reshape(num_bands, self.height, self.width)
        self._pages = pages

    def read_levels(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        x1, y1, x2, y2 = window
        with image_errors(self.path, f"truncated or damaged at {x1},{y1} to {x2},{y2}"):
            if self._stack is not None:
                levels = np.array(self._stack[[band - 1 for band in self.bands], y1:y2, x1:x2])
            elif len(self._pages) == 1:
                levels = self._read_page(self._pages[0], window)[[band - 1 for band in self.bands]]
            else:
                levels = np.concatenate([self._read_page(self._pages[band - 1], window) for band in self.bands])
        return levels, self._measured(levels)

    def _read_page(self, page, window: Window) -> np.ndarray:
        """Read a window of a page, (samples, h, w), from the tiles or strips that it touches."""
        x1, y1, x2, y2 = window
        frame = page.keyframe
        planes, _, height, width, samples = frame.shaped
        if page.is_memmappable:  # not compressed, and often a single strip, which is not to be read for each window
            whole = page.asarray(out="memmap").reshape(planes, height, width, samples)
            return np.array(whole[:, y1:y2, x1:x2]).transpose(0, 3, 1, 2).reshape(-1, y2 - y1, x2 - x1)
        levels = np.zeros((planes, y2 - y1, x2 - x1, samples), dtype=self.dtype)
        tile_height = frame.tilelength if frame.is_tiled else frame.rowsperstrip
        tile_width = frame.tilewidth if frame.is_tiled else frame.imagewidth
        tile_height = min(tile_height, frame.imagelength) if not frame.is_tiled else tile_height
        down, across = math.ceil(frame.imagelength / tile_height), math.ceil(frame.imagewidth / tile_width)
        for plane in range(planes):
            for row in range(y1 // tile_height, math.ceil(y2 / tile_height)):
                for column in range(x1 // tile_width, math.ceil(x2 / tile_width)):
                    tile = self._decode(page, (plane * down + row) * across + column, window)
                    if tile is not None:
                        _paste(levels[plane], tile, row * tile_height - y1, column * tile_width - x1)
        return levels.transpose(0, 3, 1, 2).reshape(-1, y2 - y1, x2 - x1)

    def _decode(self, page, index: int, window: Window) -> np.ndarray | None:
        """Return a tile or strip, (h, w, samples), or None for one that is left out of the file."""
        frame, options = page.keyframe, {}
        if frame.compression in (6, 7, 34892, 33007):  # JPEG
            options = {"jpegtables": page.jpegtables, "jpegheader": frame.jpegheader}
        try:
            size = page.databytecounts[index]
            with self._file.filehandle.lock:
                self._file.filehandle.seek(page.dataoffsets[index])
                data = self._file.filehandle.read(size)
            if len(data) < size:
                raise ValueError(f"tile {index} has {len(data)} of {size} bytes")
            decoded = frame.decode(data, index, **options)[0] if size else None
        except Exception as error:  # decoders raise nearly anything on damaged files
            x1, y1, x2, y2 = window
            raise ImageError(
                f"{self.path}: cannot be read at {x1},{y1} to {x2},{y2} ({one_line(error, 200)}). Copy or download it "
                "again; other compressions need: pip install 'samlight-hf[tiff]'."
            ) from error
        return None if decoded is None else decoded[0]

    def close(self) -> None:
        self._file.close()


def _paste(target: np.ndarray, tile: np.ndarray, top: int, left: int):
    """Copy the part of a tile that lies in `target`; its upper left corner may lie outside."""
    rows = slice(max(top, 0), min(top + tile.shape[0], target.shape[0]))
    columns = slice(max(left, 0), min(left + tile.shape[1], target.shape[1]))
    target[rows, columns] = tile[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
