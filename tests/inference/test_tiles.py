"""Tiles: their grid, and one mask for each object however the seams go, by a segmenter that is always right."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from samlight_hf import MaskGenerator, TileSettings
from samlight_hf.images.rasters import ArrayRaster
from samlight_hf.images.reading import ImageError
from samlight_hf.inference.tile_merging import generated_masks, merge_tiles
from samlight_hf.inference.tiles import MemoryStore, TileGrid, segment_tiles
from samlight_hf.loading import load_model
from samlight_hf.masks.boxes import mask_edges
from samlight_hf.masks.results import GeneratedMasks
from samlight_hf.masks.rle import RunLengthMasks


SETTINGS = TileSettings(size=64, overlap=16)


def all_right(tile: torch.Tensor) -> GeneratedMasks:
    """Return a mask for each colour of a tile but black: the objects of the images have a colour each."""
    pixels = tile.numpy().astype(int)
    colours = (pixels[0] << 16) + (pixels[1] << 8) + pixels[2]
    masks = (
        np.array([colours == colour for colour in np.unique(colours) if colour])
        .reshape(-1, *colours.shape)
        .astype(bool)
    )
    count = len(masks)
    scores, points = np.linspace(0.9, 0.8, count, dtype=np.float32), np.zeros((count, 2), dtype=np.float32)
    boxes = mask_edges(masks)
    return GeneratedMasks(RunLengthMasks.from_masks(masks), scores, boxes, scores, points, boxes)


def objects_of(image: np.ndarray, settings=SETTINGS, segment=all_right, **options):
    grid, store = TileGrid(*image.shape[:2], settings), MemoryStore()
    segment_tiles(segment, ArrayRaster(image), grid, store)
    return list(merge_tiles(grid, store, **options))


def shapes(width: int, height: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw objects across every seam, at the corners of four tiles, larger than a tile, and from side to side."""
    boxes = [("rectangle", (0, 2, width, 6)), ("ellipse", (5, 60, 105, 130))]  # from side to side; larger than a tile
    for tile in TileGrid(height, width, SETTINGS):
        x1, y1, x2, y2 = tile.box_xyxy
        boxes += [
            ("ellipse", (x2 - 22, y1 + 22, x2 + 6, y1 + 34)),  # across the seam at the right, longer than the overlap
            ("rectangle", (x1 + 22, y2 - 24, x1 + 26, y2 + 5)),  # across the seam below
            ("ellipse", (x2 - 12, y2 - 12, x2 - 4, y2 - 4)),  # within the overlap of four tiles
            ("rectangle", (x1 + 36, y1 + 38, x1 + 38, y1 + 40)),  # in one tile
        ]
    image, masks = np.zeros((height, width, 3), dtype=np.uint8), []
    for number, (kind, box) in enumerate(boxes, start=1):
        canvas = Image.new("L", (width, height))
        getattr(ImageDraw.Draw(canvas), kind)(box, fill=1)
        mask = np.array(canvas) > 0
        if mask.any() and not image[mask].any():  # whole ones only: nothing covers another
            image[mask] = number * 37 % 256, number * 91 % 256, 1 + number // 256
            masks.append(mask)
    return image, masks


@pytest.mark.parametrize(("width", "height"), [(64, 64), (160, 112), (171, 133), (50, 200), (65, 64)])
def test_each_object_has_one_mask_whole(width, height):
    image, truth = shapes(width, height)
    objects = objects_of(image)
    assert len(TileGrid(height, width, SETTINGS)) > 1 or (width, height) == (64, 64)
    found = {one.mask.pixels((0, 0, width, height)).tobytes() for one in objects}
    assert found == {mask.tobytes() for mask in truth}
    assert len(objects) == len(truth)
    assert not any(one.is_cut for one in objects)


def test_masks_that_differ_in_the_overlap_are_still_one():
    """The tile at the right sees one pixel less all around: no duplicate, and no cut edge."""
    image = np.zeros((64, 112, 3), dtype=np.uint8)
    image[20:40, 30:90] = 200

    def segment(tile):
        segment.calls += 1
        if segment.calls == 2:
            smaller = np.zeros_like(tile.numpy())
            smaller[:, 21:39, : 90 - 48 - 1] = 200
            tile = torch.from_numpy(smaller)
        return all_right(tile)

    segment.calls = 0
    (one,) = objects_of(image, segment=segment)
    assert one.mask.box_xyxy == (30, 20, 89, 40)
    assert one.num_tiles == 2


def test_a_fragment_that_the_neighbour_sees_whole_is_left_out():
    """An object of one tile reaches 10 pixels into the next, which sees it as part of something else."""
    image = np.zeros((64, 112, 3), dtype=np.uint8)
    image[10:50, 20:58] = 200  # the tile at the right begins at 48, and its fragment is 10 pixels wide

    def segment(tile):
        masks = all_right(tile)
        segment.calls += 1
        if segment.calls == 1:  # the whole object, and half of it as well: neither agrees with the fragment
            half = masks.masks.to_masks()
            half[:, 20:] = False
            boxes = mask_edges(half)
            return GeneratedMasks(
                RunLengthMasks.from_masks(half), masks.scores, boxes, masks.scores, masks.points_xy, boxes
            )
        return masks

    segment.calls = 0
    (one,) = objects_of(image, segment=segment)
    assert one.mask.box_xyxy == (20, 10, 58, 20)


