"""Paste cut-out objects onto images: this gives objects with exact masks to images without masks."""

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..images.formats import open_lazily
from ..masks.boxes import mask_extent
from .augmentation import Colours, check_strengths, draw_colours, resize, to_cells
from .lazy import planes
from .sa1b import tar_members
from .samples import CutoutError


CUTOUT_SUFFIXES = frozenset((".png", ".webp"))

# Least alpha of the pixels that belong to an object: half opaque.
MIN_ALPHA = 128

# Size of the cache of decoded objects in each process: decoding WebP takes a fifth of the time of an example of 512 px.
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Pasted:
    """Mask of an object that was pasted onto an image.

    Attributes:
        pixels: uint8 0 or 1 (rows, columns), the tight crop of the part inside the image.
        left, top: position of `pixels` in pixels of the frame.
        share: share of the object that is inside the image.
    """

    pixels: np.ndarray
    left: int
    top: int
    share: float

    def grid(self, image_size: int, mask_size: int) -> np.ndarray:
        """Find the cells of the frame that are at least half object: bool (mask_size, mask_size)."""
        cell = image_size / mask_size
        return to_cells(self.pixels, self.left, self.top, cell, cell, mask_size)

    @property
    def extent(self) -> tuple[np.ndarray, float]:
        """Tight box, float64 (4,), xyxy in pixels of the frame, and `share`."""
        height, width = self.pixels.shape
        return np.array([self.left, self.top, self.left + width, self.top + height], dtype=np.float64), self.share


