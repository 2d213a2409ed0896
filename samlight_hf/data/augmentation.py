"""From an image to SAM's square frame: crop, resize, flip, colour; and the same for its masks.

The frame of `image_size` pixels has the image at its upper left, zeros at right and bottom. Masks are in the same frame
in cells of `image_size / mask_size` pixels.
"""

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
    """How an image is varied. By default it is not: the longest side becomes `image_size`, as in SAM.

    Attributes:
        scale: lowest and highest zoom, drawn evenly on a logarithmic scale. Above 1, a part of the image as much
            smaller, of the image's own shape and anywhere in it, fills the frame. Below 1, the whole image is as
            much smaller than the frame.
        stretch: largest factor by which one side is scaled more than the other, drawn evenly on a logarithmic scale; either
            of them may be.
        flip: whether half of the images are mirrored left to right.
        brightness, contrast, saturation: each is multiplied by a factor drawn from 1 - x to 1 + x.
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
            raise ValueError(f"stretch={self.stretch!r} must be at least 1, which is none.")
        check_strengths(self, "brightness", "contrast", "saturation")

    def view(self, generator: np.random.Generator, width: int, height: int, image_size: int) -> "View":
        """Where an image of `width` x `height` pixels goes."""
        zoom = np.exp(generator.uniform(*np.log(self.scale)))
        flip = bool(generator.integers(2)) and self.flip
        corner = generator.random(2)
        crop = [max(1, round(side / max(1.0, zoom))) for side in (width, height)]
        left, top = (int(u * (side - kept + 1)) for u, side, kept in zip(corner, (width, height), crop))
        stretched = crop
        if self.stretch > 1:
            factor = np.exp(generator.uniform(-0.5, 0.5) * np.log(self.stretch))
            stretched = crop[0] * factor, crop[1] / factor
        # Rounded as transformers' SamImageProcessor does.
        scale = image_size * min(1.0, zoom) / max(stretched)
        size = tuple(max(1, int(side * scale + 0.5)) for side in stretched)
        return View(width, height, (left, top, left + crop[0], top + crop[1]), size, flip, image_size)

    def colours(self, generator: np.random.Generator) -> "Colours | None":
        """How the colours change; None where they do not."""
        return draw_colours(generator, self.brightness, self.contrast, self.saturation)


class Colours(NamedTuple):
    """A change of brightness, contrast and saturation: all three are linear in the colours, so one pass makes them.

    A channel c of a pixel whose luma is y becomes `own * c + luma * y + shift`.
    """

    own: float
    luma: float
    shift: float

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (3, H, W) -> the same, changed."""
        # numpy rounds each operation by itself: the same bytes whatever the processor and the number of threads.
        red, green, blue = changed = pixels.astype(np.float32)
        luma = red * np.float32(0.299 * self.luma)
        luma += green * np.float32(0.587 * self.luma)
        luma += blue * np.float32(0.114 * self.luma)
        luma += np.float32(self.shift + 0.5)  # what follows cuts off the fraction
        changed *= np.float32(self.own)
        changed += luma
        return changed.clip(0, 255, out=changed).astype(np.uint8)


def draw_colours(
    generator: np.random.Generator, brightness: float, contrast: float, saturation: float
) -> Colours | None:
    """Brightness, contrast and saturation multiplied by factors drawn from 1 - x to 1 + x; None where all of them are 0."""
    draws = generator.uniform(-1, 1, 3)
    if not (brightness or contrast or saturation):
        return None
    bright, contrasted, saturated = (1 + draws * (brightness, contrast, saturation)).tolist()
    factor = bright * contrasted  # contrast is around the middle grey
    return Colours(factor * saturated, factor * (1 - saturated), 127.5 * (1 - contrasted))


@dataclass(frozen=True)
class View:
    """The part of an image that is seen, and where it lies in the frame.

    Attributes:
        width, height: of the image.
        crop: (left, top, right, bottom), pixels of the image, right and bottom exclusive.
        size: (width, height) of what is seen, pixels of the frame.
        flip: mirrored left to right after cropping.
        image_size: side of the frame.
    """

    width: int
    height: int
    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool
    image_size: int

    def pixels(self, sample: LazySample, colours: Colours | None = None) -> np.ndarray:
        """What is seen of the image with changed colours, uint8 (3, height, width) of `size`.

        Colours are changed and pixels mirrored where there are fewer of them, before or after resizing.

        Raises:
            SampleError: for a damaged image.
        """
        left, top, right, bottom = self.crop
        # So large must the whole image be for the crop not to be enlarged.
        enough = (
            max(1, self.width * self.size[0] // (right - left)),
            max(1, self.height * self.size[1] // (bottom - top)),
        )
        pixels, reduction = sample.pixels(enough)
        if reduction == 1:
            pixels = pixels[:, top:bottom, left:right]
            is_enlarged = pixels[0].size < self.size[0] * self.size[1]
            if is_enlarged:
                pixels = self._varied(pixels, colours)
            pixels = resize(pixels, self.size)
            return pixels if is_enlarged else self._varied(pixels, colours)
        # The crop begins and ends within pixels of what a JPEG was reduced to, which torch cannot do.
        height, width = pixels.shape[1:]
        box = left / reduction, top / reduction, min(right / reduction, width), min(bottom / reduction, height)
        return self._varied(resize_box(pixels, self.size, box), colours)

    def _varied(self, pixels: np.ndarray, colours: Colours | None) -> np.ndarray:
        if self.flip:
            pixels = pixels[:, :, ::-1]
        return colours(pixels) if colours else pixels

    def mask(self, rle: dict, mask_size: int) -> tuple[np.ndarray, np.ndarray, float] | None:
        """What is seen of a mask, or None where nothing of it is.

        Returns:
            Cells that are at least half object, bool (mask_size, mask_size); the tight box, float64 xyxy in pixels of
            the frame; the share of the mask's pixels that lie in the crop.
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
    """Which cells of a grid are at least half object, bool (mask_size, mask_size).

    Args:
        pixels: uint8 0 or 1 (rows, columns), a part of a mask that holds all of the object.
        left, top: where the part lies, in its own pixels, from the upper left corner of the grid. Not negative.
        cell_width, cell_height: size of a cell in pixels of the part. Under 1, a cell takes the pixel at its centre.
    """
    grid = np.zeros((mask_size, mask_size), dtype=bool)
    spans = []
    for start, length, cell in ((left, pixels.shape[1], cell_width), (top, pixels.shape[0], cell_height)):
        first, last = int(start / cell), min(mask_size, int(np.ceil((start + length) / cell)))
        # The whole pixels that hold all of these cells: outside of the part, nothing is object.
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
    """uint8 (C, H, W) at `size`, (width, height): as `resize_box` of the whole, in a third of the time."""
    if pixels.shape[:0:-1] == tuple(size):
        return pixels
    # In whole numbers, which are the same for any number of threads.
    pixels = torch.from_numpy(np.require(pixels, requirements="CW"))[None]
    return F.interpolate(pixels, size[::-1], mode="bilinear", antialias=True)[0].numpy()


def resize_box(pixels: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """What lies in `box`, xyxy in pixels of uint8 (C, H, W) and fractions of them, at `size`, (width, height)."""
    resized = [Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR, box) for channel in pixels]
    return np.stack([np.asarray(channel) for channel in resized])


def check_strengths(settings, *names: str):
    """Raises ValueError unless each of these fields is from 0 to 1."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name}={getattr(settings, name)!r} must be from 0 to 1.")
