"""Options that several commands have, and functions that parse and check the values of options."""

import argparse
import os
from pathlib import Path

from ..utils.messages import one_line


# Files of a clone of the repository; an installed package has none of them.
_CLONE = Path(__file__).resolve().parents[2]
BUNDLED_CHECKPOINT = _CLONE / "checkpoints" / "sam-lightening-tiny"
EXAMPLE_IMAGES = _CLONE / "examples" / "images"
EXAMPLE_CONFIGS = _CLONE / "examples" / "configs"


def model_path_of(model: str | None) -> str:
    """Return the value of `--model`, or the bundled checkpoint's folder. Raises ArgumentTypeError outside a clone."""
    if model is not None:
        return model
    if not BUNDLED_CHECKPOINT.is_dir():
        raise argparse.ArgumentTypeError("give --model: a checkpoint's folder, or a Hub name such as org/name.")
    return str(BUNDLED_CHECKPOINT)


def load_from_options(model_path: str, args: argparse.Namespace):
    """Load model and processor for `--device` and `--dtype`; one that cannot be used raises ArgumentTypeError."""
    from ..loading import find_device, find_dtype, load_model

    try:
        device, dtype = find_device(args.device), find_dtype(args.dtype)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return load_model(model_path, str(device), dtype)


def add_model_arguments(parser: argparse.ArgumentParser):
    """Add `--model`, `--device` and `--dtype`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=not_empty, metavar="DIR", help="checkpoint's folder or Hub name (the bundled one, in a clone)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (%(default)s)")
    group.add_argument(
        "--dtype",
        default="float32",
        help="float32, bfloat16 or float16; bfloat16 is faster on GPUs, and on CPUs with AVX-512 BF16 or AMX "
        "(%(default)s)",
    )


def missing_package(error: ImportError, what: str, extra: str) -> argparse.ArgumentTypeError:
    """Return the error for a package of an extra that is not installed; `what` needs it. A fix in it already stays."""
    message = one_line(error).rstrip(".")
    if "pip install" not in message:
        message += f". Install what {what} needs: pip install 'samlight-hf[{extra}]'"
    return argparse.ArgumentTypeError(message)


def make_folder(folder: Path):
    """Create the folder of `--out`. Raises ArgumentTypeError where it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"--out {folder} cannot be created: {error.strerror}. Choose another."
        ) from error
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"--out {folder} cannot be written to. Choose another.")


def not_empty(text: str) -> str:
    """Return the text; an empty one is refused, since an unset shell variable must not mean the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("is empty.")
    return text


def parse_numbers(text: str, count: int, form: str) -> tuple[float, ...]:
    """Parse `count` numbers that are separated by commas; `form` shows them in the error, such as X,Y."""
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}, {count} numbers in pixels of the image.")
    return values


def parse_box(text: str) -> tuple[float, ...]:
    return parse_numbers(text, 4, "X1,Y1,X2,Y2")


def parse_point(text: str) -> tuple[float, ...]:
    return parse_numbers(text, 2, "X,Y")


def parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer.")
    return int(text)


def parse_fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1.")
    return value


def parse_not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 0.")
    return int(text)


def add_grid_options(group):
    """Add the options of the points of everything mode to a parser or a group."""
    group.add_argument(
        "--points-per-side", type=parse_positive, default=32, metavar="N", help="N x N points are tried (%(default)s)"
    )
    group.add_argument(
        "--crops-n-layers", type=parse_not_negative, default=0, metavar="N",
        help="segment crops too, 4 in the first layer, 16 in the second, ...: finds smaller objects (%(default)s)",
    )  # fmt: skip


def add_tile_options(group):
    """Add the options that `tiles_from_options` reads to a parser or a group."""
    group.add_argument(
        "--tile", type=parse_positive, metavar="PX",
        help="everything mode in tiles: side of a tile in pixels of the image, such as 1024",
    )  # fmt: skip
    group.add_argument("--overlap", type=parse_not_negative, metavar="PX", help="of tiles (a quarter of --tile)")


def tiles_from_options(args: argparse.Namespace):
    """Return the `TileSettings` of `--tile` and `--overlap`, a quarter of the tile by default; None without `--tile`.

    Raises ArgumentTypeError for values that do not go together.
    """
    from ..inference.tiles import TileSettings

    if args.tile is None:
        if args.overlap is not None:
            raise argparse.ArgumentTypeError("--overlap is for tiles: give --tile too, such as --tile 1024.")
        return None
    try:
        return TileSettings.of(args.tile, args.overlap)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"--tile and --overlap: {error}") from error
