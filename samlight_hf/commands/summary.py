"""Results, summary and messages of `samlight segment` and `samlight demo`."""

import errno
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.messages import one_line, text_table


if TYPE_CHECKING:
    from PIL import Image

    from ..masks.drawing import Panel


MAX_PANELS = 60
_MAX_TABLE_ROWS = 60


@dataclass(frozen=True)
class Row:
    """A row of the table of results: an image with its size (width, height), its masks and the path of its result.

    Attributes:
        num_left_out: the number of masks that the result lacks, see `write_masks`.
    """

    image: str
    size: tuple[int, int]
    prompt: str
    num_masks: int
    seconds: float
    output: Path
    num_left_out: int = 0


@dataclass
class Summary:
    """The summary that is printed at the end.

    The contact sheet has at most `MAX_PANELS` images, and a longer table than `_MAX_TABLE_ROWS` is left out.

    Attributes:
        folder: the folder of results.
        skipped: number of images that could not be segmented.
        already: number of images that an earlier run has done.
        replaced: number of earlier results that were replaced.
        columns: of the contact sheet; by default chosen by the number of images.
        seconds: duration of the run; 0 prints no images/s.
    """

    folder: Path
    skipped: int = 0
    already: int = 0
    replaced: int = 0
    columns: int | None = None
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    panels: "list[Panel]" = field(default_factory=list)

    def __post_init__(self):
        self.sheet = self.folder / "contact_sheet.png"

    def add(self, row: Row, panel: "Panel | None"):
        self.rows.append(row)
        if panel is not None and len(self.panels) < MAX_PANELS:
            self.panels.append(panel)

    def finish(self) -> int:
        """Print the summary, write the contact sheet, and return the exit status."""
        if not self.rows and not self.already:
            print(f"samlight: error: no image could be segmented ({self.skipped} skipped).", file=sys.stderr)
            return 1
        if 0 < len(self.rows) <= _MAX_TABLE_ROWS:
            self._print_table()
        if self.rows and not any(row.num_masks for row in self.rows):
            print("No masks found: lower --pred-iou-thresh and --stability-score-thresh, or raise --points-per-side.")
        if self.skipped:
            print(f"samlight: {self.skipped} skipped, {len(self.rows)} done.", file=sys.stderr)
        if self.replaced:
            print(f"samlight: {count(self.replaced, 'earlier result')} of the same images replaced.", file=sys.stderr)
        if left_out := sum(row.num_left_out for row in self.rows):
            print(
                f"samlight: {count(left_out, 'mask')} of {sum(row.num_masks for row in self.rows):,} left out of the "
                "results: empty, or covered by masks of higher scores. --format png keeps all.",
                file=sys.stderr,
            )
        if self.panels:
            self._save_contact_sheet()
        if self.seconds:
            masks = sum(row.num_masks for row in self.rows)
            rate = len(self.rows) / self.seconds
            print(f"{count(len(self.rows), 'image')}, {count(masks, 'mask')}, {rate:.3g} images/s, in {self.folder}")
        if self.already:
            print(f"{count(self.already, 'image')} done before.")
        return 0

    def _print_table(self):
        table = [("image", "size", "prompt", "masks", "seconds", "output")]
        for row in self.rows:
            size = f"{row.size[0]}x{row.size[1]}"
            table.append((row.image, size, row.prompt, str(row.num_masks), f"{row.seconds:.2f}", str(row.output)))
        print(text_table(table, flush_right=(3, 4)))

    def _save_contact_sheet(self):
        from ..masks.drawing import contact_sheet
        from ..utils.atomic_files import atomic_write

        path = self.sheet
        sheet = contact_sheet(self.panels, "SAM-Lightening", self.columns)
        with telling_where(path):
            atomic_write(path, lambda aside: sheet.save(aside, format="PNG"))
        left_out = f", with the first {len(self.panels)}" if len(self.panels) < len(self.rows) else ""
        print(f"Contact sheet: {path}{left_out}")


