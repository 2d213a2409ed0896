"""Crop, resize, flip and recolour an image into SAM's square frame, and transform its masks likewise.

The frame has `image_size` x `image_size` pixels, with the image at the upper left and zeros elsewhere. Masks cover the
same frame with `mask_size` x `mask_size` cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..masks.boxes import mask_extent
from .lazy import LazySample, decode_columns


@dataclass(frozen=True)
class Augmentation:
    """Settings for random changes of an image. By default there are none: the longest side becomes `image_size`.

    Attributes:
        scale: lowest and highest zoom, drawn log-uniformly. A zoom above 1 fills the frame with a random crop that has
            1 / zoom of the image's width and height. A zoom below 1 scales the whole image to that share of the frame.
        stretch: largest factor by which one side, either of them, is scaled more than the other, drawn log-uniformly;
            1 for none.
        flip: mirror half of the images left to right.
        brightness, contrast, saturation: strength x of each change, from 0 to 1: it is multiplied by a factor drawn
            uniformly from 1 - x to 1 + x.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> augmentation = Augmentation(scale=(0.5, 2.0), flip=True, brightness=0.2)
    """

    scale: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self):
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < float("inf"):
            raise ValueError(f"scale={self.scale!r} must be the lowest and the highest zoom, both above 0.")
        if not 1 <= self.stretch < float("inf"):
            raise ValueError(f"stretch={self.stretch!r} must be a number of at least 1, which is no stretch.")
        check_strengths(self, "brightness", "contrast", "saturation")

    def view(self, generator: np.random.Generator, width: int, height: int, image_size: int) -> "View":
        """Draw the crop, the size and the flip of an image.

        Args:
            generator: source of randomness.
            width, height: size of the image in pixels.
            image_size: side of the frame in pixels.
        """
        zoom = np.exp(generator.uniform(*np.log(self.scale)))
        flip = bool(generator.integers(2)) and self.flip
        corner = generator.random(2)
        crop = [max(1, round(side / max(1.0, zoom))) for side in (width, height)]
        left, top = (int(u * (side - cropped + 1)) for u, side, cropped in zip(corner, (width, height), crop))
        stretched: Sequence[float] = crop
        if self.stretch > 1:
            factor = np.exp(generator.uniform(-0.5, 0.5) * np.log(self.stretch))
            stretched = crop[0] * factor, crop[1] / factor
        # Rounded as transformers' SamImageProcessor does.
        scale = image_size * min(1.0, zoom) / max(stretched)
        resized_width, resized_height = (max(1, int(side * scale + 0.5)) for side in stretched)
        box = (left, top, left + crop[0], top + crop[1])
        return View(width, height, box, (resized_width, resized_height), flip, image_size)

    def colours(self, generator: np.random.Generator) -> "Colours | None":
        """Draw the change of colours, or None if there is none."""
        return draw_colours(generator, self.brightness, self.contrast, self.saturation)


class Colours(NamedTuple):
    """Combined change of brightness, contrast and saturation, which are all linear in the colours.

    A channel c of a pixel with luma y becomes `own * c + luma * y + shift`.

    Attributes:
        own: factor of the channel itself.
        luma: factor of the pixel's luma.
        shift: constant, on the scale of 0 to 255.
    """

    own: float
    luma: float
    shift: float

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Apply the change: uint8 (3, H, W) -> uint8 (3, H, W)."""
        # numpy rounds after each operation, so the bytes do not depend on the processor or the number of threads.
        red, green, blue = changed = pixels.astype(np.float32)
        luma = red * np.float32(0.299 * self.luma)
        luma += green * np.float32(0.587 * self.luma)
        luma += blue * np.float32(0.114 * self.luma)
        luma += np.float32(self.shift + 0.5)  # + 0.5, because the conversion to uint8 truncates
        changed *= np.float32(self.own)
        changed += luma
        return changed.clip(0, 255, out=changed).astype(np.uint8)


def draw_colours(
    generator: np.random.Generator, brightness: float, contrast: float, saturation: float
) -> Colours | None:
    """Draw a change of colours with the strengths of `Augmentation`, or None if all of them are 0."""
    draws = generator.uniform(-1, 1, 3)
    if not (brightness or contrast or saturation):
        return None
    bright, contrasted, saturated = (1 + draws * (brightness, contrast, saturation)).tolist()
    factor = bright * contrasted  # contrast changes the distance to middle grey
    return Colours(factor * saturated, factor * (1 - saturated), 127.5 * (1 - contrasted))


