"""From a picture to SAM's square frame: crop, resize, flip, colour; and the same for its masks.

The frame of `image_size` pixels has the picture at its upper left, zeros at right and bottom. Masks are in the same frame
in cells of `image_size / mask_size` pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .lazy import LazySample, decode_columns


@dataclass(frozen=True)
class Augmentation:
    """How a picture is varied. By default it is not: the longest side becomes `image_size`, as in SAM.

    Attributes:
        scale: lowest and highest zoom, drawn evenly on a logarithmic scale. Above 1, a part of the picture as much
            smaller, of the picture's own shape and anywhere in it, fills the frame. Below 1, the whole picture is as
            much smaller than the frame.
        stretch: largest factor by which one side is scaled more than the other, drawn evenly on a logarithmic scale; either
            of them may be.
        flip: whether half of the pictures are mirrored left to right.
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
        """Where a picture of `width` x `height` pixels goes."""
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

    def recolour(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """An RGB image with other brightness, contrast and saturation."""
        return recolour(image, generator, self.brightness, self.contrast, self.saturation)


@dataclass(frozen=True)
class View:
    """The part of a picture that is seen, and where it lies in the frame.

    Attributes:
        width, height: of the picture.
        crop: (left, top, right, bottom), pixels of the picture, right and bottom exclusive.
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

    def image(self, sample: LazySample) -> Image.Image:
        """What is seen of the picture, RGB of `size`. Raises `SampleError` for a damaged picture."""
        left, top, right, bottom = self.crop
        # So large must the whole picture be for the crop not to be enlarged.
        enough = (
            max(1, self.width * self.size[0] // (right - left)),
            max(1, self.height * self.size[1] // (bottom - top)),
        )
        image, reduction = sample.decode(enough)
        box = (
            left / reduction,
            top / reduction,
            min(right / reduction, image.width),
            min(bottom / reduction, image.height),
        )
        image = image.resize(self.size, Image.Resampling.BILINEAR, box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

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
            columns, rows = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
            if not len(columns):
                return None
            pixels = pixels[columns[0] : columns[-1] + 1, rows[0] : rows[-1] + 1]
            x0, y0 = x0 + columns[0], y0 + rows[0]
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


def recolour(
    image: Image.Image, generator: np.random.Generator, brightness: float, contrast: float, saturation: float
) -> Image.Image:
    """An RGB image with brightness, contrast and saturation multiplied by factors drawn from 1 - x to 1 + x."""
    draws = generator.uniform(-1, 1, 3)
    if not (brightness or contrast or saturation):
        return image
    bright, contrasted, saturated = 1 + draws * (brightness, contrast, saturation)
    # All three are linear in the colours: one matrix, one pass. Contrast is around the middle grey.
    luma = np.array([0.299, 0.587, 0.114])
    colours = bright * contrasted * (saturated * np.eye(3) + (1 - saturated) * luma)
    shift = np.full((3, 1), 127.5 * (1 - contrasted))
    return image.convert("RGB", tuple(np.hstack([colours, shift]).ravel().tolist()))


def check_strengths(settings, *names: str):
    """Raises ValueError unless each of these fields is from 0 to 1."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name}={getattr(settings, name)!r} must be from 0 to 1.")
