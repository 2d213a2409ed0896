"""`samlight segment` and `samlight demo`: masks drawn over pictures, a contact sheet, and a table.

What reads pictures and runs models is imported inside the functions that need it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .messages import one_line


if TYPE_CHECKING:
    from PIL import Image

    from .mask_generation import MaskResult
    from .visualization import Panel


_CLONE = Path(__file__).resolve().parent.parent
BUNDLED_CHECKPOINT = _CLONE / "checkpoints" / "sam-lightening-tiny"
EXAMPLE_IMAGES = _CLONE / "examples" / "images"

DEFAULT_THRESHOLDS = 0.88, 0.95
# The bundled checkpoint was trained briefly and scores low: SAM's thresholds would keep almost none of its masks.
BUNDLED_THRESHOLDS = 0.3, 0.65
DEMO_POINTS_PER_SIDE = 8

_PANEL_SIZE = 480, 360
_MAX_PANELS = 60


@dataclass(frozen=True)
class Row:
    """One line of the table at the end."""

    picture: str
    size: tuple[int, int]
    prompt: str
    num_masks: int
    seconds: float
    output: Path


def add_segment_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "paths",
        nargs="+",
        type=not_empty,
        metavar="PATH",
        help="pictures, folders of pictures, or patterns like '*.jpg'",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/segment"), help="folder of results (%(default)s)")
    parser.add_argument(
        "--box", type=_box, action="append", default=[], metavar="X1,Y1,X2,Y2",
        help="segment what is in this box, in pixels of the picture; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--point", type=_point, action="append", default=[], metavar="X,Y",
        help="segment what is at this point; may be repeated, each for an object of its own",
    )  # fmt: skip
    everything = parser.add_argument_group("everything mode, without --box and --point")
    everything.add_argument(
        "--points-per-side", type=_positive, default=32, metavar="N", help="N x N points are tried (%(default)s)"
    )
    everything.add_argument(
        "--points-per-batch", type=_positive, metavar="N", help="points at once (what suits the device)"
    )
    for option, what, default, bundled in (
        ("--pred-iou-thresh", "predicted IoU", DEFAULT_THRESHOLDS[0], BUNDLED_THRESHOLDS[0]),
        ("--stability-score-thresh", "stability", DEFAULT_THRESHOLDS[1], BUNDLED_THRESHOLDS[1]),
    ):
        everything.add_argument(
            option, type=_fraction, metavar="T",
            help=f"keep masks with a {what} above it ({default}; {bundled} for the bundled checkpoint)",
        )  # fmt: skip
    _add_model_arguments(parser)


def add_demo_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of results (%(default)s)")
    _add_model_arguments(parser)


def run_segment(args: argparse.Namespace) -> int:
    """Every picture that can be read is segmented; the others are named on stderr. 1 if there was none."""
    from .pictures import find_pictures

    model_path = _model_path(args.model)
    _make_folder(args.out)
    for path in map(Path, args.paths):
        if path.is_dir() and path.resolve() == args.out.resolve():
            raise argparse.ArgumentTypeError(f"--out {args.out} is the folder of the pictures. Choose another one.")
    pictures, problems = find_pictures(args.paths, exclude=args.out)
    for problem in problems:
        _report(problem)
    if not pictures:
        return 1
    outputs = output_paths(pictures, args.out)
    taken = {picture.resolve() for picture in pictures}.intersection(path.resolve() for path in outputs)
    if taken:
        raise argparse.ArgumentTypeError(f"--out {args.out} would replace {min(taken)}. Choose another one.")

    model, processor = _load(model_path, args)
    thresholds = _thresholds(args, model_path)
    rows, panels, skipped = [], [], len(problems)
    prompt = _describe(args.box, args.point)
    for picture, output in _progress(list(zip(pictures, outputs))):
        try:
            row, panel = _segment_picture(picture, output, prompt, model, processor, args, thresholds)
        except (ValueError, RuntimeError, MemoryError) as error:
            _report(error, picture)
            skipped += 1
            continue
        rows.append(row)
        if len(panels) < _MAX_PANELS:
            panels.append(panel)
    return _finish(rows, panels, skipped, args.out)


def run_demo(args: argparse.Namespace) -> int:
    """Boxes, points and everything on each example picture: a row of three on the contact sheet."""
    from .mask_generation import segment_everything, segment_prompts
    from .pictures import open_picture

    prompts_file = EXAMPLE_IMAGES.parent / "prompts.json"
    if not prompts_file.is_file():
        raise argparse.ArgumentTypeError(
            f"the example pictures are not here ({EXAMPLE_IMAGES}). Run the demo from a clone of the repository, or "
            "use samlight segment on pictures of your own."
        )
    model_path = _model_path(args.model)
    _make_folder(args.out)
    model, processor = _load(model_path, args)
    rows, panels = [], []
    for name, prompts in _progress(list(json.loads(prompts_file.read_text(encoding="utf-8")).items())):
        picture = open_picture(EXAMPLE_IMAGES / name)
        boxes, points = prompts["boxes_xyxy"], prompts["points_xy"]
        start = time.perf_counter()
        prompted = segment_prompts(model, processor, picture, boxes, points)
        middle = time.perf_counter()
        everything = segment_everything(model, processor, picture, DEMO_POINTS_PER_SIDE, *BUNDLED_THRESHOLDS)
        end = time.perf_counter()
        # Both kinds of prompts are decoded from one encoding of the picture, so they share its time by their number.
        per_prompt = (middle - start) / len(prompted)
        for kind, result, shown_boxes, shown_points, seconds in (
            ("boxes", prompted[: len(boxes)], boxes, [], per_prompt * len(boxes)),
            ("points", prompted[len(boxes) :], [], points, per_prompt * len(points)),
            ("everything", everything, [], [], end - middle),
        ):
            output = args.out / f"{Path(name).stem}_{kind}.png"
            prompt = _describe(shown_boxes, shown_points)
            panels.append(_draw(picture, name, output, prompt, result, shown_boxes, shown_points))
            rows.append(Row(name, picture.size, prompt, len(result), seconds, output))
    return _finish(rows, panels, 0, args.out, columns=3)


def output_paths(pictures: Sequence[Path], folder: Path) -> list[Path]:
    """Where the overlay of each picture goes: NAME_masks.png, and never twice the same.

    Where names clash, which they do in any case of letters on some file systems, folder and suffix are put into the name.
    """
    stems = [picture.stem.casefold() for picture in pictures]
    used: set[str] = set()
    paths = []
    for picture, stem in zip(pictures, stems):
        name = picture.stem
        if stems.count(stem) > 1:
            name = "_".join(filter(None, (picture.resolve().parent.name, picture.stem, picture.suffix[1:])))
        unique, number = name, 2
        while unique.casefold() in used:
            unique, number = f"{name}-{number}", number + 1
        used.add(unique.casefold())
        paths.append(folder / f"{unique}_masks.png")
    return paths


def save_picture(picture: "Image.Image", path: Path):
    """As PNG, written aside and moved, so that an interrupted run leaves no half picture."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(aside, format="PNG")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _segment_picture(path, output, prompt, model, processor, args, thresholds) -> "tuple[Row, Panel]":
    from .mask_generation import segment_everything, segment_prompts
    from .pictures import open_picture

    start = time.perf_counter()
    picture = open_picture(path)
    if args.box or args.point:
        result = segment_prompts(model, processor, picture, args.box, args.point)
    else:
        with _point_progress(args.points_per_side**2, path.name) as progress:
            result = segment_everything(
                model, processor, picture, args.points_per_side, *thresholds, args.points_per_batch, progress
            )
    seconds = time.perf_counter() - start
    panel = _draw(picture, path.name, output, prompt, result, args.box, args.point)
    return Row(str(path), picture.size, prompt, len(result), seconds, output), panel


