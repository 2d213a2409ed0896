"""Records of kernels that have been tried, beside the compiled ones: another process on the machine need not try again.

A record is for a variant of a kernel, this package's sources of kernels, the device, its driver, and the versions of
PyTorch and Triton. It says that the result was right. Like all of the cache it is trusted. What does not run is never
recorded, since the reason, such as a missing compiler, may be gone the next time.
"""

import contextlib
import hashlib
import os
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

import torch


try:
    import triton
except ImportError:  # a platform without Triton
    triton = None

_FILE = "tried"
_DRIVER = Path("/proc/driver/nvidia/version")
# Environment variables that change what is compiled begin with these; two only say where it is kept.
_SETTINGS = ("TRITON_", "PTXAS_", "DISABLE_PTXAS_", "DISABLE_LLVM_", "LLVM_", "MLIR_")
_CACHE_SETTINGS = ("TRITON_CACHE_DIR", "TRITON_HOME")


def has_run(device: torch.device, kernel: tuple[Hashable, ...]) -> bool:
    """Return whether there is a record that this variant of a kernel ran on such a device, with the right result."""
    with contextlib.suppress(OSError, RuntimeError):  # no directory for the cache, or it is removed meanwhile
        if (cache := _cache(device, kernel)) is not None:
            return cache.get_file(_FILE) is not None
    return False


def record(device: torch.device, kernel: tuple[Hashable, ...]):
    """Record that this variant of a kernel ran. Without room or rights to write nothing is recorded."""
    with contextlib.suppress(OSError, RuntimeError):
        if (cache := _cache(device, kernel)) is not None:
            cache.put(repr(kernel), _FILE, binary=False)


def _cache(device: torch.device, kernel: tuple[Hashable, ...]):
    """Return the place for a record in Triton's cache, or None if none is kept for this device."""
    if triton is None or (machine := machine_of(device)) is None:
        return None
    from triton.runtime.cache import get_cache_manager

    settings = sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS))
    settings = [item for item in settings if item[0] not in _CACHE_SETTINGS]
    versions = torch.__version__, torch.version.cuda, triton.__version__, settings
    return get_cache_manager(hashlib.sha256(repr((kernel, machine, versions, _sources())).encode()).hexdigest())


def machine_of(device: torch.device) -> tuple | None:
    """Return all properties of a device and its driver that a record is for; None for a device without records."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _properties(index: int) -> tuple:
    found = torch.cuda.get_device_properties(index)
    driver = _DRIVER.read_text() if _DRIVER.exists() else ""
    return found.name, found.major, found.minor, found.multi_processor_count, driver


@lru_cache
def _sources() -> str:
    """Return a hash of the sources of all kernels, and of what tries them."""
    paths = (path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".cu", ".cuh"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(paths))).hexdigest()
