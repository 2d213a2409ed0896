"""Several processes of one command, as `accelerate launch` and torchrun start them.

Only the main process prints, and each process leaves the process group before it ends.
"""

import contextlib
import gc
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .messages import one_line, write_error_line


if TYPE_CHECKING:
    from accelerate import PartialState


# What NCCL says of errors that another process has no part in, and the words before its detailed reason.
_OWN_NCCL_ERRORS = ("ncclInvalidUsage", "ncclInvalidArgument", "ncclUnhandledCudaError")
_NCCL_DETAIL = "Last error:"

_has_told_error = False


def process_index() -> int:
    """Return the global rank of this process, 0 if it runs alone."""
    distributed = sys.modules.get("torch.distributed")  # not imported here: a process in a group has it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    # Before there is a group and after it: the environment variables that launchers set.
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ and "RANK" in os.environ else 0


def is_main_process() -> bool:
    """Return whether this process is the one that prints, and that writes the common results."""
    return process_index() == 0


def tell(*values, **options):
    """Print on the main process only, with the arguments of `print`."""
    if is_main_process():
        print(*values, **options)


def tell_error(message: str):
    """Print an error to stderr on every process, since it may concern only one; all but the main one add their rank."""
    global _has_told_error
    _has_told_error = True
    write_error_line(message if is_main_process() else f"process {process_index()}: {message}")


def has_told_error() -> bool:
    """Return whether this process has printed an error by `tell_error`."""
    return _has_told_error


def lost_process(error: BaseException) -> str | None:
    """Return how an error tells that another process of the group has ended or cannot be reached.

    Returns:
        The reason, on one line, or None for errors of this process. Among these are a wrong use of NCCL and a failed
        call of CUDA, which NCCL raises by the same type.
    """
    distributed = sys.modules.get("torch.distributed")
    kinds = () if distributed is None else (getattr(distributed, "DistError", ()),)
    cause: BaseException | None = error
    while cause is not None:
        message = one_line(cause)
        # Gloo's errors are plain RuntimeErrors that begin with the path of its source.
        if isinstance(cause, RuntimeError) and "/gloo/" in message:
            return message
        if isinstance(cause, kinds) and not any(own in message for own in _OWN_NCCL_ERRORS):
            return message.partition(_NCCL_DETAIL)[2].strip() or message
        cause = cause.__cause__
    return None


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Silence all but the main process in this context: for code that prints by itself, such as argparse's --help."""
    if is_main_process():
        yield
    else:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield


@contextlib.contextmanager
def process_group(cpu: bool = False) -> "Iterator[PartialState]":
    """Enter a process group, and leave it at the end unless it existed before.

    After an error the group is not left: other processes may wait in a collective call, and the launcher ends them.

    Args:
        cpu: communicate and compute on the CPU, also where there is a GPU.

    Yields:
        accelerate's state of the processes.
    """
    import torch
    from accelerate import PartialState

    was_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    yield PartialState(cpu=cpu)
    if not was_there:
        leave_process_group()


def leave_process_group():
    """Leave the process group: the last step of a script on each process, once its trainers are out of scope.

    A thread of Gloo frees the objects of the last collective call. If it does so while the interpreter ends, the
    process aborts although its work is done (PyTorch issue 179291). NCCL warns of each process that skips this call.
    """
    from accelerate import PartialState

    gc.collect()
    PartialState().destroy_process_group()