def test_an_object_that_ends_at_a_seam_says_so():
    image = np.zeros((64, 112, 3), dtype=np.uint8)
    image[10:50, 60:100] = 200  # the left tile has 4 pixels of it, the right one all
    image[10:50, 20:60] = 200
    left = iter((True, False))
    (one,) = objects_of(image, segment=lambda tile: all_right(tile if next(left) else torch.zeros_like(tile)))
    assert one.is_cut
    assert one.mask.box_xyxy == (20, 10, 64, 50)


def test_duplicates_go_by_their_boxes():
    image, _ = shapes(160, 112)
    twice = lambda tile: (lambda m: m[np.repeat(np.arange(len(m)), 2)])(all_right(tile))  # noqa: E731
    assert len(objects_of(image, segment=twice)) == len(objects_of(image))
    assert len(objects_of(image, segment=twice, nms_iou=1.0)) == 2 * len(objects_of(image))


@pytest.mark.parametrize("width", [64, 112])
def test_a_stray_pixel_makes_no_second_object(width):
    """The worse of two masks has a pixel far off, so that their boxes differ. One tile keeps both, as one pass does."""
    image = np.zeros((64, width, 3), dtype=np.uint8)
    image[10:30, 4:24] = 200

    def segment(tile):
        if not tile.any():
            return all_right(tile)
        masks = np.repeat((tile[0] > 0).numpy()[None], 2, axis=0)
        masks[0, 60, 40] = True
        scores, points = np.array([0.7, 0.8], dtype=np.float32), np.zeros((2, 2), dtype=np.float32)
        boxes = mask_edges(masks)
        return GeneratedMasks(RunLengthMasks.from_masks(masks), scores, boxes, scores, points, boxes)

    objects = objects_of(image, segment=segment)
    assert [one.mask.area for one in objects] == ([401, 400] if width == 64 else [400])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 112, 113, 1000, 12_345])
def test_tiles_cover_the_image_with_the_overlap(length):
    tiles = [tile.box_xyxy for tile in TileGrid(8, length, SETTINGS)]
    assert (tiles[0][0], tiles[-1][2]) == (0, length)
    assert all(box[2] - box[0] == min(64, length) for box in tiles)
    assert all(16 <= before[2] - after[0] < 64 for before, after in pairwise(tiles))
    needed = 1 if length <= 64 else -(-(length - 16) // 48)
    assert len(tiles) == needed
    ends = [(start, min(start + 16, length)) for start in range(max(1, length - 15))]  # of objects like the overlap
    assert all(any(box[0] <= start and end <= box[2] for box in tiles) for start, end in ends)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0 of tiles must be an integer of at least 1"),
        ({"size": 64.0}, "size=64.0"),
        ({"size": 64, "overlap": 64}, "overlap=64 of tiles must be smaller than their size=64: a quarter of it, 16."),
        ({"size": 64, "overlap": 100}, "overlap=100 of tiles must be smaller"),
        ({"overlap": -1}, "overlap=-1"),
        ({"match_iou": 0}, "match_iou=0 must be above 0"),
    ],
)
def test_tiles_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TileSettings(**settings)


@pytest.fixture(scope="module")
def generators(folder):
    model, processor = load_model(folder, "cpu")
    return MaskGenerator(model, processor), MaskGenerator(model, processor, tiles=TileSettings(48, 16))


KEEP_ALL = {"points_per_crop": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


def test_the_generator_in_tiles(generators, tmp_path):
    whole, tiled = generators
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    one_tile, plain = tiled(image, **KEEP_ALL), whole(image, **KEEP_ALL)  # smaller than a tile
    assert {mask.tobytes() for mask in one_tile.masks} == {mask.tobytes() for mask in plain.masks if mask.any()}
    large = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    result = tiled(large, **KEEP_ALL)
    assert result.masks[0].shape == (100, 120)
    assert len({tuple(box) for box in result.crop_boxes_xyxy.tolist()}) > 1
    np.testing.assert_array_equal(result.boxes_xyxy, mask_edges(result.masks.to_masks()))
    assert (np.diff(result.scores) <= 0).all()
    Image.fromarray(large).save(tmp_path / "large.png")
    (tmp_path / "empty.png").touch()
    again, failed = pickle.loads(pickle.dumps(tiled))([tmp_path / "large.png", tmp_path / "empty.png"], **KEEP_ALL)
    assert again.masks.to_coco() == result.masks.to_coco()
    assert isinstance(failed, ImageError)
    nothing, again = tiled([None, large], **KEEP_ALL)  # not the image before
    assert isinstance(nothing, ImageError) and again.masks.to_coco() == result.masks.to_coco()


def test_objects_as_masks_of_one_image():
    image, truth = shapes(160, 112)
    result = generated_masks(objects_of(image), 112, 160)
    assert {mask.tobytes() for mask in result.masks} == {mask.tobytes() for mask in truth}
    assert len(generated_masks([], 112, 160)) == 0
