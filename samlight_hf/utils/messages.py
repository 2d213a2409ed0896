"""How errors and tables are told to a user."""

import logging
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import dropwhile


_MAX_LINES = 20  # of one kind


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The message of an error on one line, of at most `limit` characters; the error's type where it has none.

    Of an error that a DataLoader brought from a worker, with the worker's traceback for a message, its own message.
    """
    message = " ".join(_of_the_worker(str(error)).split()) or type(error).__name__
    return message if limit is None or len(message) <= limit else message[: limit - 3] + "..."


def _of_the_worker(message: str) -> str:
    """Behind the last frame of the traceback in a message of torch's ExceptionWrapper; any other message as it is."""
    _, head, traceback = message.rpartition("Traceback (most recent call last):\n")
    if not head or not message.startswith("Caught ") or "\nOriginal " not in message:
        return message
    lines = list(dropwhile(lambda line: line.startswith(" "), traceback.splitlines()))
    name, _, own = "\n".join(lines).partition(": ")
    return own or name


def text_table(rows: Sequence[Sequence[str]], flush_right: Collection[int] = (), rule: bool = False) -> str:
    """Columns as wide as their longest cell, those of `flush_right` by number; with a `rule` below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [rows[0], *([["-" * width for width in widths]] if rule else []), *rows[1:]]

    def aligned(index: int, cell: str) -> str:
        return cell.rjust(widths[index]) if index in flush_right else cell.ljust(widths[index])

    return "\n".join("  ".join(aligned(*each) for each in enumerate(line)).rstrip() for line in lines)


def make_console_safe():
    """Have stdout and stderr write what their encoding lacks as escapes: a redirected Windows console is cp1252.

    Called first by every command and example: a result that is written must not be followed by an error in telling it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def log_to_stderr(prefix: str) -> Iterator[None]:
    """Print what the package logs as lines with this prefix; of one kind the first 20, and then how many there were more."""
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
        self.prefix, self.counts = prefix, Counter()

    def emit(self, record: logging.LogRecord):
        self.counts[record.name, record.msg] += 1
        if self.counts[record.name, record.msg] <= _MAX_LINES:
            print(f"{self.prefix}{' '.join(record.getMessage().split())}", file=sys.stderr)

    def finish(self):
        for number in self.counts.values():
            if number > _MAX_LINES:
                print(f"{self.prefix}{number - _MAX_LINES:,} further lines like these.", file=sys.stderr)