class Cutouts:
    """Cut-out objects with a transparent background, and settings for pasting them onto images.

    The mask of an object has the pixels with alpha of at least 128. Later objects cover earlier ones. No file is kept
    open: instances can be pickled.

    Args:
        paths: tars or folders of PNG or WebP files with transparency, searched recursively, or one such path.
        number: least and largest number of objects in an image.
        scale: least and largest length of an object's longest side, before rotation, as a share of the longest side of
            the image. Drawn log-uniformly.
        flip: mirror half of the objects left to right.
        max_rotation_degrees: largest rotation in either direction.
        brightness, contrast, saturation: as in `Augmentation`.

    Raises:
        ValueError: if a path does not exist or has no such file, or if a value is out of range.

    Example:
        >>> cutouts = Cutouts("cutouts.tar", number=(0, 3))
        >>> images = ImageFolderDataset("photos")
        >>> examples = TrainingExamples(images, 1000, image_size=512, prompts=PromptSampling(), cutouts=cutouts)
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
            raise ValueError(f"number={number!r} must be the least and the largest number of objects, such as (1, 5).")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 2:
            raise ValueError(f"scale={scale!r} must be the least and the largest share, above 0 and at most 2.")
        if not 0 <= max_rotation_degrees <= 180:
            raise ValueError(f"max_rotation_degrees={max_rotation_degrees!r} must be from 0 to 180.")
        self.number, self.scale, self.flip = tuple(number), tuple(scale), flip
        self.max_rotation_degrees = max_rotation_degrees
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        check_strengths(self, "brightness", "contrast", "saturation")
        self._decoded: dict[int, np.ndarray] = {}
        self._room = CACHE_BYTES
        self._files: list[str] = []
        places = []
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            places += self._index(Path(path))
        self._places = np.array(places, dtype=np.int64).reshape(
            -1, 3
        )  # (file, offset, size); a size of -1 is the whole file
        if not len(self._places):
            raise ValueError("No path of cut-outs was given.")

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict:
        return {**vars(self), "_decoded": {}, "_room": CACHE_BYTES}

    def __repr__(self) -> str:
        """Describe objects and settings; equal for equal ones, in whatever folder the files are."""
        names = [os.path.basename(file) for file in self._files]
        digest = hashlib.sha256(repr(names).encode() + self._places.tobytes()).hexdigest()[:16]
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"Cutouts({len(self)} objects {digest}, {', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    def _index(self, path: Path) -> list[tuple[int, int, int]]:
        """Add the files of a folder or a tar to `_files`; return (file, offset, size) of its objects."""
        places = []
        if path.is_dir():
            images = (file for file in path.rglob("*") if file.suffix.lower() in CUTOUT_SUFFIXES and file.is_file())
            for file in sorted(file for file in images if not file.name.startswith(".")):
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

    def load(self, index: int) -> np.ndarray:
        """Decode an object.

        Args:
            index: from 0 to `len(cutouts) - 1`.

        Returns:
            RGBA, uint8 (4, H, W), which must not be changed.

        Raises:
            CutoutError: if the file is damaged or has no transparency.
        """
        if index not in self._decoded:
            cutout = self._decode(index)
            if cutout.nbytes > self._room:
                return cutout
            self._room -= cutout.nbytes
            self._decoded[index] = cutout
        return self._decoded[index]

    def _decode(self, index: int) -> np.ndarray:
        file, offset, size = self._places[index]
        try:
            with open(self._files[file], "rb") as stream:
                stream.seek(offset)
                image = open_lazily(io.BytesIO(stream.read(size)))
            if image.has_transparency_data:
                return planes(image.convert("RGBA"))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise CutoutError(index, self.where(index)) from error
        raise CutoutError(index, self.where(index))

    def where(self, index: int) -> str:
        """Return where an object is, for messages: its file, and its number in a tar."""
        file, _, size = self._places[index]
        before = int(np.count_nonzero(self._places[:index, 0] == file))
        return self._files[file] if size < 0 else f"{self._files[file]}, cut-out {before + 1}"

    def paste(self, pixels: np.ndarray, generator: np.random.Generator) -> list[Pasted]:
        """Paste random objects onto an image.

        Args:
            pixels: uint8 (3, H, W), changed in place.
            generator: source of randomness; nothing else determines which objects are drawn.

        Returns:
            The masks of the objects that have a pixel in the image, in the order of pasting.

        Raises:
            CutoutError: if an object cannot be used.
        """
        number = generator.integers(self.number[0], self.number[1] + 1)
        objects = (self._paste_one(pixels, generator) for _ in range(number))
        return [pasted for pasted in objects if pasted]

    def _paste_one(self, pixels: np.ndarray, generator: np.random.Generator) -> Pasted | None:
        cutout = self.load(int(generator.integers(len(self))))
        height, width = pixels.shape[1:]
        side = max(height, width) * np.exp(generator.uniform(*np.log(self.scale)))
        flip, degrees, (across, down) = generator.random(), generator.uniform(-1, 1), generator.random(2).tolist()
        colours = draw_colours(generator, self.brightness, self.contrast, self.saturation)
        if self.flip and flip < 0.5:
            cutout = cutout[:, :, ::-1]
        factor = side / max(cutout.shape[1:])
        cutout_height, cutout_width = cutout.shape[1:]
        size = max(1, round(cutout_width * factor)), max(1, round(cutout_height * factor))
        angle = np.radians(degrees * self.max_rotation_degrees)
        turned = _extent(size, angle)
        left, top = round(across * width - turned[0] / 2), round(down * height - turned[1] / 2)
        x, y, x_end, y_end = max(0, left), max(0, top), min(width, left + turned[0]), min(height, top + turned[1])
        if x >= x_end or y >= y_end:
            return None
        layer = _turn(_premultiplied(cutout, colours), size, angle, (x - left, y - top, x_end - left, y_end - top))
        _lay_over(pixels[:, y:y_end, x:x_end], layer)
        mask = (layer[3] >= MIN_ALPHA).view(np.uint8)
        extent = mask_extent(mask)
        if extent is None:
            return None
        tight = mask[extent[1] : extent[3], extent[0] : extent[2]]
        share = 1.0
        if (x_end - x, y_end - y) != turned:
            # Number of pixels of the whole object at this size.
            whole = np.count_nonzero(cutout[3] >= MIN_ALPHA) * size[0] * size[1] / cutout[3].size
            share = min(1.0, np.count_nonzero(tight) / max(1.0, whole))
        return Pasted(tight, x + extent[0], y + extent[1], share)


def _lay_over(pixels: np.ndarray, layer: np.ndarray):
    """Blend premultiplied RGBA, float32 (4, H, W), over uint8 (3, H, W), in place."""
    mixed = pixels.astype(np.float32)
    mixed *= 1 - layer[3] / np.float32(255)
    mixed += layer[:3]
    mixed += np.float32(0.5)  # because the conversion to uint8 truncates
    pixels[:] = mixed.clip(0, 255, out=mixed).astype(np.uint8)


def _extent(size: tuple[int, int], angle: float) -> tuple[int, int]:
    """Return the size of the bounding box of a rectangle turned by `angle` radians. Sizes are (width, height)."""
    cosine, sine = abs(np.cos(angle)), abs(np.sin(angle))
    width, height = size[0] * cosine + size[1] * sine, size[0] * sine + size[1] * cosine
    return max(1, int(np.ceil(width - 1e-6))), max(1, int(np.ceil(height - 1e-6)))


def _premultiplied(cutout: np.ndarray, colours: Colours | None) -> np.ndarray:
    """Recolour RGBA, uint8 (4, H, W), and multiply the colours by alpha, so that transparent pixels add none."""
    alpha = cutout[3]
    opaque = alpha.astype(np.float32) / np.float32(255)
    painted = (colours(cutout[:3]) if colours else cutout[:3]) * opaque + np.float32(0.5)
    return np.concatenate([painted.astype(np.uint8), alpha[None]])


def _turn(cutout: np.ndarray, size: tuple[int, int], angle: float, box: tuple[int, int, int, int]) -> np.ndarray:
    """Resize an object, turn it, and crop the result.

    Args:
        cutout: uint8 (C, H, W).
        size: (width, height) in pixels after resizing.
        angle: counterclockwise rotation around the centre, in radians.
        box: the crop, xyxy in pixels of the bounding box of the turned object.

    Returns:
        float32 (C, rows, columns), on the scale of 0 to 255; zeros outside the object.
    """
    if size[0] < cutout.shape[2]:  # average first: grid_sample interpolates between four pixels only
        cutout = resize(cutout, size)
    source = torch.from_numpy(np.require(cutout, requirements=["C", "W"])).float()[None]
    turned = _extent(size, angle)
    columns, rows = (torch.arange(start, stop) + 0.5 for start, stop in ((box[0], box[2]), (box[1], box[3])))
    columns, rows = columns[None] - turned[0] / 2, rows[:, None] - turned[1] / 2
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))
    # Source of each pixel in grid_sample's coordinates: -1 to 1 between the borders of the object.
    grid = torch.empty(1, rows.shape[0], columns.shape[1], 2)
    torch.add(columns * (2 * cosine / size[0]), rows * (-2 * sine / size[0]), out=grid[0, ..., 0])
    torch.add(columns * (2 * sine / size[1]), rows * (2 * cosine / size[1]), out=grid[0, ..., 1])
    return F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].numpy()
