"""Tiles of real photographs by the bundled checkpoint, at 256 px: one mask for each object also across seams."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from samlight_hf import MaskGenerationSettings, MaskGenerator, TileSettings
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES
from samlight_hf.conversion import resize_model, resize_processor
from samlight_hf.inference.tiles import TileGrid
from samlight_hf.loading import load_model


# Nine photographs on a bright ground and 2x2 tiles, whose seams cut the photographs of the middle row and column: no
# tile shows more than two thirds of one of them.
TILES = TileSettings(size=256, overlap=40)
SIDE, SIDE_OF_PHOTOGRAPH, GAP = 2 * 256 - 40, 120, 46
CUT = (1, 3, 4, 5, 7)
SETTINGS = MaskGenerationSettings(8, pred_iou_thresh=0.3, stability_score_thresh=0.5)


@pytest.fixture(scope="module")
def generators():
    """Everything mode of the bundled checkpoint, in one pass and in tiles."""
    if not BUNDLED_CHECKPOINT.is_dir():
        pytest.skip("the bundled checkpoint is part of a clone of the repository")
    model, processor = load_model(BUNDLED_CHECKPOINT, "cpu")
    processor = resize_processor(processor, 256, model.config.vision_config.patch_size)
    model = resize_model(model, 256)
    return MaskGenerator(model, processor), MaskGenerator(model, processor, tiles=TILES)


def mosaic(first: int) -> tuple[np.ndarray, list[tuple[slice, slice]]]:
    """Return nine photographs side by side, uint8 (SIDE, SIDE, 3), and the rows and columns of each."""
    image, places = np.full((SIDE, SIDE, 3), 235, dtype=np.uint8), []
    for number in range(9):
        name = ("cat", "rocket", "coffee")[(number + first) % 3]
        photograph = Image.open(EXAMPLE_IMAGES / f"{name}.jpg").convert("RGB")
        starts = (10 + (SIDE_OF_PHOTOGRAPH + GAP) * index for index in divmod(number, 3))
        places.append(tuple(slice(start, start + SIDE_OF_PHOTOGRAPH) for start in starts))
        image[places[-1]] = ImageOps.fit(photograph, (SIDE_OF_PHOTOGRAPH, SIDE_OF_PHOTOGRAPH))
    return image, places


def ious(masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return (masks & truth).sum(axis=(1, 2)) / (masks | truth).sum(axis=(1, 2))


def rectangle(place: tuple[slice, slice], shape: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[place] = True
    return mask


def in_one_pass(generator: MaskGenerator, image: np.ndarray, place: tuple[slice, slice]) -> float:
    """Return the best IoU with a photograph of the masks of an image that shows it alone, whole."""
    view = tuple(slice(max(0, part.start - GAP // 2), part.stop + GAP // 2) for part in place)
    truth = rectangle(place)[view]
    masks = generator(image[view], SETTINGS).masks.to_masks()
    return ious(masks, truth).max(initial=0)


def test_no_tile_shows_a_cut_photograph_whole():
    _, places = mosaic(0)
    grid = TileGrid(SIDE, SIDE, TILES)
    assert grid.shape == (2, 2)
    for number, place in enumerate(places):
        shown = [rectangle(place)[y1:y2, x1:x2].sum() for _, _, (x1, y1, x2, y2) in grid]
        assert (max(shown) < 0.7 * SIDE_OF_PHOTOGRAPH**2) == (number in CUT)


@pytest.mark.slow
def test_photographs_that_seams_cut_are_found_whole(generators):
    """Several of them are, nearly as well as in one pass over the photograph alone, and no object is found twice."""
    one_pass, tiled = generators
    found, alone = [], []
    for first in range(2):
        image, places = mosaic(first)
        masks = tiled(image, SETTINGS).masks.to_masks()
        for index, mask in enumerate(masks):
            assert ious(masks[:index], mask).max(initial=0) <= 0.7
        found += [ious(masks, rectangle(places[number])).max(initial=0) for number in CUT]
        alone += [in_one_pass(one_pass, image, places[number]) for number in CUT]
    assert sum(iou >= 0.7 for iou in found) >= 3  # more than a tile alone could find
    assert np.mean(found) > np.mean(alone) - 0.3


@pytest.mark.slow
def test_a_photograph_in_tiles_has_no_mask_twice(generators):
    """A photograph without known boundaries: objects are merged, and no two of them are the same."""
    _, tiled = generators
    image = Image.open(EXAMPLE_IMAGES / "coffee.jpg")
    result = tiled(image, SETTINGS)
    masks = result.masks.to_masks()
    assert len(masks) > 5
    for index, mask in enumerate(masks):
        assert ious(masks[:index], mask).max(initial=0) <= 0.7
    # In objects of several tiles are pixels outside of the tile of their best mask.
    tiles = torch.from_numpy(result.crop_boxes_xyxy)
    boxes = torch.from_numpy(result.boxes_xyxy)
    assert ((boxes[:, :2] < tiles[:, :2]) | (boxes[:, 2:] > tiles[:, 2:])).any()