def _draw(picture: "Image.Image", name: str, output: Path, prompt: str, result: "MaskResult", boxes, points) -> "Panel":
    """Writes the overlay at the picture's size, and returns its panel of the contact sheet."""
    from .visualization import Panel, draw_overlay

    save_picture(draw_overlay(picture, result, boxes, points), output)
    small = draw_overlay(picture, result, boxes, points, max_size=_PANEL_SIZE)
    return Panel(small, name, f"{prompt} · {_count(len(result), 'mask')}")


def _finish(rows: list[Row], panels: "list[Panel]", skipped: int, folder: Path, columns: int | None = None) -> int:
    """Contact sheet, table and summary; the exit status."""
    from .visualization import contact_sheet

    if not rows:
        print(f"samlight: error: no picture could be segmented ({skipped} skipped).", file=sys.stderr)
        return 1
    sheet_path = folder / "contact_sheet.png"
    save_picture(contact_sheet(panels, "SAM-Lightening", columns), sheet_path)
    table = [("picture", "size", "prompt", "masks", "seconds", "overlay")]
    for row in rows:
        size = f"{row.size[0]}x{row.size[1]}"
        table.append((row.picture, size, row.prompt, str(row.num_masks), f"{row.seconds:.2f}", str(row.output)))
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        cells = (
            cell.rjust(width) if index in (3, 4) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        )
        print("  ".join(cells).rstrip())
    if not any(row.num_masks for row in rows):
        print("No masks found: lower --pred-iou-thresh and --stability-score-thresh, or raise --points-per-side.")
    if skipped:
        print(f"samlight: {skipped} skipped, {len(rows)} done.", file=sys.stderr)
    left_out = f", with the first {len(panels)}" if len(panels) < len(rows) else ""
    print(f"Contact sheet: {sheet_path}{left_out}")
    return 0


