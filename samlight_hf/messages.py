"""How errors and tables are told to a user."""

from collections.abc import Collection, Sequence
from itertools import dropwhile


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
