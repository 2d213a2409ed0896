"""Contact sheets of the instances of lowest IoU."""

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ..masks.drawing import Panel, contact_sheet, draw_overlay
from ..masks.results import MaskResult
from ..utils.atomic_files import atomic_write, fit_name
from .files import slug
from .statistics import ModelResult, values_of


_TRUE_COLOUR, _PREDICTED_COLOUR = (64, 170, 255), (255, 150, 0)
_PANEL_SIZE, _PANELS_PER_SHEET, _COLUMNS = (320, 240), 20, 5


def worst_cases(
    folder: str | os.PathLike,
    result: ModelResult,
    draw_inputs: Callable[[Mapping], tuple[Image.Image, np.ndarray, np.ndarray, Mapping | None]],
    protocol: str,
    num_cases: int = 20,
) -> list[Path]:
    """Draw the instances of lowest IoU, lowest first, twenty a sheet.

    Args:
        folder: the folder of the PNG files.
        result: the result of a model.
        draw_inputs: called with one record at a time; returns the image, the true and the predicted mask for
            `protocol`, both (height, width) bool at the image's size, and the prompts: {"boxes_xyxy": [...],
            "points_xy": [...]} in pixels of the image, each optional, or None.
        protocol: the protocol whose IoU counts.
        num_cases: number of instances.

    Returns:
        The PNG files, for `write_report`.

    Raises:
        ValueError: for a protocol that the model was not evaluated with, or a mask of another size than its image.
    """
    if protocol not in result.protocols:
        raise ValueError(f"{result.name} has no protocol {protocol!r}, only: {', '.join(result.protocols)}.")
    iou = values_of(result.records, "iou", [protocol])[:, 0]
    places = [place for place in np.argsort(iou, kind="stable")[:num_cases] if math.isfinite(iou[place])]
    title = (
        f"{result.name} · {protocol} · lowest {len(places)} of {len(iou)} IoU · blue: ground truth, orange: prediction"
    )
    if unknown := int((~np.isfinite(iou)).sum()):
        title += f" · {unknown} without IoU not shown"
    panels = []
    for place in places:
        record = result.records[place]
        image = _draw_case(*draw_inputs(record), where=f"image {record['picture']}, instance {record['instance']}")
        size = f"{record['picture']} / {record['instance']} · {record['area']:,.0f} px"
        panels.append(Panel(image, f"IoU {iou[place]:.3f}", size))
    paths = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for start in range(0, len(panels), _PANELS_PER_SHEET):
        number = f"_{start // _PANELS_PER_SHEET + 1}" if len(panels) > _PANELS_PER_SHEET else ""
        paths.append(Path(folder) / fit_name(f"worst_{slug(result.name)}", f"_{slug(protocol)}{number}.png"))
        sheet = contact_sheet(panels[start : start + _PANELS_PER_SHEET], title, _COLUMNS)
        atomic_write(paths[-1], partial(sheet.save, format="PNG"))
    return paths


def _draw_case(image: Image.Image, truth, predicted, prompts: Mapping | None, where: str) -> Image.Image:
    """Draw the surroundings of both masks as one panel, with their contours over the prompts; see `worst_cases`."""
    masks = [Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * 255) for mask in (truth, predicted)]
    for mask in masks:
        if mask.size != image.size:
            raise ValueError(f"{where}: a mask is {mask.size} (width, height), and its image {image.size}.")
    boxes = [box for mask in masks if (box := mask.getbbox())] or [(0, 0, *image.size)]
    left, top = (min(box[side] for box in boxes) for side in (0, 1))
    right, bottom = (max(box[side] for box in boxes) for side in (2, 3))
    margin = 16 + max(right - left, bottom - top) // 5
    offset = max(0, left - margin), max(0, top - margin)
    crop = (*offset, min(image.width, right + margin), min(image.height, bottom + margin))
    prompts = prompts or {}
    boxes_xyxy = [np.subtract(box, [*offset, *offset]) for box in prompts.get("boxes_xyxy") or ()]
    points_xy = [np.subtract(point, offset) for point in prompts.get("points_xy") or ()]
    nothing = MaskResult(np.zeros((0, 1, 1), dtype=bool), np.zeros(0), np.zeros((0, 4)))
    panel = draw_overlay(image.convert("RGB").crop(crop), nothing, boxes_xyxy, points_xy, max_size=_PANEL_SIZE)
    for mask, colour in zip(masks, (_TRUE_COLOUR, _PREDICTED_COLOUR)):
        # Contours are found at twice the size and halved, which makes them smooth. The border of the image closes them.
        mask = mask.resize((2 * panel.width, 2 * panel.height), Image.Resampling.BILINEAR, crop)
        mask = ImageOps.expand(mask.point(lambda level: 255 * (level > 127)), 8)
        for radius, ink in ((4, "black"), (2, colour)):
            edge = mask.filter(ImageFilter.BoxBlur(radius)).point(lambda level: 255 * (0 < level < 255))
            panel.paste(ink, mask=ImageOps.crop(edge, 8).reduce(2))
    return panel
