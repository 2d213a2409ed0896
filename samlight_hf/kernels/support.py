"""Whether kernels can run: found out by running one, and told once where they cannot."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import TypeVar

import torch

from ..utils.autocast import without_autocast
from ..utils.messages import one_line


try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton
    triton = tl = None

Result = TypeVar("Result")


def why_not_decoder(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why a mask decoder's kernels for half precision cannot run with these weights: a sentence, or None where they may be tried."""
    if triton is None:
        return "Triton is not installed."
    if device.type != "cuda":
        return f"the weights are on {device}."
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} has no tensor cores that keep its precision."
    if channels not in (128, 256):
        return f"the decoder has {channels} channels, and not 128 or 256."
    return None


def normal_numbers(device: torch.device) -> Callable[..., torch.Tensor]:
    """For attempts: gives normally distributed numbers of a shape, float32 on the device, always the same ones."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, device=device, dtype=torch.float32, generator=generator)


def overlap_options(tensor: torch.Tensor) -> dict[str, bool]:
    """Options of a launch that may begin before the kernel before it has ended, for one that calls `grid_dependency_wait`."""
    return (
        {"OVERLAP": True, "launch_pdl": True} if tensor.is_cuda and _can_overlap(tensor.device) else {"OVERLAP": False}
    )


@lru_cache
def _can_overlap(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch, from Hopper on."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


def why_not_tried(
    name: str,
    device: torch.device,
    variant: Hashable,
    attempt: Callable[[], bool],
    language: str = "Triton",
    instead: str = "PyTorch's operations",
) -> str | None:
    """Why a variant of a kernel does not run on a device, found out when it is first asked for: a sentence, or None where it does.

    Args:
        name: of what the kernel does. A reason is told once as a warning, with `instead`, which runs then.
        device: on which it is tried. The answer is kept for this device alone.
        variant: all that the kernel is compiled for.
        attempt: runs this variant on a small input on the device, which is the current one then, and returns whether the result is right.

    Raises:
        torch.OutOfMemoryError: where there is no memory for the attempt. Nothing is kept of it: the next call tries again.
    """
    key = name, language, _numbered(device), variant
    if key not in _reasons:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return f"the {language} kernel for {name} has not been tried, and cannot be while a CUDA graph is captured."
        with _trying:  # of several threads, one
            if key not in _reasons:
                with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                    reason = failure(name, attempt, language)
                if reason is not None:
                    _tell(reason, instead)
                _reasons[key] = reason
    return _reasons[key]


def launched(
    name: str,
    device: torch.device,
    variant: Hashable,
    launch: Callable[[], Result],
    reference: Callable[[], Result],
) -> Result:
    """What `launch` gives, or `reference` where Triton cannot compile this variant of a kernel, which is told once.

    For kernels of which `why_not_tried` knows some variants alone. `launch` must write nothing that `reference` reads.
    """
    key = name, "Triton", _numbered(device), variant
    if _reasons.get(key) is None:
        try:
            return launch()
        except Exception as error:  # of any kind, as in `failure`
            if is_out_of_memory(error):
                raise
            _reasons[key] = _sentence(name, "Triton", one_line(error, 300))
            _tell(_reasons[key], "PyTorch's operations")
    return reference()


_reasons: dict[tuple, str | None] = {}  # None for a kernel that runs
_told: set[str] = set()
_trying = threading.RLock()


def _numbered(device: torch.device) -> tuple[str, int | None]:
    """A device by its number, which is always the same one's within a process."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return device.type, index


def _tell(reason: str, instead: str):
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"{reason} {instead} are used instead, which are slower.", stacklevel=3)


def _sentence(name: str, language: str, reason: str) -> str:
    return f"the {language} kernel for {name} does not run here: {reason}."


@without_autocast
@torch.inference_mode()
def failure(name: str, attempt: Callable[[], bool], language: str = "Triton") -> str | None:
    """Why a kernel does not run here: a sentence, or None where `attempt` says that the result is right.

    Compilers need other tools, and a GPU that they know, which shows when they are tried. Where memory runs out, the attempt
    is repeated with what torch had kept for later. Raises torch.OutOfMemoryError where that is not enough.
    """
    try:
        try:
            reason = None if attempt() else "its result is wrong"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _empty_cache()
            reason = None if attempt() else "its result is wrong"
    except Exception as error:  # of any kind: what is missing decides
        if is_out_of_memory(error):  # which says nothing of the kernel
            raise torch.OutOfMemoryError(f"no memory to try the {language} kernel for {name}: {error}") from error
        reason = one_line(error, 300)
    _empty_cache()  # or what stays in memory would lie scattered over what the attempt took
    return None if reason is None else _sentence(name, language, reason)


def _empty_cache():
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the machine, in torch, in Triton, in the driver or in cuBLAS."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in message for words in ("out of memory", "out_of_memory", "alloc_failed")
    )


if triton is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def grid_dependency_wait(OVERLAP: tl.constexpr):
        """The kernel before this one may be running until here: what it writes is read afterwards. The next one may begin."""
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
