"""Images of any size, read window by window: GeoTIFF, TIFF pyramids of microscopes, and any other image file.

GeoTIFF and what else GDAL opens is read by rasterio (extra `geo`), pyramids and TIFF without it by tifffile (extra
`tiff`). All other formats cannot be read in parts: they are loaded whole, as everywhere in this package.

8-bit levels are kept. Others are scaled linearly to 8 bits, with one scale for all bands and all windows: between the
percentiles of the levels of the whole file, as `levels.stretch` has them.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..utils.messages import one_line
from .formats import open_lazily
from .levels import SENTINELS, TAIL
from .preprocessing import image_tensor
from .reading import ImageError, check_file, open_image


Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels; x2 and y2 lie behind the last pixel

# Suffixes that only tifffile reads well, and those that only GDAL does.
PYRAMIDS = (".svs", ".ndpi", ".scn", ".qptiff", ".bif", ".btf", ".ome.tif", ".ome.tiff", ".lsm")
_GDAL_ONLY = (".vrt", ".img", ".ecw", ".jp2")
_TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GEO_KEYS, _ORIENTATION = 34735, 274  # tags: a GeoTIFF's coordinate system, and how a TIFF is turned
_STRIP_PIXELS = 1 << 23  # read at once where the whole file is read
_NUM_BINS = 1 << 16
_FINE_BINS = 1024  # between the percentiles, so that rounding to a bin does not show
_MAX_PASSES = 4
_TOO_LARGE = 1e30  # fill values of GIS, see `levels`


@contextlib.contextmanager
def image_errors(path: Path | str, fault: str) -> Iterator[None]:
    """Raise ImageError in place of what decoders raise on damaged files, which is nearly anything.

    Args:
        path: the file.
        fault: what the message says of it, such as "cannot be opened".
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        reason = one_line(error.__cause__ or error, 200)  # rasterio has the message of GDAL as the cause of its own
        raise ImageError(f"{path}: {fault} ({reason}). Copy or download it again.") from error


class LevelRange(NamedTuple):
    """Levels that become 0 and 255."""

    low: float
    high: float