class DiskError(OSError):
    """An error in writing that ends a run, since it would recur with the next file."""


_OF_THE_DISK = {errno.ENOSPC, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def telling_where(path: Path, ends_the_run: bool = False) -> Iterator[None]:
    """Add the path to an OSError; where the next file would fail too, raise a `DiskError` that says how to go on.

    Args:
        path: the file that is being written.
        ends_the_run: each OSError ends the run, not only those of a full or broken disk.
    """
    try:
        yield
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror or error}."
        if ends_the_run or error.errno in _OF_THE_DISK:
            raise DiskError(
                f"{message} What is finished is kept: the same command with --resume goes on from there."
            ) from error
        raise OSError(message) from error


def count(number: int, noun: str) -> str:
    """Return the number with the noun, in the plural where it is not 1."""
    plural = "es" if noun.endswith("x") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


_PANEL_SIZE = 480, 360


def write_result(
    output: Path,
    file_format: str,
    image: "Image.Image",
    name: str,
    prompt: str,
    result,
    boxes,
    points,
    panel: bool = True,
) -> "tuple[int, Panel | None]":
    """Write the masks of one image.

    Args:
        output: path of the file or folder.
        file_format: one of `samlight_hf.masks.files.ENDINGS`.
        name: of the image in the file and on the contact sheet.
        prompt: a description of the prompts.
        result: the masks.
        boxes: (x1, y1, x2, y2) in pixels of the image, to be drawn.
        points: (x, y) in pixels of the image, to be drawn.
        panel: whether a panel is needed.

    Returns:
        The number of masks that the result lacks, see `write_masks`; and the image's panel of the contact sheet, None
        without `panel`.
    """
    from ..masks.drawing import Panel, draw_overlay
    from ..masks.files import write_masks

    with telling_where(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        num_left_out = write_masks(output, file_format, image, name, result, boxes, points)
    if not panel:
        return num_left_out, None
    small = draw_overlay(image, result, boxes, points, max_size=_PANEL_SIZE)
    return num_left_out, Panel(small, name, f"{prompt} · {count(len(result), 'mask')}")


def progress(items: Iterable, total: int) -> Iterable:
    """Show a progress bar over the items, in a terminal and for more than one item."""
    if total < 2 or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, total=total, unit="image", leave=False)


def point_progress(num_points: int, name: str):
    """Return a progress bar over the points of one image; on a CPU a point takes some hundredths of a second."""
    from tqdm import tqdm

    return tqdm(total=num_points, desc=name, unit="point", leave=False, delay=2, disable=None)


def report_skipped(error: BaseException, image: Path | None = None, shown: str | None = None):
    """Print why an image was skipped to stderr, in one line; `shown` stands for the image's path."""
    message = one_line(error)
    if not isinstance(error, ValueError | OSError | RuntimeError | MemoryError):  # a bug
        message = f"internal error: {type(error).__name__}: {message} (SAMLIGHT_DEBUG=1 shows where)"
        if os.environ.get("SAMLIGHT_DEBUG"):
            traceback.print_exception(error)
    if image is not None and not message.startswith(str(image)):
        message = f"{image}: {message}"
    if shown is not None:
        message = message.replace(str(image), shown)
    print(f"samlight: skipped {message}", file=sys.stderr)


def path_from(folder: Path, file: Path) -> str:
    """Return the path of a file from a folder, or its absolute path where both are on different drives."""
    file = Path(os.path.realpath(file.parent), file.name)
    try:
        return Path(os.path.relpath(file, os.path.realpath(folder))).as_posix()
    except ValueError:
        return str(file)


def describe_prompts(boxes: Sequence, points: Sequence) -> str:
    """Return a description such as "2 boxes, 1 point", or "everything" without prompts."""
    parts = [count(len(prompts), kind) for prompts, kind in ((boxes, "box"), (points, "point")) if prompts]
    return ", ".join(parts) or "everything"
