"""What SIGTERM does: it removes what is half written, as Ctrl-C does; and each process says why it ends.

Where one process of a run fails, the others get an error from the collective call in which they wait for it, or the
launcher ends them by SIGTERM. No signal handler of Python runs within such a call. So a thread waits for the signal,
prints the line and ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .messages import shortened
from .processes import has_told_error, lost_process, tell_error


# Seconds for which a process that got SIGTERM waits for an error of its own, and in which it may print it and end.
_OWN_ERROR, _OWN_END = 0.5, 5.0
_STOP = b"\0"  # not the number of a signal

_is_watching = False
_before: Any = signal.SIG_DFL  # the handler of SIGTERM that is there where nothing is watched


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM in the main thread, within `sigterm_interrupts`."""

    status = 128 + signal.SIGTERM


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status of a command that Ctrl-C or SIGTERM ended."""
    return getattr(interrupt, "status", 128 + signal.SIGINT)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, so that files and folders that are half written are removed as after Ctrl-C.

    Nothing is done outside of the main thread, and where SIGTERM has another handler.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number, frame):
    raise Terminated


@contextlib.contextmanager
def explained_end(advice: Callable[[], str]) -> Iterator[None]:
    """Say why this process ends where another one has failed, or the run is stopped by SIGTERM.

    Args:
        advice: returns what the user can do, in whole sentences.

    Raises:
        RuntimeError: with the advice, for an error by which a collective call tells of another process's end.
    """
    with _told_of_termination(advice):
        try:
            yield
        except RuntimeError as error:
            if not (reason := lost_process(error)):
                raise
            raise RuntimeError(
                f"another process of this run has failed or cannot be reached ({shortened(reason, 140)}). {advice()}"
            ) from error


@contextlib.contextmanager
def _told_of_termination(advice: Callable[[], str]) -> Iterator[None]:
    """Print one line when SIGTERM ends this process, also while it waits in a collective call.

    An error that leaves the context in one of several processes stays that process's only line: SIGTERM, which often
    follows at once, then ends the process only if it does not end by itself, and prints the line only if the process
    has not printed its error by then. Nothing is done outside of the main
    thread, on Windows, and where SIGTERM has another handler than that of `sigterm_interrupts`.
    """
    global _before
    is_main_thread, handler = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGTERM)
    if os.name == "nt" or not is_main_thread or handler not in (signal.SIG_DFL, _terminate):
        yield
        return
    _before = handler
    failed, received = threading.Event(), threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader, advice, failed, received), daemon=True, name="termination")
    thread.start()
    _set_watching(True, writer)
    try:
        yield
    except BaseException as error:
        # The launcher ends the processes that load data as well, and torch tells of that first.
        if _is_one_of_several() and "killed by signal: Terminated" in str(error) and received.wait(_OWN_END):
            thread.join()  # until it has ended the process
        failed.set()
        if not _is_one_of_several():
            _stop(thread, writer)
        raise
    _stop(thread, writer)


def _set_watching(is_watching: bool, writer: int = -1):
    """Let the numbers of signals be written to a pipe instead of SIGTERM's default effect, or let them not be."""
    global _is_watching
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _ignore if is_watching else _before)
    _is_watching = is_watching


def _ignore(number, frame):
    """Do nothing: the thread ends the process."""


def _stop(thread: threading.Thread, writer: int):
    _set_watching(False)
    os.write(writer, _STOP)
    thread.join()
    os.close(writer)


def _watch(reader: int, advice: Callable[[], str], failed: threading.Event, received: threading.Event):
    while (number := os.read(reader, 1)) != _STOP:
        if number[0] == signal.SIGTERM:
            received.set()
            try:
                if _is_one_of_several() and failed.wait(_OWN_ERROR):
                    time.sleep(_OWN_END)
                if not has_told_error():
                    _tell(advice)
            finally:
                os._exit(128 + signal.SIGTERM)
    os.close(reader)


def _tell(advice: Callable[[], str]):
    why = "another process has failed, or the run was stopped" if _is_one_of_several() else "the run was stopped"
    tell_error(f"samlight: error: ended by SIGTERM: {why}. {advice()}")
    sys.stderr.flush()


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1  # set by launchers


def _has_handler() -> bool:
    return _is_watching or signal.getsignal(signal.SIGTERM) is _terminate


def _hold():  # a signal that comes before `_forget` would be lost
    if _has_handler():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release():
    if _has_handler():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _forget():
    global _before
    if not _has_handler():
        return
    _before = signal.SIG_DFL
    if _is_watching:
        _set_watching(False)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


if hasattr(os, "register_at_fork"):  # a forked process has no such thread, and would write to its parent's pipe
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
