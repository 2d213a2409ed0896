"""Several processes of one command, as `accelerate launch` and torchrun start them: one of them speaks for all, and each leaves
the group that they communicate through before it ends.
"""

import contextlib
import gc
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from accelerate import PartialState


def process_index() -> int:
    """Returns this process's number among those that were started together, 0 where it is alone."""
    distributed = sys.modules.get("torch.distributed")  # nothing is imported for it: who has a group has torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    # Before there is a group, and after it: what the launchers tell each process.
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ and "RANK" in os.environ else 0


def is_main_process() -> bool:
    """Returns whether this process is the one that speaks, and that writes what all have made."""
    return process_index() == 0


def tell(*values, **options):
    """Prints, as `print` does, on the main process; the others have the same to say."""
    if is_main_process():
        print(*values, **options)


def tell_error(message: str):
    """Prints to stderr on every process, since an error may be of one alone; all but the main one say who they are."""
    print(message if is_main_process() else f"process {process_index()}: {message}", file=sys.stderr)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Drops on all but the main process what is printed in it: for code that prints by itself, such as argparse's --help."""
    if is_main_process():
        yield
    else:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield


@contextlib.contextmanager
def process_group(cpu: bool = False) -> "Iterator[PartialState]":
    """Gives accelerate's state of the processes; a group that is made here is left here, and one that was there stays.

    After an error nobody leaves: the others may wait in a communication, and the launcher ends them.

    Args:
        cpu: communicate and compute on the CPU, also where there is a GPU.
    """
    import torch
    from accelerate import PartialState

    was_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    yield PartialState(cpu=cpu)
    if not was_there:
        leave_process_group()


def leave_process_group():
    """The last that a script does on each process, once its trainers are out of scope.

    What is left of the last communication is freed by a thread of Gloo's. If it comes to that while the interpreter ends, the
    process aborts, with everything done (PyTorch issue 179291). NCCL warns of every process that ends without it.
    """
    from accelerate import PartialState

    gc.collect()
    PartialState().destroy_process_group()
