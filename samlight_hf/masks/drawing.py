"""Overlays of masks on images, and contact sheets of many images. Needs only Pillow and numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .boxes import mask_extent
from .results import GeneratedMasks, MaskResult


# Neighbours in this list differ much in hue: masks are coloured in the order of their size.
COLOURS = (
    (46, 204, 143), (190, 110, 255), (255, 200, 40), (64, 156, 255), (255, 99, 71), (30, 200, 220), (255, 95, 170),
    (150, 210, 60), (110, 120, 255), (255, 140, 40), (0, 170, 150), (235, 90, 220), (215, 225, 70), (120, 190, 255),
    (225, 70, 90), (255, 160, 140),
)  # fmt: skip

_FILL_OPACITY = 0.45
_PAPER, _INK, _FAINT_INK = (250, 249, 246), (34, 34, 40), (120, 120, 128)
_MARGIN, _GAP, _CAPTION_HEIGHT = 36, 24, 52


@dataclass(frozen=True)
class Panel:
    """One image of a contact sheet, with the two lines of its caption."""

    image: Image.Image
    title: str
    subtitle: str


def draw_overlay(
    image: Image.Image,
    result: MaskResult | GeneratedMasks,
    boxes_xyxy: Sequence[Sequence[float]] = (),
    points_xy: Sequence[Sequence[float]] = (),
    max_size: tuple[int, int] | None = None,
) -> Image.Image:
    """Draw each mask as a translucent colour inside an opaque contour, and prompts as rectangles and dots.

    Small masks are drawn over large ones.

    Args:
        image: of any mode.
        result: masks of the image.
        boxes_xyxy: box prompts, in pixels of the image.
        points_xy: point prompts (x, y) or (x, y, label), in pixels of the image. One with the label 0, beside an
            object, is drawn in black on white.
        max_size: (width, height) that the result fills without a change of its aspect ratio. Contours are drawn at that
            size instead of being resized with the image.

    Returns:
        An RGB image, without `max_size` as large as `image`.
    """
    if max_size is None:
        return _draw_at(image.size, image, result, boxes_xyxy, points_xy)
    width, height = _fit(image.size, max_size)
    return _draw_at((2 * width, 2 * height), image, result, boxes_xyxy, points_xy).reduce(2)


def contact_sheet(panels: Sequence[Panel], title: str, columns: int | None = None) -> Image.Image:
    """Arrange panels in rows on one image.

    Cells are as wide as the widest image, and as high as the highest one of their row.

    Args:
        panels: in the order of reading.
        title: a line above them.
        columns: panels in a row; by default as many as make the sheet about square.

    Returns:
        An RGB image.

    Raises:
        ValueError: without any panel.
    """
    if not panels:
        raise ValueError("a contact sheet needs at least one panel.")
    columns = columns or math.ceil(math.sqrt(len(panels)))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    cell_width = max(160, *(panel.image.width for panel in panels))
    heights = [max(panel.image.height for panel in row) + _CAPTION_HEIGHT for row in rows]
    columns = min(columns, len(panels))
    header = _MARGIN + 44
    sheet_size = (
        2 * _MARGIN + columns * cell_width + (columns - 1) * _GAP,
        header + sum(heights) + (len(rows) - 1) * _GAP + _MARGIN,
    )
    sheet = Image.new("RGB", sheet_size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_line(draw, (_MARGIN, _MARGIN - 8), title, 28, _INK, sheet_size[0] - 2 * _MARGIN)
    top = header
    for row, height in zip(rows, heights):
        for column, panel in enumerate(row):
            left = _MARGIN + column * (cell_width + _GAP)
            image_top = top + height - _CAPTION_HEIGHT - panel.image.height  # captions of a row share a line
            sheet.paste(panel.image, (left + (cell_width - panel.image.width) // 2, image_top))
            caption_top = top + height - _CAPTION_HEIGHT + 8
            _draw_line(draw, (left, caption_top), panel.title, 17, _INK, cell_width)
            _draw_line(draw, (left, caption_top + 22), panel.subtitle, 15, _FAINT_INK, cell_width)
        top += height + _GAP
    return sheet


def _draw_at(size: tuple[int, int], image: Image.Image, result, boxes_xyxy, points_xy) -> Image.Image:
    """Draw the overlay on a canvas of `size` (width, height)."""
    canvas = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)).copy()
    thickness = max(1, round(max(size) / 450))
    areas = np.array([np.count_nonzero(mask) for mask in result.masks])  # one at a time: they may be run lengths
    for rank, index in enumerate(np.argsort(-areas, kind="stable")):
        _paint_mask(canvas, _resize_mask(result.masks[index], size), COLOURS[rank % len(COLOURS)], thickness)
    overlay = Image.fromarray(canvas)
    scale = size[0] / image.width, size[1] / image.height
    _draw_prompts(overlay, scale, thickness, boxes_xyxy, points_xy)
    return overlay


def _fit(size: tuple[int, int], max_size: tuple[int, int]) -> tuple[int, int]:
    factor = min(max_size[0] / size[0], max_size[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask, bool (H, W), to bool (height, width), with smooth edges where it is enlarged."""
    if mask.shape == (size[1], size[0]):
        return mask
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)) > 127


