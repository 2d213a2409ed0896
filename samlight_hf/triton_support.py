"""Whether Triton's kernels can run: found out by running one, and told once where they cannot."""

import warnings
from collections.abc import Callable

from .messages import one_line


try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton
    triton = tl = None


def failure(name: str, attempt: Callable[[], bool]) -> str | None:
    """Why a kernel does not run on this machine, told as a warning too: a sentence, or None where `attempt` is right.

    Triton needs a C compiler and a GPU that it knows, which shows when it is tried. `attempt` runs the kernel on a small
    input and returns whether the result is right. Callers keep the answer.
    """
    try:
        reason = None if attempt() else "its result is wrong"
    except Exception as error:  # of any kind: what is missing decides
        reason = one_line(error, 300)
    if reason is None:
        return None
    reason = f"the Triton kernel for {name} does not run here: {reason}."
    warnings.warn(f"{reason} PyTorch's operations are used instead, which are slower.", stacklevel=2)
    return reason
