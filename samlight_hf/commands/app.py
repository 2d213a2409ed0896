"""`samlight app`: a page on which clicks become masks."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    EXAMPLE_IMAGES,
    add_model_arguments,
    load_from_options,
    model_path_of,
    parse_fraction,
    parse_not_negative,
    parse_positive,
)


if TYPE_CHECKING:
    from ..app.limits import Limits


def add_app_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0, or :: of IPv6, lets other machines in (%(default)s)",
    )
    parser.add_argument(
        "--port", type=parse_not_negative, default=7860, help="to listen on; 0 is any free one (%(default)s)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--examples", type=Path, metavar="DIR", help="folder of images to try (the bundled ones, in a clone)"
    )
    everything = parser.add_argument_group("everything mode, to begin with")
    everything.add_argument(
        "--points-per-side", type=parse_positive, metavar="N", help="N x N points (8 on a CPU, else 32)"
    )
    for option, what, default in (
        ("--pred-iou-thresh", "predicted IoU", 0.88), ("--stability-score-thresh", "stability", 0.95),
    ):  # fmt: skip
        everything.add_argument(
            option, type=parse_fraction, metavar="T", default=default, help=f"least {what} (%(default)s)"
        )
    limits = parser.add_argument_group("limits")
    for option, what, default in (
        ("--max-upload-mb", "size of an image's file, in MB", 32),
        ("--max-pixels", "width times height of an image", 25_000_000),
        ("--max-cache-mb", "memory of all users' images together", 2048),
        ("--max-sessions", "users whose images are kept", 64),
        ("--max-idle-seconds", "time until an unused image is dropped", 1800),
        ("--max-queue", "calls that wait; further ones are refused", 64),
    ):
        limits.add_argument(option, type=parse_positive, metavar="N", default=default, help=f"{what} (%(default)s)")
    add_model_arguments(parser)


def run_app(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C.

    Returns:
        The exit status.

    Raises:
        ArgumentTypeError: For a port that is taken, and a folder of examples that is none.
        ValueError: For a model that cannot be loaded.
    """
    from ..app.limits import Limits
    from ..app.segmenter import Segmenter
    from ..app.server import check_port, require_gradio, serve

    try:
        check_port(args.host, args.port)
        require_gradio()
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    limits = Limits(
        upload_mb=args.max_upload_mb, pixels=args.max_pixels, cache_mb=args.max_cache_mb, sessions=args.max_sessions,
        idle_seconds=args.max_idle_seconds, queue=args.max_queue,
    )  # fmt: skip
    examples = find_examples(args.examples, limits)
    model_path = model_path_of(args.model)
    model, processor = load_from_options(model_path, args)
    points_per_side = args.points_per_side or (8 if model.device.type == "cpu" else 32)
    limits = dataclasses.replace(limits, points_per_side=max(limits.points_per_side, points_per_side))
    name = model_path if model_path.count("/") == 1 and not Path(model_path).exists() else Path(model_path).name
    serve(
        Segmenter(model, processor), name, host=args.host, port=args.port, limits=limits, examples=examples,
        thresholds=(args.pred_iou_thresh, args.stability_score_thresh), points_per_side=points_per_side,
        in_browser=args.open,
    )  # fmt: skip
    return 0


def find_examples(folder: Path | None, limits: "Limits") -> list[Path]:
    """Return the images of a folder that the page can open; others are left out, and told in a line on stderr.

    Args:
        folder: None for the bundled images.
        limits: of the page.

    Raises:
        ArgumentTypeError: for a folder without such images.
    """
    from ..app.limits import read_upload
    from ..images.reading import ImageError, find_images

    images, problems = find_images([EXAMPLE_IMAGES if folder is None else folder])
    examples = []
    for image in images:
        try:
            read_upload(image, limits)
            examples.append(image)
        except ImageError as error:
            problems.append(error)
    if folder is not None and not examples:
        raise argparse.ArgumentTypeError(f"--examples {problems[0]}")
    for problem in problems if folder is not None else ():
        print(f"samlight: --examples {problem} It is left out.", file=sys.stderr)
    return examples
