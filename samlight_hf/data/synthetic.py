"""Generate scenes of textured shapes from a seed, for demonstrations and tests."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from .dataset import ImageDataset
from .lazy import LazySample
from .samples import Instance, Sample, SkipReport


# Least visible share of a shape that is an instance.
MIN_VISIBLE = 0.25


class SyntheticScenes(ImageDataset):
    """Generator of images with 3 to 10 overlapping, textured shapes: a pure function of seed and index.

    Shapes are ellipses, polygons, stars, rings and blobs; textures are gradients, noise, stripes and checks. Shapes and
    background have the same distribution of colours and textures, and boxes have much background, so a model must find
    the edges. The mask of a shape has its visible part only.

    Args:
        num_images: number of images, at least 1.
        image_size: side of the square images in pixels, at least 16.
        seed: an integer of at least 0; another seed gives other scenes.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> scenes = SyntheticScenes(num_images=10)
        >>> scenes[0].image.size
        (128, 128)
    """

    def __init__(self, num_images: int, image_size: int = 128, seed: int = 0):
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"num_images={num_images!r} must be an integer of at least 1.")
        if not isinstance(image_size, int) or image_size < 16:
            raise ValueError(f"image_size={image_size!r} must be an integer of at least 16 pixels.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r} must be an integer of at least 0.")
        self._length, self.image_size, self.seed = num_images, image_size, seed
        self.index_report = SkipReport()

    def __len__(self) -> int:
        return self._length

    def files(self) -> set:
        return {("synthetic", self.seed)}

    def sample_id(self, index: int) -> str:
        return f"scene_{self.image_size}px_{self.seed}_{index}"

    def load(self, index: int) -> tuple[Sample, SkipReport]:
        index = range(len(self))[index]
        image, instances = self._scene(index)
        return Sample(self.sample_id(index), image, tuple(instances), *image.size), SkipReport()

    def open(self, index: int) -> LazySample:
        index = range(len(self))[index]
        image, instances = self._scene(index)
        return LazySample(self.sample_id(index), image, instances)

    def _scene(self, index: int) -> tuple[Image.Image, list[Instance]]:
        """Draw the image and the instances of one scene."""
        from ..masks.boxes import mask_extent

        generator = np.random.default_rng((self.seed, index))
        side = self.image_size
        canvas = np.empty((side, side, 3), dtype=np.float32)
        canvas[:] = _texture(generator, side, side)
        labels = np.zeros((side, side), dtype=np.uint8)
        areas = []
        for label in range(1, generator.integers(3, 11) + 1):
            shape = _shape(generator, side)
            extent = mask_extent(shape)
            assert extent is not None
            box = slice(extent[1], extent[3]), slice(extent[0], extent[2])
            inside = shape[box]
            canvas[box][inside] = _texture(generator, *inside.shape)[inside]
            labels[box][inside] = label
            areas.append(int(np.count_nonzero(inside)))
        canvas += generator.normal(scale=generator.uniform(1, 8), size=(side, side, 1)).astype(np.float32)
        image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
        return image, _instances(labels, areas)


def _instances(labels: np.ndarray, areas: list[int]) -> list[Instance]:
    """Make instances of the visible parts of labels 1, 2, ...; `areas` are those of the whole shapes in pixels."""
    from pycocotools import mask as coco_mask

    instances = []
    for label, whole_area in enumerate(areas, start=1):
        mask = labels == label
        area = np.count_nonzero(mask)
        if area < MIN_VISIBLE * whole_area:
            continue
        rle = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
        instances.append(Instance(label, rle, tuple(coco_mask.toBbox(rle).tolist()), float(area)))
    return instances


def _shape(generator: np.random.Generator, side: int) -> np.ndarray:
    """Draw a filled shape: bool (side, side), with at least one pixel."""
    radius = side * np.exp(generator.uniform(np.log(0.07), np.log(0.28)))
    centre = generator.uniform(0.1 * side, 0.9 * side, 2)
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    kind = int(generator.integers(5))
    outline = _outline(generator, kind)
    stretch = np.array([1.0, generator.uniform(0.4, 1.0)])
    turn = generator.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    outline = (outline * stretch) @ rotation * radius
    draw.polygon([tuple(point) for point in (outline + centre).tolist()], fill=1)
    if kind == 4:  # a ring
        hole = outline * generator.uniform(0.4, 0.75) + centre
        draw.polygon([tuple(point) for point in hole.tolist()], fill=0)
    draw.point(tuple((outline[0] + centre).clip(0, side - 1).tolist()), fill=1)  # so that no shape is empty
    return np.asarray(canvas).view(bool)


def _outline(generator: np.random.Generator, kind: int) -> np.ndarray:
    """Draw the corners of an ellipse, polygon, star, blob or ring of radius 1: float64 (n, 2)."""
    if kind == 1:
        num_corners = generator.integers(3, 7)
        angles = 2 * np.pi * (np.arange(num_corners) + generator.uniform(-0.3, 0.3, num_corners)) / num_corners
        radii = np.ones(num_corners)
    elif kind == 2:
        num_tips = generator.integers(4, 9)
        angles = np.pi * np.arange(2 * num_tips) / num_tips
        radii = np.where(np.arange(2 * num_tips) % 2, generator.uniform(0.3, 0.6), 1.0)
    else:
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        radii = np.ones(48)
        if kind == 3:
            for frequency in (2, 3, 5):
                radii += generator.uniform(0.1, 0.35) * np.sin(frequency * angles + generator.uniform(0, 2 * np.pi))
            radii /= radii.max()
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]


def _texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Mix two colours by a random pattern: float32 (height, width, 3), 0 to 255."""
    colours = generator.uniform(0, 255, (2, 3)).astype(np.float32)
    colours[1] = colours[0] + generator.uniform(0.1, 1.0) * (colours[1] - colours[0])
    pattern = PATTERNS[generator.integers(len(PATTERNS))](generator, height, width)[..., None]
    return colours[0] + pattern * (colours[1] - colours[0])


def _waves(generator: np.random.Generator, height: int, width: int, turn: float, period: float) -> np.ndarray:
    """Compute a sine wave, float32 (height, width), -1 to 1; `turn`: direction in radians, `period`: in pixels."""
    phase = generator.uniform(0, 2 * np.pi)
    x = np.cos(turn) * 2 * np.pi / period * np.arange(width) + phase
    y = np.sin(turn) * 2 * np.pi / period * np.arange(height)
    return np.sin(x + y[:, None]).astype(np.float32)


def _gradient(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    slopes = generator.uniform(-1, 1, 2)
    x, y = np.linspace(-0.5, 0.5, width, dtype=np.float32), np.linspace(-0.5, 0.5, height, dtype=np.float32)
    return 0.5 + np.float32(slopes[0]) * x + np.float32(slopes[1]) * y[:, None]


def _noise(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    grain = generator.integers(1, 12)
    coarse = generator.random((height // grain + 2, width // grain + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def _stripes(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    sharpness = generator.uniform(0.5, 4)
    waves = _waves(generator, height, width, generator.uniform(0, np.pi), generator.uniform(4, 24))
    return (0.5 + np.float32(sharpness) * waves).clip(0, 1)


def _checks(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    turn, period = generator.uniform(0, np.pi), generator.uniform(6, 28)
    first = _waves(generator, height, width, turn, period)
    second = _waves(generator, height, width, turn + np.pi / 2, period)
    return (first * second > 0).astype(np.float32)


PATTERNS: tuple[Callable, ...] = (_gradient, _noise, _stripes, _checks)
