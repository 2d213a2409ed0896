"""Check that overlays change only the pixels of masks, and that contact sheets show all panels."""

import numpy as np
import pytest
from PIL import Image

from samlight_hf.masks.drawing import COLOURS, Panel, contact_sheet, draw_overlay
from samlight_hf.masks.results import MaskResult
from samlight_hf.masks.rle import RunLengthMasks


def result_of(*masks: np.ndarray) -> MaskResult:
    masks = np.stack(masks)
    return MaskResult(masks, np.ones(len(masks), dtype=np.float32), np.zeros((len(masks), 4), dtype=np.float32))


def rectangle(x1, y1, x2, y2, size=(60, 40)) -> np.ndarray:
    mask = np.zeros(size[::-1], dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.fixture
def image():
    return Image.new("RGB", (60, 40), (100, 100, 100))


def test_fill_is_translucent_and_the_contour_is_not(image):
    mask = rectangle(10, 5, 30, 25)
    overlay = np.asarray(draw_overlay(image, result_of(mask)))
    assert (overlay[~mask] == 100).all()
    assert (overlay[5, 10:30] == COLOURS[0]).all()
    assert (overlay[5:25, 29] == COLOURS[0]).all()
    inner = overlay[6:24, 11:29].reshape(-1, 3)
    assert (inner == inner[0]).all()
    assert not (inner[0] == 100).any()
    assert not (inner[0] == COLOURS[0]).any()


def test_masks_at_the_border_of_the_image_have_contours(image):
    overlay = np.asarray(draw_overlay(image, result_of(rectangle(0, 0, 60, 40))))
    assert (overlay[0] == COLOURS[0]).all()
    assert (overlay[:, -1] == COLOURS[0]).all()


def test_small_masks_lie_on_large_ones_in_other_colours(image):
    large, small = rectangle(0, 0, 50, 40), rectangle(10, 10, 20, 20)
    overlay = np.asarray(draw_overlay(image, result_of(small, large)))
    assert (overlay[10, 10:20] == COLOURS[1]).all()
    assert (overlay == np.asarray(draw_overlay(image, result_of(large, small)))).all()


def test_more_masks_than_colours_and_empty_ones(image):
    masks = [rectangle(column, 0, column + 1, 40) for column in range(2 * len(COLOURS))]
    draw_overlay(image, result_of(*masks))
    nothing = result_of(rectangle(0, 0, 0, 0))
    assert draw_overlay(image, nothing).tobytes() == image.tobytes()
    assert draw_overlay(image, nothing[:0]).tobytes() == image.tobytes()


def test_prompts_are_drawn_where_they_are(image):
    empty = result_of(rectangle(0, 0, 0, 0))
    overlay = np.asarray(draw_overlay(image, empty, [(10, 5, 50, 35)], [(30, 20)]))
    changed = (overlay != 100).any(axis=2)
    assert changed[5, 10] and changed[34, 49]
    assert not changed[:5].any() and not changed[35:].any()
    assert (overlay[20, 30] == 255).all()
    for box, point in (((0, 0, 60, 40), (59, 39)), ((3, 3, 4, 4), (0, 0)), ((2.2, 2.2, 2.4, 2.4), (0.5, 0.5))):
        draw_overlay(image, empty, [box], [point])  # the smallest and the largest are drawn without an error


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (300, 2)])
def test_images_of_any_shape_fit(size):
    image = Image.new("RGB", size)
    masks = result_of(rectangle(0, 0, *size, size))
    assert draw_overlay(image, masks, [(0, 0, *size)], [(0, 0)]).size == size
    fitted = draw_overlay(image, masks, [(0, 0, *size)], [(0, 0)], max_size=(120, 90))
    assert fitted.width <= 120 and fitted.height <= 90
    assert fitted.width == 120 or fitted.height == 90


@pytest.mark.parametrize("count, columns", [(1, None), (2, None), (5, None), (7, 3), (2, 3)])
def test_contact_sheets_show_every_panel(count, columns):
    panels = [
        Panel(Image.new("RGB", (170 + 10 * index, 90 + index), (255, 0, index)), f"{index}.jpg", "everything · 3 masks")
        for index in range(count)
    ]
    sheet = np.asarray(contact_sheet(panels, "Title", columns))
    for index, panel in enumerate(panels):
        assert (sheet == (255, 0, index)).all(axis=2).sum() == panel.image.width * panel.image.height


def test_long_and_strange_captions_stay_inside_their_cell():
    image = Image.new("RGB", (170, 90), (255, 0, 0))
    sheet = contact_sheet([Panel(image, "w" * 300 + ".jpg", "\n\t日本 ü")], "t" * 500)
    assert sheet.width == contact_sheet([Panel(image, "", "")], "").width
    with pytest.raises(ValueError, match="at least one panel"):
        contact_sheet([], "Title")


def test_masks_kept_as_run_lengths_are_drawn_alike(image):
    result = result_of(rectangle(0, 0, 50, 40), rectangle(10, 5, 30, 25), rectangle(20, 20, 20, 20))
    encoded = MaskResult(RunLengthMasks.from_masks(result.masks), result.scores, result.boxes_xyxy)
    assert draw_overlay(image, encoded).tobytes() == draw_overlay(image, result).tobytes()
