"""Errors, tables and warnings as text for users."""

import logging
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import dropwhile


_MAX_LINES = 20  # of warnings of one kind
_NUMBERED = re.compile(r"^\[Errno \d+\] (.+): '([^']+)'$")


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return the message of an error on one line, or the error's type if it has no message.

    An OSError that names a file gives the file and the reason, without the error's number.

    A DataLoader raises an error of a worker again with the worker's traceback as its message; here only the original
    message is returned.

    Args:
        error: any error.
        limit: the largest number of characters; a longer message ends with "...".
    """
    message = " ".join(_strip_worker_traceback(str(error)).split()) or type(error).__name__
    if isinstance(error, OSError):
        message = _NUMBERED.sub(r"\2: \1", message)
    return message if limit is None else shortened(message, limit)


def shortened(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters; a longer one is cut and ends with "..."."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _strip_worker_traceback(message: str) -> str:
    """Return the text behind the traceback that torch's ExceptionWrapper adds; other messages unchanged."""
    _, head, traceback = message.rpartition("Traceback (most recent call last):\n")
    if not head or not message.startswith("Caught ") or "\nOriginal " not in message:
        return message
    lines = list(dropwhile(lambda line: line.startswith(" "), traceback.splitlines()))
    name, _, original = "\n".join(lines).partition(": ")
    return original or name


def text_table(rows: Sequence[Sequence[str]], flush_right: Collection[int] = (), rule: bool = False) -> str:
    """Lay out rows of cells as text, with columns as wide as their longest cell.

    Args:
        rows: cells of each row, as many in each.
        flush_right: indices of the columns that are aligned at the right.
        rule: draw a line below the first row.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [rows[0], *([["-" * width for width in widths]] if rule else []), *rows[1:]]

    def aligned(index: int, cell: str) -> str:
        return cell.rjust(widths[index]) if index in flush_right else cell.ljust(widths[index])

    return "\n".join("  ".join(aligned(*each) for each in enumerate(line)).rstrip() for line in lines)


def make_console_safe():
    """Make stdout and stderr write characters that their encoding lacks as escapes.

    A redirected Windows console, for example, is cp1252. Every command and example calls this first, so that printing a
    summary cannot fail after the results have been written.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def write_error_line(line: str):
    """Write a line to stderr at once: print writes its end by itself, and other processes may write between the two."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@contextmanager
def log_to_stderr(prefix: str) -> Iterator[None]:
    """Print the package's warnings to stderr, one line each.

    Args:
        prefix: the beginning of each line. The first 20 warnings of a kind are printed, and at the end the number of
            further ones.
    """
    handler = _Lines(prefix)
    logger = logging.getLogger(__package__.partition(".")[0])
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        handler.finish()


class _Lines(logging.Handler):
    def __init__(self, prefix: str):
        super().__init__(logging.WARNING)
        self.prefix = prefix
        self.counts: Counter[tuple[str, str]] = Counter()

    def emit(self, record: logging.LogRecord):
        self.counts[record.name, record.msg] += 1
        if self.counts[record.name, record.msg] <= _MAX_LINES:
            write_error_line(f"{self.prefix}{' '.join(record.getMessage().split())}")

    def finish(self):
        for number in self.counts.values():
            if number > _MAX_LINES:
                write_error_line(f"{self.prefix}{number - _MAX_LINES:,} further lines like these.")