def _model_path(model: str | None) -> str:
    if model is not None:
        return model
    if not BUNDLED_CHECKPOINT.is_dir():
        raise argparse.ArgumentTypeError("give --model: a checkpoint's folder, or a Hub name such as org/name.")
    return str(BUNDLED_CHECKPOINT)


def _load(model_path: str, args: argparse.Namespace):
    from .loading import find_device, find_dtype, load_model

    try:
        device, dtype = find_device(args.device), find_dtype(args.dtype)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return load_model(model_path, str(device), dtype)


def _thresholds(args: argparse.Namespace, model_path: str) -> tuple[float, float]:
    """Predicted IoU and stability: what was asked for, otherwise what suits the model."""
    bundled = Path(model_path).expanduser().resolve() == BUNDLED_CHECKPOINT
    defaults = BUNDLED_THRESHOLDS if bundled else DEFAULT_THRESHOLDS
    given = args.pred_iou_thresh, args.stability_score_thresh
    return tuple(default if value is None else value for value, default in zip(given, defaults))


def _add_model_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=not_empty, metavar="DIR", help="checkpoint's folder or Hub name (the bundled one, in a clone)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (%(default)s)")
    group.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; slow on CPUs but float32")


def _make_folder(folder: Path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"--out {folder} cannot be made: {error.strerror}. Choose another.") from error
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"--out {folder} cannot be written to. Choose another.")


def _progress(items: list) -> Iterable:
    if len(items) < 2 or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, unit="picture", leave=False)


def _point_progress(num_points: int, name: str):
    """A bar for one picture; on a CPU it takes about 0.1 s a point."""
    from tqdm import tqdm

    return tqdm(total=num_points, desc=name, unit="point", leave=False, delay=2, disable=None)


def _report(error: BaseException, picture: Path | None = None):
    message = one_line(error)
    if picture is not None and not message.startswith(str(picture)):
        message = f"{picture}: {message}"
    print(f"samlight: skipped {message}", file=sys.stderr)


def _describe(boxes: Sequence, points: Sequence) -> str:
    parts = [_count(len(prompts), kind) for prompts, kind in ((boxes, "box"), (points, "point")) if prompts]
    return ", ".join(parts) or "everything"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("x") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def not_empty(text: str) -> str:
    """For argparse: an unset shell variable must not mean the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("is empty.")
    return text


def _numbers(text: str, count: int, form: str) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}, {count} numbers in pixels of the picture.")
    return values


def _box(text: str) -> tuple[float, ...]:
    return _numbers(text, 4, "X1,Y1,X2,Y2")


def _point(text: str) -> tuple[float, ...]:
    return _numbers(text, 2, "X,Y")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer.")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1.")
    return value
