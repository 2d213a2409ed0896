"""`-` as a path of `samlight segment`: standard input instead of an image file, standard output instead of a folder.

Both are files in a temporary folder while the command runs, so that all else is done as with files.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory


STREAM = "-"


@dataclass
class Streams:
    """The files that stand for standard input and output.

    Attributes:
        source: the image that came from standard input, None where images are files.
        result: the file that goes to standard output; to be set by the command.
        is_output: whether results go to standard output.
    """

    source: Path | None = None
    result: Path | None = None
    is_output: bool = False

    def shown(self, path: Path) -> str:
        """Return a path as users know it."""
        return "standard input" if path == self.source else str(path)


@contextmanager
def standard_streams(args: argparse.Namespace) -> Iterator[Streams]:
    """Replace `-` in `args.paths` and `args.out` by files, and write `result` to standard output in the end.

    Raises:
        ArgumentTypeError: where `-` does not fit the other options, or the stream is a terminal.
    """
    is_input, is_output = STREAM in args.paths, str(args.out) == STREAM
    if not (is_input or is_output):
        yield Streams()
        return
    _check(args, is_input, is_output)
    with TemporaryDirectory(prefix="samlight-") as folder:
        streams = Streams(is_output=is_output)
        if is_input:
            streams.source = Path(folder) / "input" / "stdin"
            streams.source.parent.mkdir()
            streams.source.write_bytes(sys.stdin.buffer.read())
            args.paths = [str(streams.source)]
        if not is_output:
            yield streams
            return
        args.out = Path(folder) / "output"
        with redirect_stdout(io.StringIO()):  # the table of results is no part of the file
            yield streams
        if streams.result is not None and streams.result.is_file():
            sys.stdout.buffer.write(streams.result.read_bytes())
            sys.stdout.buffer.flush()


def _check(args: argparse.Namespace, is_input: bool, is_output: bool):
    if args.resume:
        raise argparse.ArgumentTypeError(f"--resume needs files: it cannot go on with {STREAM}.")
    if is_input and len(args.paths) > 1:
        raise argparse.ArgumentTypeError(f"{STREAM} is one image, from standard input: give no path beside it.")
    if is_input and (sys.stdin is None or sys.stdin.isatty()):
        raise argparse.ArgumentTypeError(f"{STREAM} is an image from standard input: give one, as by < photo.jpg")
    if is_output and args.format == "png":
        raise argparse.ArgumentTypeError(
            f"--out {STREAM} is one file, and --format png a folder: choose another format."
        )
    if is_output and (sys.stdout is None or (sys.stdout.isatty() and args.format in ("overlay", "labels", "npz"))):
        raise argparse.ArgumentTypeError(f"--out {STREAM} would write to the terminal: redirect it, as by > masks.png")