def _paint_mask(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], thickness: int):
    """Blend one mask into the canvas, uint8 (H, W, 3), in place; only its tight box is read and written."""
    extent = mask_extent(mask)
    if extent is None:
        return
    inside = np.s_[extent[1] : extent[3], extent[0] : extent[2]]
    part, mask = canvas[inside], mask[inside]
    fill = np.asarray(colour, dtype=np.float32) * _FILL_OPACITY
    part[mask] = np.rint(part[mask] * (1 - _FILL_OPACITY) + fill).astype(np.uint8)
    # There is no mask outside the box, so its border belongs to the contour: padding shows that to the filter.
    padded = Image.fromarray(np.pad(mask, thickness).astype(np.uint8) * 255)
    for _ in range(thickness):
        padded = padded.filter(ImageFilter.MinFilter(3))
    eroded = np.asarray(padded)[thickness:-thickness, thickness:-thickness] > 0
    part[mask & ~eroded] = colour


def _draw_prompts(overlay: Image.Image, scale: tuple[float, float], thickness: int, boxes_xyxy, points_xy):
    """Draw prompts in white on black, which is visible on any image and is not the colour of a mask."""
    draw = ImageDraw.Draw(overlay)
    for x1, y1, x2, y2 in boxes_xyxy:
        left, top = round(x1 * scale[0]), round(y1 * scale[1])
        right = max(left, min(overlay.width, round(x2 * scale[0])) - 1)  # x2 lies behind the box's last pixel
        bottom = max(top, min(overlay.height, round(y2 * scale[1])) - 1)
        draw.rectangle((left, top, right, bottom), outline="black", width=4 * thickness)
        inner = left + thickness, top + thickness, right - thickness, bottom - thickness
        if inner[0] < inner[2] and inner[1] < inner[3]:
            draw.rectangle(inner, outline="white", width=2 * thickness)
    radius = max(2, 3 * thickness)
    for x, y, *label in points_xy:
        centre = ((x + 0.5) * scale[0], (y + 0.5) * scale[1])
        edge, inside = ("white", "black") if label == [0] else ("black", "white")
        draw.circle(centre, radius + max(1, thickness), fill=edge)
        draw.circle(centre, radius, fill=inside)


def _draw_line(draw: ImageDraw.ImageDraw, position, text: str, font_size: int, colour, max_width: int):
    """Draw one line of text; a long one without its middle: a file name is known by its beginning and its suffix."""
    font = ImageFont.load_default(font_size)
    text = " ".join(text.split())
    length = len(text)
    line = text
    while length > 1 and draw.textlength(line, font=font) > max_width:
        length -= 1
        line = text[: (length + 1) // 2] + "…" + text[len(text) - length // 2 :]
    draw.text(position, line, font=font, fill=colour)
