"""Cut-out objects, pasted onto pictures: objects with exact masks for pictures with none."""

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .augmentation import check_strengths, recolour, to_cells
from .sa1b import tar_members
from .samples import SampleError, SkipReason


CUTOUT_SUFFIXES = frozenset((".png", ".webp"))

# Where an object is more opaque than not.
MIN_ALPHA = 128

# Decoded objects that each process keeps: decoding WebP is a fifth of an example of 512 px.
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Pasted:
    """An object that was pasted onto a picture: `pixels`, uint8 0 or 1 (rows, columns), tight around what of it lies in
    the picture, at `left`, `top`, pixels of the frame; `share` of the whole object."""

    pixels: np.ndarray
    left: int
    top: int
    share: float

    def grid(self, image_size: int, mask_size: int) -> np.ndarray:
        """The cells that are at least half object, bool (mask_size, mask_size)."""
        cell = image_size / mask_size
        return to_cells(self.pixels, self.left, self.top, cell, cell, mask_size)

    @property
    def extent(self) -> tuple[np.ndarray, float]:
        """The tight box, float64 xyxy in pixels of the frame, and `share`."""
        height, width = self.pixels.shape
        return np.array([self.left, self.top, self.left + width, self.top + height], dtype=np.float64), self.share


class Cutouts:
    """Objects with transparency around them, and how they are pasted onto pictures. Pickles; holds no open file.

    Where alpha is 128 or more is the object's mask. Later objects lie over earlier ones and over the picture.

    Args:
        paths: tars or folders of RGBA PNG or WebP files, searched recursively, or one such path.
        number: fewest and most objects pasted onto a picture.
        scale: least and greatest longest side of an object, before it is turned, as a share of the picture's longest side.
        flip: whether half of them are mirrored.
        max_rotation_degrees: to either side.
        brightness, contrast, saturation: as in `Augmentation`.

    Raises:
        ValueError: for a path that is not there or has no such file, and for values out of range.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        number: tuple[int, int] = (1, 5),
        scale: tuple[float, float] = (0.1, 0.5),
        flip: bool = True,
        max_rotation_degrees: float = 30.0,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
    ):
        if len(number) != 2 or not 0 <= number[0] <= number[1] or number[1] < 1:
            raise ValueError(f"number={number!r} must be the fewest and the most objects, such as (1, 5).")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 2:
            raise ValueError(f"scale={scale!r} must be the least and the greatest share, above 0 and at most 2.")
        if not 0 <= max_rotation_degrees <= 180:
            raise ValueError(f"max_rotation_degrees={max_rotation_degrees!r} must be from 0 to 180.")
        self.number, self.scale, self.flip = tuple(number), tuple(scale), flip
        self.max_rotation_degrees = max_rotation_degrees
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        check_strengths(self, "brightness", "contrast", "saturation")
        self._decoded: dict[int, Image.Image] = {}
        self._room = CACHE_BYTES
        self._files: list[str] = []
        places = []
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            places += self._index(Path(path))
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)  # (file, offset, size; all of it: -1)
        if not len(self._places):
            raise ValueError("No path of cut-outs was given.")

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict:
        return {**vars(self), "_decoded": {}, "_room": CACHE_BYTES}

    def __repr__(self) -> str:
        """Equal for the same objects and settings, wherever the files are."""
        names = [os.path.basename(file) for file in self._files]
        digest = hashlib.sha256(repr(names).encode() + self._places.tobytes()).hexdigest()[:16]
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"Cutouts({len(self)} objects {digest}, {', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    def _index(self, path: Path) -> list[tuple[int, int, int]]:
        places = []
        if path.is_dir():
            found = (file for file in path.rglob("*") if file.suffix.lower() in CUTOUT_SUFFIXES and file.is_file())
            for file in sorted(file for file in found if not file.name.startswith(".")):
                places.append((len(self._files), 0, -1))
                self._files.append(str(file))
        elif path.is_file():
            for member in tar_members(path):
                name = Path(member.name)
                if name.suffix.lower() in CUTOUT_SUFFIXES and not name.name.startswith("."):
                    places.append((len(self._files), member.offset_data, member.size))
            self._files.append(str(path))
        else:
            raise ValueError(f"{path}: no such file or folder of cut-outs.")
        if not places:
            raise ValueError(f"{path}: no {' or '.join(sorted(CUTOUT_SUFFIXES))} file here.")
        return places

    def load(self, index: int) -> Image.Image:
        """One object, RGBA, not to be changed. Raises `SampleError` for a file that is damaged or has no transparency."""
        if index not in self._decoded:
            cutout = self._decode(index)
            num_bytes = 4 * cutout.width * cutout.height
            if num_bytes > self._room:
                return cutout
            self._room -= num_bytes
            self._decoded[index] = cutout
        return self._decoded[index]

    def _decode(self, index: int) -> Image.Image:
        file, offset, size = self._places[index]
        try:
            with open(self._files[file], "rb") as stream:
                stream.seek(offset)
                picture = Image.open(io.BytesIO(stream.read(size)))
            if picture.has_transparency_data:
                return picture.convert("RGBA")
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise SampleError(SkipReason.BROKEN_CUTOUT, f"{self._files[file]}, cut-out {index}") from error
        raise SampleError(SkipReason.BROKEN_CUTOUT, f"{self._files[file]}, cut-out {index}")

    def paste(self, image: Image.Image, generator: np.random.Generator) -> list[Pasted]:
        """Pastes objects onto an RGB image, in place. In the order of pasting, those with a pixel in the image.

        Raises:
            SampleError: for an object that cannot be used. Whether it is drawn depends on the generator alone.
        """
        number = generator.integers(self.number[0], self.number[1] + 1)
        objects = (self._paste_one(image, generator) for _ in range(number))
        return [each for each in objects if each]

    def _paste_one(self, image: Image.Image, generator: np.random.Generator) -> Pasted | None:
        cutout = self.load(int(generator.integers(len(self))))
        side = max(image.size) * np.exp(generator.uniform(*np.log(self.scale)))
        flip, degrees, centre = generator.random(), generator.uniform(-1, 1), generator.random(2)
        factor = side / max(cutout.size)
        cutout = cutout.resize([max(1, round(length * factor)) for length in cutout.size], Image.Resampling.BILINEAR)
        if self.flip and flip < 0.5:
            cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.max_rotation_degrees:
            cutout = cutout.rotate(degrees * self.max_rotation_degrees, Image.Resampling.BILINEAR, expand=True)
        colours = recolour(cutout.convert("RGB"), generator, self.brightness, self.contrast, self.saturation)
        alpha = cutout.getchannel("A")
        left, top = (round(u * length - own / 2) for u, length, own in zip(centre, image.size, cutout.size))
        image.paste(colours, (left, top), alpha)

        whole = (np.asarray(alpha) >= MIN_ALPHA).view(np.uint8)
        x, y = max(0, -left), max(0, -top)
        seen = whole[y : image.height - top, x : image.width - left]
        columns, rows = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
        if not len(columns):
            return None
        tight = seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        share = np.count_nonzero(tight) / np.count_nonzero(whole)
        return Pasted(tight, int(left + x + columns[0]), int(top + y + rows[0]), share)
