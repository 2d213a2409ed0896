"""Whether kernels can run: found out by running one, and told once where they cannot."""

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch

from .messages import one_line


try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton
    triton = tl = None


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


def normal_numbers() -> Callable[..., torch.Tensor]:
    """For attempts: gives normally distributed numbers of a shape, float32 on the GPU, always the same ones."""
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape: torch.randn(shape, device="cuda", generator=generator)


def overlap_options(tensor: torch.Tensor) -> dict[str, bool]:
    """Options of a launch that may begin before the kernel before it has ended, for one that calls `wait_for_the_last_kernel`."""
    return (
        {"OVERLAP": True, "launch_pdl": True} if tensor.is_cuda and _can_overlap(tensor.device) else {"OVERLAP": False}
    )


@lru_cache
def _can_overlap(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch, from Hopper on."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


def failure(
    name: str, attempt: Callable[[], bool], language: str = "Triton", instead: str = "PyTorch's operations"
) -> str | None:
    """Why a kernel does not run on this machine, told as a warning too: a sentence, or None where `attempt` is right.

    Compilers need other tools, and a GPU that they know, which shows when they are tried. `attempt` runs the kernel on a
    small input and returns whether the result is right. Callers keep the answer. `instead` is what runs otherwise.
    """
    try:
        reason = None if attempt() else "its result is wrong"
    except Exception as error:  # of any kind: what is missing decides
        reason = one_line(error, 300)
    if torch.cuda.is_initialized():  # or what stays in memory would lie scattered over what the attempt took
        torch.cuda.empty_cache()
    if reason is None:
        return None
    reason = f"the {language} kernel for {name} does not run here: {reason}."
    warnings.warn(f"{reason} {instead} are used instead, which are slower.", stacklevel=2)
    return reason


if triton is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def wait_for_the_last_kernel(OVERLAP: tl.constexpr):
        """The kernel before this one may be running until here: what it writes is read afterwards. The next one may begin."""
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
