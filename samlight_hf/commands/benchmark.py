"""`samlight benchmark`: time and memory of the model beside its peers, in one run and one process."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES, parse_positive


if TYPE_CHECKING:
    from ..benchmark.settings import Settings


_REPORT = "samlight-report.json"
PART_NAMES = (
    "encoder", "sustained", "peers", "decoder", "prompt", "resolution", "attention", "training", "equality",
    "candidates", "projection", "linear", "head", "profile", "clicks", "start", "boxes", "generation",
)  # fmt: skip


def add_benchmark_arguments(parser: argparse.ArgumentParser, names: Sequence[str] = PART_NAMES):
    parser.add_argument("only", nargs="*", metavar="PART", help=f"the same as --parts: {', '.join(names)}")
    parser.add_argument("--parts", nargs="+", choices=names, default=list(names), metavar="PART", help="(all of them)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="file for the raw result, written after each row")
    parser.add_argument(
        "--report", action="store_true",
        help="measure what the documentation's table has, to one JSON that can be sent to the project; --out names it",
    )  # fmt: skip
    parser.add_argument("--append", action="store_true", help="keep the rows of other parts that --out has already")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="time against resolution (beside --out)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    sizes = parser.add_argument_group("sizes; by default fewer on a CPU")
    sizes.add_argument("--batch-sizes", type=parse_positive, nargs="+", metavar="N", help="images at once (1 8 32)")
    sizes.add_argument("--prompt-counts", type=parse_positive, nargs="+", metavar="N", help="(1 16 64 256)")
    sizes.add_argument("--resolutions", type=parse_positive, nargs="+", metavar="PX", help="(1024 2048 4096)")
    sizes.add_argument("--training-batch-size", type=parse_positive, metavar="N", help="(16)")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="rows under torch.compile (on CUDA alone)"
    )
    rows.add_argument("--compile-peers", action="store_true", help="SAM ViT-L and ViT-H under torch.compile too")
    rows.add_argument(
        "--model", "--checkpoint", dest="checkpoint", type=Path, default=_if_there(BUNDLED_CHECKPOINT), metavar="DIR",
        help="for parts that need trained weights",
    )  # fmt: skip
    rows.add_argument(
        "--images", type=Path, default=_if_there(EXAMPLE_IMAGES), metavar="DIR", help="photographs, beside --model"
    )


def settings_of(args: argparse.Namespace) -> "Settings":
    """Return the benchmark's `Settings` for the parsed arguments."""
    from ..benchmark.settings import Settings
    from ..loading import find_device

    names = ("batch_sizes", "prompt_counts", "resolutions")
    sizes: dict[str, Any] = {name: tuple(values) for name in names if (values := getattr(args, name))}
    return Settings(
        find_device(args.device), **sizes, training_batch_size=args.training_batch_size, compile=args.compile,
        compile_peers=args.compile_peers, checkpoint=args.checkpoint, images=args.images,
    )  # fmt: skip


def run_benchmark_command(args: argparse.Namespace, available: dict | None = None) -> int:
    """Measure the chosen parts: print each row as it is measured, then tables and targets.

    Args:
        args: the parsed arguments.
        available: the parts by name; by default those of `samlight_hf.benchmark`.

    Returns:
        The exit status.

    Raises:
        ArgumentTypeError: for a part that is not known, a folder that is not there, `--append` without `--out`, and
            `--report` with parts.
    """
    from ..benchmark.run import PARTS, REPORT_PARTS, run_benchmark

    available = available or PARTS
    if unknown := set(args.only) - set(available):
        raise argparse.ArgumentTypeError(
            f"no part is called {', '.join(sorted(unknown))}: choose from {', '.join(available)}."
        )
    parts, out = args.only or args.parts, args.out
    if args.report:
        if args.only or args.append or set(args.parts) != set(available):
            raise argparse.ArgumentTypeError(
                "--report measures its own parts in one run: give no PART and no --append."
            )
        parts, out = list(REPORT_PARTS), out or Path(_REPORT)
    for option, folder in (("--model", args.checkpoint), ("--images", args.images)):
        if folder is not None and not folder.is_dir():
            raise argparse.ArgumentTypeError(f"{option} {folder}: no such folder.")
    if args.append and not args.out:
        raise argparse.ArgumentTypeError("--append needs --out, the file that it adds to.")
    plot = args.plot or (out.with_suffix(".png") if out and "resolution" in parts else None)
    settings = settings_of(args)
    if args.report and args.compile is None:
        settings.compile = False  # minutes for rows that the table does not have
    run_benchmark(settings, parts, out, plot, args.append, available)
    if args.report:
        print(f"\n{out}: please send this file, see the documentation's page on speed.")
    return 0


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None