class Raster(ABC):
    """An image that is read window by window, with its place on the earth if it has one.

    Args:
        path: the file, for messages.
        size: (height, width).
        num_bands: of the file.
        bands: numbers of one or three bands, from 1. Default: the first three, or the first one where there are fewer.
        dtype: of the levels.

    Attributes:
        height, width: in pixels.
        bands: the numbers of the bands that are read.
        crs: the coordinate system as WKT, or None.
        epsg: its number in EPSG's list, or None.
        transform: (a, b, c, d, e, f): a pixel edge (x, y) lies at (a x + b y + c, d x + e y + f) in the coordinate
            system, or None.
        notes: sentences about the file that a user should read.
        level_range: see `find_range`.

    Raises:
        ImageError: for bands that are not in the file, and levels that are no numbers.
    """

    crs: str | None = None
    epsg: int | None = None
    transform: tuple[float, float, float, float, float, float] | None = None

    def __init__(
        self, path: Path | str, size: tuple[int, int], num_bands: int, bands: Sequence[int] | None, dtype: np.dtype
    ):
        self.path, (self.height, self.width), self.dtype = path, size, np.dtype(dtype)
        self.notes: list[str] = []
        self.level_range: LevelRange | None = None
        self._sentinels: list[float] = []  # levels that mean "no data" by convention, see `find_range`
        if min(size) < 1:
            raise ImageError(f"{path}: has no pixels.")
        if self.dtype.kind not in "uifb":
            raise ImageError(f"{path}: its levels are {self.dtype}, and must be integers or floats.")
        if bands is None:
            bands = (1, 2, 3) if num_bands >= 3 else (1,)
        if len(bands) not in (1, 3) or not all(1 <= band <= num_bands for band in bands):
            raise ImageError(
                f"{path}: bands {','.join(map(str, bands))} cannot be read: give one or three numbers from 1 to "
                f"{num_bands}, the bands of this file."
            )
        self.bands = tuple(bands)

    @abstractmethod
    def read_levels(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Return the levels (bands, h, w) of a window, and where they are measurements, bool (1 or bands, h, w).

        Raises:
            ImageError: for a part of the file that cannot be read.
        """

    def close(self) -> None:  # noqa: B027  an array has nothing to close
        """Close the file."""

    def read(self, window: Window) -> tuple[torch.Tensor, np.ndarray]:
        """Return a window as uint8 (3, h, w), and where there is data in any band, bool (h, w).

        Black is where there is no data; of more than 8 bits also the single bands without data.
        """
        is_scaled = self.dtype.kind != "b" and self.dtype != np.uint8
        low, high = self.find_range() if is_scaled else (0, 255)  # first, since it finds what is no data
        levels, measured = self.read_levels(window)
        valid: np.ndarray = np.logical_or.reduce(measured)  # over the bands
        if self.dtype.kind == "b":
            levels = levels.astype(np.uint8) * 255
        elif is_scaled:
            levels = np.where(measured, levels, low).astype(np.float32)
            levels = np.rint(((levels - low) * (255 / (high - low))).clip(0, 255)).astype(np.uint8)
        if not valid.all():
            levels = np.where(valid, levels, np.uint8(0))
        tensor = torch.from_numpy(np.ascontiguousarray(levels))
        return (tensor.expand(3, -1, -1) if len(tensor) == 1 else tensor), valid

    def find_range(self) -> LevelRange:
        """Find the levels that become 0 and 255, in one pass through the file, two for signed levels, or up to six
        for floats and 32 bits.

        0.5 % of the levels are clipped at each end, unless all others are equal. A constant image is scaled as 16 bits.
        -9999, -32768 and similar levels are no data if no level is lower, as in `levels.stretch`.

        Raises:
            ImageError: for a file without any data.
        """
        if self.level_range is None:
            edges = self._extremes()
            while edges[0] in SENTINELS:
                self._sentinels.append(edges[0])
                edges = self._extremes()
            self.level_range = self._range(*edges)
        return self.level_range

    def _extremes(self) -> tuple[float, float]:
        """Return the lowest and the highest level; of unsigned ones of up to 16 bits those of the dtype, unread."""
        if self.dtype.kind == "u" and self.dtype.itemsize <= 2:
            return 0.0, float(np.iinfo(self.dtype).max)
        low, high = np.inf, -np.inf
        for values in self._values():
            low, high = min(low, float(values.min())), max(high, float(values.max()))
        return low, high

    def _range(self, low: float, high: float) -> LevelRange:
        """Return the percentiles of the levels, which lie between `low` and `high`.

        Where a few extreme levels would push all others into few bins, the part between the percentiles is counted
        again, in bins of its own.
        """
        is_exact = self.dtype.kind in "ui" and self.dtype.itemsize <= 2
        if is_exact:  # a bin for each level
            low, high = float(np.iinfo(self.dtype).min), float(np.iinfo(self.dtype).max) + 1
        outer = low, high
        for passes_left in reversed(range(1 if is_exact else _MAX_PASSES)):
            counts, width = self._histogram(low, high)
            total = int(counts.sum())
            if not total:
                raise ImageError(f"{self.path}: holds no data at all.")
            tail = int(TAIL * total)
            first, last = np.searchsorted(np.cumsum(counts), [tail, total - 1 - tail], side="right")
            if last - first >= _FINE_BINS or not passes_left or np.count_nonzero(counts) == 1:
                break
            low, high = low + first * width, low + (last + 1) * width
        if first == last and (low, high) != outer:
            return LevelRange(*outer)
        if first == last:
            first, last = np.flatnonzero(counts)[[0, -1]]
        if first == last:
            return LevelRange(0.0, 65535.0)
        shift = 0.0 if is_exact else 0.5  # the middle of a bin
        return LevelRange(low + (first + shift) * width, low + (last + shift) * width)

    def _histogram(self, low: float, high: float) -> tuple[np.ndarray, float]:
        """Return how many levels lie in each bin from `low` to `high`, others at the ends, and a bin's width."""
        counts = np.zeros(_NUM_BINS, dtype=np.int64)
        width = (high - low) / _NUM_BINS if high > low else 1.0
        for values in self._values():
            bins = ((values.astype(np.float64) - low) / width).clip(0, _NUM_BINS - 1).astype(np.int64)
            counts += np.bincount(bins, minlength=_NUM_BINS)
        return counts, width

    def _values(self) -> Iterator[np.ndarray]:
        """Yield all levels that are measurements, strip by strip."""
        rows = max(1, _STRIP_PIXELS // self.width)
        for top in range(0, self.height, rows):
            levels, measured = self.read_levels((0, top, self.width, min(top + rows, self.height)))
            values = levels[np.broadcast_to(measured, levels.shape)]
            if values.size:
                yield values

    def _measured(self, levels: np.ndarray, measured: np.ndarray | None = None) -> np.ndarray:
        """Return where bands hold measurements, bool (1 or bands, h, w), given where the file says so."""
        measured = np.ones((1, *levels.shape[1:]), dtype=bool) if measured is None else measured
        if self.dtype.kind == "f":  # NaN or a fill value in one band says that nothing was measured there
            measured = measured & (np.abs(levels) < _TOO_LARGE).all(axis=0)
        for sentinel in self._sentinels:
            measured = measured & (levels != self.dtype.type(sentinel))
        return measured


class ArrayRaster(Raster):
    """An image in memory.

    Args:
        image: as `images.preprocessing.image_tensor` takes it.
        path: the file that it came from, for messages.
        bands: as in `Raster`.
    """

    def __init__(self, image, path: Path | str = "the image", bands: Sequence[int] | None = None):
        self.pixels = image_tensor(image)
        size = self.pixels.shape[-2], self.pixels.shape[-1]
        super().__init__(path, size, len(self.pixels), bands, np.dtype(np.uint8))

    def read_levels(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        x1, y1, x2, y2 = window
        levels = self.pixels[[band - 1 for band in self.bands], y1:y2, x1:x2].cpu().numpy()
        return levels, np.ones((1, *levels.shape[1:]), dtype=bool)


def open_raster(path: str | os.PathLike, bands: Sequence[int] | None = None, level: int = 0) -> Raster:
    """Open an image file for reading in windows.

    Args:
        path: the file.
        bands: numbers of one or three bands, from 1; see `Raster`.
        level: of a pyramid; 0 is the full size.

    Raises:
        ImageError: for a file that cannot be read, bands or a level that it does not have, and a missing extra.
    """
    path = Path(path)
    check_file(path)
    name = path.name.lower()
    if isinstance(level, bool) or not isinstance(level, int) or level < 0:
        raise ImageError(f"level={level!r} must be 0, the full size, or the number of a smaller level.")
    with path.open("rb") as file:
        is_tiff = file.read(4) in _TIFF_HEADERS
    has_rasterio, has_tifffile = _is_installed("rasterio"), _is_installed("tifffile")
    if name.endswith(PYRAMIDS):
        if not has_tifffile:
            raise ImageError(f"{path}: needs tifffile: pip install 'samlight-hf[tiff]'.")
        return _open_tiff(path, bands, level)
    if has_rasterio and (is_tiff or name.endswith(_GDAL_ONLY)):
        return _with_orientation(_open_geo(path, bands, level))
    if is_tiff and _tiff_tag(path, _GEO_KEYS) is not None:
        raise ImageError(f"{path}: is a GeoTIFF and needs rasterio: pip install 'samlight-hf[geo]'.")
    if is_tiff and has_tifffile:
        return _with_orientation(_open_tiff(path, bands, level))
    if level:
        fix = "pip install 'samlight-hf[tiff]'" if is_tiff else "use level 0"
        raise ImageError(f"{path}: has no level {level} that can be read: {fix}.")
    try:
        return ArrayRaster(open_image(path), path, bands)
    except ImageError as error:
        if is_tiff and "pixels" in str(error):
            raise ImageError(f"{error} In parts it is read by: pip install 'samlight-hf[tiff]'.") from error
        raise


def _open_tiff(path: Path, bands: Sequence[int] | None, level: int) -> Raster:
    from .tiff_rasters import TiffRaster

    return TiffRaster(path, bands, level)


def _open_geo(path: Path, bands: Sequence[int] | None, level: int) -> Raster:
    from .geo_rasters import GeoRaster

    return GeoRaster(path, bands, level)


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _with_orientation(raster: Raster) -> Raster:
    """Note that a raster is not turned as its file says; places on the earth belong to the stored rows."""
    orientation = _tiff_tag(Path(raster.path), _ORIENTATION)
    if orientation not in (None, 1) and raster.crs is None:
        raster.notes.append(f"it is not turned as its orientation ({orientation}) says: its rows are those of the file")
    return raster


def _tiff_tag(path: Path, number: int) -> Any:
    """Return the value of a tag of a TIFF; None where it has none or cannot be opened."""
    if _is_installed("tifffile"):  # it opens more kinds of levels than Pillow
        import tifffile

        try:
            with tifffile.TiffFile(path) as file:
                return file.pages[0].tags.valueof(number)  # type: ignore[union-attr]
        except Exception:  # tifffile raises nearly anything on damaged files
            return None
    from PIL import Image

    try:
        with open_lazily(path) as image:
            return getattr(image, "tag_v2", {}).get(number)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