@dataclass(frozen=True)
class View:
    """Crop of an image, and its size in the frame. Its upper left corner is that of the frame.

    Attributes:
        width, height: size of the image in pixels.
        crop: (left, top, right, bottom) in pixels of the image, right and bottom exclusive.
        size: (width, height) of the resized crop in pixels of the frame.
        flip: whether the crop is mirrored left to right.
        image_size: side of the frame in pixels.
    """

    width: int
    height: int
    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool
    image_size: int

    def pixels(self, sample: LazySample, colours: Colours | None = None) -> np.ndarray:
        """Crop, resize, mirror and recolour the image.

        Mirroring and recolouring come before or after resizing, where there are fewer pixels.

        Args:
            sample: the image.
            colours: the change of colours, or None.

        Returns:
            uint8 (3, height, width), (width, height) being `size`.

        Raises:
            SampleError: if the image is damaged.
        """
        left, top, right, bottom = self.crop
        # Least size of the whole image at which the crop need not be enlarged.
        min_size = (
            max(1, self.width * self.size[0] // (right - left)),
            max(1, self.height * self.size[1] // (bottom - top)),
        )
        pixels, reduction = sample.pixels(min_size)
        if reduction == 1:
            pixels = pixels[:, top:bottom, left:right]
            is_enlarged = pixels[0].size < self.size[0] * self.size[1]
            if is_enlarged:
                pixels = self._varied(pixels, colours)
            pixels = resize(pixels, self.size)
            return pixels if is_enlarged else self._varied(pixels, colours)
        # In a reduced JPEG, the crop may begin and end within pixels, which torch does not support.
        height, width = pixels.shape[1:]
        box = left / reduction, top / reduction, min(right / reduction, width), min(bottom / reduction, height)
        return self._varied(resize_box(pixels, self.size, box), colours)

    def _varied(self, pixels: np.ndarray, colours: Colours | None) -> np.ndarray:
        """Mirror and recolour uint8 (3, H, W)."""
        if self.flip:
            pixels = pixels[:, :, ::-1]
        return colours(pixels) if colours else pixels

    def mask(self, rle: dict, mask_size: int) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Crop, resize and mirror a mask.

        Args:
            rle: compressed COCO RLE of the whole mask.
            mask_size: side of the result in cells.

        Returns:
            None if the crop has nothing of the mask. Else the cells of the frame that are at least half object, bool
            (mask_size, mask_size); the tight box, float64 (4,), xyxy in pixels of the frame; and the share of the
            mask's pixels that the crop has.
        """
        from pycocotools import mask as coco_mask

        x, y, width, height = map(int, coco_mask.toBbox(rle))
        left, top, right, bottom = self.crop
        x0, y0, x1, y1 = max(x, left), max(y, top), min(x + width, right), min(y + height, bottom)
        if x0 >= x1 or y0 >= y1:
            return None
        pixels = decode_columns(rle, x0, x1)[:, y0:y1]  # (columns, rows)
        share = 1.0
        if (x0, y0, x1, y1) != (x, y, x + width, y + height):  # cut by the crop: find what is left
            extent = mask_extent(pixels.T)
            if extent is None:
                return None
            pixels = pixels[extent[0] : extent[2], extent[1] : extent[3]]
            x0, y0 = x0 + extent[0], y0 + extent[1]
            share = np.count_nonzero(pixels) / int(coco_mask.area(rle))
        x0, y0 = x0 - left, y0 - top
        if self.flip:
            x0, pixels = right - left - x0 - pixels.shape[0], pixels[::-1]
        x1, y1 = x0 + pixels.shape[0], y0 + pixels.shape[1]
        scale_x, scale_y = self.size[0] / (right - left), self.size[1] / (bottom - top)
        box = np.array([x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y])
        cell = self.image_size / mask_size
        return to_cells(pixels.T, x0, y0, cell / scale_x, cell / scale_y, mask_size), box, share


def to_cells(
    pixels: np.ndarray, left: int, top: int, cell_width: float, cell_height: float, mask_size: int
) -> np.ndarray:
    """Resample a mask to a grid: find the cells that are at least half object.

    Args:
        pixels: uint8 0 or 1 (rows, columns), the part of a mask that has the whole object.
        left, top: position of the part from the upper left corner of the grid, in its own pixels; not negative.
        cell_width, cell_height: size of a cell in pixels of the part. Below 1, a cell takes the pixel at its centre.
        mask_size: side of the grid in cells.

    Returns:
        bool (mask_size, mask_size).
    """
    grid = np.zeros((mask_size, mask_size), dtype=bool)
    spans = []
    for start, length, cell in ((left, pixels.shape[1], cell_width), (top, pixels.shape[0], cell_height)):
        first, last = int(start / cell), min(mask_size, int(np.ceil((start + length) / cell)))
        # Whole pixels that cover these cells; those outside the part are background.
        begin, end = int(first * cell), max(start + length, int(np.ceil(last * cell)))
        spans.append((first, last, begin, end))
    (column, column_end, x, x_end), (row, row_end, y, y_end) = spans
    if column >= column_end or row >= row_end:
        return grid
    padded = np.zeros((y_end - y, x_end - x), dtype=np.uint8)
    padded[top - y : top - y + pixels.shape[0], left - x : left - x + pixels.shape[1]] = pixels * np.uint8(255)
    box = (
        column * cell_width - x,
        row * cell_height - y,
        min(column_end * cell_width - x, x_end - x),
        min(row_end * cell_height - y, y_end - y),
    )
    share = Image.fromarray(padded).resize((column_end - column, row_end - row), Image.Resampling.BOX, box)
    grid[row:row_end, column:column_end] = np.asarray(share) >= 128
    return grid


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 (C, H, W) to `size`, (width, height): as `resize_box` of the whole, in a third of the time."""
    if pixels.shape[:0:-1] == tuple(size):
        return pixels
    # uint8 is interpolated in integers, with the same result for any number of threads.
    batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))[None]
    return F.interpolate(batch, size[::-1], mode="bilinear", antialias=True)[0].numpy()


def resize_box(pixels: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Resize a part of uint8 (C, H, W): `box`, xyxy in pixels and fractions of them, to `size`, (width, height)."""
    resized = [Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR, box) for channel in pixels]
    return np.stack([np.asarray(channel) for channel in resized])


def check_strengths(settings, *names: str):
    """Raise ValueError unless each of the named fields is from 0 to 1."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name}={getattr(settings, name)!r} must be from 0 to 1.")
