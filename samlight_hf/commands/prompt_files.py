"""Prompts of `samlight segment`: the values of options, and files that have prompts for each image.

In text, an object's clicks are separated by spaces, and objects by semicolons. A click is X,Y, or X,Y,0 beside the
object.
"""

import argparse
import csv
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..utils.messages import one_line
from .summary import Summary, count


if TYPE_CHECKING:
    from ..inference.prompts import ObjectPrompt


logger = logging.getLogger(__name__)

FORM = (
    'JSON, {NAME: PROMPTS, ...}, or a line {"image": NAME, ...} for each image, with boxes_xyxy, points_xy, labels and '
    "objects; or CSV with the columns image, boxes_xyxy and points_xy"
)
_KEYS = ("image", "boxes_xyxy", "points_xy", "labels", "objects")
_OBJECT_KEYS = ("box_xyxy", "points_xy", "labels")
_MAX_SHOWN = 60  # characters of a value in a message
_COLUMNS = ("image", "boxes_xyxy", "points_xy")

Prompts = tuple["ObjectPrompt", ...]


class ImagePrompts(NamedTuple):
    """The prompts of one entry of a file, with its place for messages, such as "prompts.csv, line 3"."""

    place: str
    name: str
    prompts: Prompts


def parse_points(text: str) -> "ObjectPrompt":
    """Parse the clicks on one object, such as "50,60 90,80,0". Raises ArgumentTypeError."""
    try:
        return _object_of_clicks(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def prompts_from_options(
    args: argparse.Namespace, images: Sequence[Path], root: Path | None, summary: Summary
) -> dict[Path, Prompts]:
    """Return the images that are to be segmented, with their prompts: none for everything mode.

    Raises:
        ArgumentTypeError: as `read_prompts`, and where the file of prompts names none of the images.
    """
    if args.prompts is None:
        objects = [_object(box_xyxy=box) for box in args.box] + [_object((point,), (1,)) for point in args.point]
        return dict.fromkeys(images, (*objects, *args.points))
    entries, num_malformed = read_prompts(args.prompts)
    prompts, num_unknown = prompts_of_images(entries, images, root)
    summary.skipped += num_malformed + num_unknown
    if not prompts:
        raise argparse.ArgumentTypeError(f"--prompts {args.prompts} names none of the {count(len(images), 'image')}.")
    if len(prompts) < len(images):
        left_out = count(len(images) - len(prompts), "image")
        print(f"samlight: left out {left_out} without prompts in {args.prompts}.", file=sys.stderr)
    return prompts


def read_prompts(path: Path) -> tuple[list[ImagePrompts], int]:
    """Read a file of prompts: JSON, lines of JSON, or CSV, see `FORM`.

    An entry that is malformed is left out, with a warning.

    Args:
        path: the file, whose suffix is .csv for CSV.

    Returns:
        The entries, in order, and the number of those that were left out.

    Raises:
        ArgumentTypeError: for a file that cannot be read, or that has no prompts for any image.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"--prompts {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"--prompts {path} is not text in UTF-8: it must be {FORM}.") from error
    if not text.strip():
        raise argparse.ArgumentTypeError(f"--prompts {path} is empty: it must be {FORM}.")
    found, parse = (_csv_entries if path.suffix.lower() == ".csv" else _json_entries)(text, path)
    entries, errors = [], []
    for place, entry in found:
        try:
            entries.append(ImagePrompts(f"{path}, {place}", *parse(entry)))
        except ValueError as error:
            errors.append((place, one_line(error, 200)))
    if not entries:
        first = " ({}: {})".format(*errors[0]) if errors else ""
        raise argparse.ArgumentTypeError(f"--prompts {path} has no prompts for any image{first}: it must be {FORM}.")
    for place, message in errors:
        logger.warning("%s, %s is left out: %s", path, place, message)
    return entries, len(errors)


def prompts_of_images(
    entries: Sequence[ImagePrompts], images: Sequence[Path], root: Path | None
) -> tuple[dict[Path, Prompts], int]:
    """Find the image of each entry: by its path, from the folder of images or as given, or by its file name alone.

    An entry whose image is not among these is left out, with a warning. Several entries of one image are put together.

    Args:
        entries: see `read_prompts`.
        images: paths of images.
        root: the folder of images, see `samlight_hf.images.reading.common_folder`.

    Returns:
        The prompts of each image that has any, in the order of `images`, and the number of entries that were left out.
    """
    by_path = {os.path.abspath(image): image for image in images}
    by_name: dict[str, list[Path]] = {}
    for image in images:
        by_name.setdefault(image.name, []).append(image)
    found: dict[Path, Prompts] = {}
    num_unknown = 0
    for place, name, prompts in entries:
        candidates = [os.path.join(root or "", name), name]
        same_name = by_name.get(name, [])
        matches = [by_path[path] for path in map(os.path.abspath, candidates) if path in by_path]
        matches += same_name if len(same_name) == 1 else []
        if not matches:
            num_unknown += 1
            several = f"is the name of {len(same_name)} images: give its folder" if same_name else "is no image here"
            logger.warning("%s is left out: %s %s.", place, name, several)
        else:
            found[matches[0]] = found.get(matches[0], ()) + prompts
    return {image: found[image] for image in images if image in found}, num_unknown


def _json_entries(text: str, path: Path) -> tuple[list[tuple[str, Any]], Callable[[Any], tuple[str, Prompts]]]:
    """Return the entries of a JSON document, or of one in each line, with their places; and the function for each."""
    try:
        document = _load(text)
    except (ValueError, RecursionError) as error:
        lines = _lines(text)
        if not any(_is_object(line) for _, line in lines):
            raise argparse.ArgumentTypeError(f"--prompts {path} is no JSON ({one_line(error, 80)}).") from error
        return lines, _parse_line
    if isinstance(document, dict) and "image" not in document:
        return [(f"entry {name}", (name, entry)) for name, entry in document.items()], lambda pair: _parse_entry(*pair)
    entries = document if isinstance(document, list) else [document]
    return [(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)], partial(_parse_entry, None)


def _csv_entries(text: str, path: Path) -> tuple[list[tuple[str, Any]], Callable[[Any], tuple[str, Prompts]]]:
    """Return the lines of a CSV file but the first, with their places; and the function for each."""
    (_, first), *lines = _lines(text) or [("", "")]
    columns = [cell.strip() for cell in _cells(first)]
    if "image" not in columns or len(columns) < 2 or set(columns) - set(_COLUMNS):
        raise argparse.ArgumentTypeError(
            f"--prompts {path} has the columns {', '.join(columns)}: it must have image, and boxes_xyxy or points_xy."
        )
    return lines, partial(_parse_row, columns)


def _load(text: str) -> Any:
    """Parse JSON. Raises ValueError for text that is none, and for a key that occurs twice: one would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        repeated = [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]
        if repeated:
            raise ValueError(f"{repeated[0]!r} is in it twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _is_object(line: str) -> bool:
    try:
        return isinstance(_load(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(text: str) -> list[tuple[str, Any]]:
    return [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip(" ,\t")]


def _parse_line(line: str) -> tuple[str, Prompts]:
    try:
        entry = _load(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({one_line(error, 80)}).") from error
    return _parse_entry(None, entry)


def _parse_entry(name: str | None, entry: Any) -> tuple[str, Prompts]:
    """Parse the prompts of one image in JSON; `name` is the image's where the entry has none."""
    if not isinstance(entry, dict):
        raise ValueError(f"it is a JSON {type(entry).__name__}, not an object with boxes_xyxy or points_xy.")
    _check_keys(entry, _KEYS)
    name = entry.get("image", name)
    if not isinstance(name, str) or not name:
        raise ValueError('it has no "image", the name of one.')
    prompts = [_object(box_xyxy=_numbers(box, 4)) for box in _list(entry, "boxes_xyxy")]
    points = _list(entry, "points_xy")
    labels = _list(entry, "labels") or [None] * len(points)
    if len(labels) != len(points):
        raise ValueError(f"labels has {len(labels)} entries and points_xy {len(points)}: each object needs one.")
    prompts += [_object_of_json({"points_xy": clicks, "labels": own}) for clicks, own in zip(points, labels)]
    prompts += [_object_of_json(value) for value in _list(entry, "objects")]
    return name, _some(prompts)


def _object_of_json(value: Any) -> "ObjectPrompt":
    if not isinstance(value, dict):
        raise ValueError(f"an entry of objects is a JSON {type(value).__name__}, not an object with box_xyxy.")
    _check_keys(value, _OBJECT_KEYS)
    clicks = _list(value, "points_xy")
    if clicks and not isinstance(clicks[0], list):  # one click
        clicks = [clicks]
    points = tuple(_numbers(click, 2) for click in clicks)
    labels = value.get("labels")
    if labels is None:
        labels = [1] * len(points)
    elif not isinstance(labels, list):
        labels = [labels]
    box = value.get("box_xyxy")
    return _object(points, tuple(labels), None if box is None else _numbers(box, 4))


def _parse_row(columns: Sequence[str], line: str) -> tuple[str, Prompts]:
    row = _cells(line)
    if len(row) != len(columns):
        raise ValueError(f"it has {len(row)} columns, and the first line {len(columns)}: quote what has commas.")
    cells = dict(zip(columns, (cell.strip() for cell in row)))
    if not cells["image"]:
        raise ValueError("it names no image.")
    boxes, points = ([text for text in cells.get(key, "").split(";") if text.strip()] for key in _COLUMNS[1:])
    prompts = [_object(box_xyxy=_box_of_cell(box)) for box in boxes]
    return cells["image"], _some(prompts + [_object_of_clicks(clicks) for clicks in points])


def _box_of_cell(text: str) -> tuple[float, ...]:
    from ..inference.prompts import check_order  # which imports torch

    box = _numbers(text.split(","), 4)
    check_order(box)  # here, where only this line is left out, and not all prompts of its image
    return box


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise ValueError(f"it is no CSV ({error}).") from error


def _object_of_clicks(text: str) -> "ObjectPrompt":
    points, labels = [], []
    for click in text.split():
        *numbers, label = click.split(",") if click.count(",") == 2 else (*click.split(","), "1")
        points.append(_numbers(numbers, 2, click))
        if label not in ("0", "1"):
            raise ValueError(f"label {label!r} of the click {click!r} must be 1, on the object, or 0, beside it.")
        labels.append(int(label))
    return _object(tuple(points), tuple(labels))


def _object(*arguments, **options) -> "ObjectPrompt":
    from ..inference.prompts import ObjectPrompt  # which imports torch

    return ObjectPrompt(*arguments, **options)


def _numbers(values: Any, count: int, shown: str | None = None) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)) or isinstance(values, str):
        shown = shown or (",".join(map(str, values)) if isinstance(values, list) else str(values))
        form = "a click, X,Y or X,Y,0" if count == 2 else "a box, X1,Y1,X2,Y2"
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
        raise ValueError(f"{shown!r} is not {form}, in pixels of the image.")
    return numbers


def _list(entry: dict, key: str) -> list:
    value = entry.get(key)
    if not isinstance(value, list | None):
        raise ValueError(f"{key} is no list.")
    return value or []


def _check_keys(entry: dict, keys: Sequence[str]):
    if unknown := [key for key in entry if key not in keys]:
        raise ValueError(f"it has {unknown[0]!r}, and may have {', '.join(keys)}.")


def _some(prompts: "list[ObjectPrompt]") -> Prompts:
    if not prompts:
        raise ValueError("it has no prompt.")
    return tuple(prompts)
