"""Compiling, caching and launching of CUDA kernels for Hopper GPUs.

Only CUDA gives full access to Hopper's tensor cores and to the tensor memory accelerator, which copies to shared
memory. The tools come with PyTorch: NVIDIA's compiler as a library (NVRTC), and `cuda.bindings`. Both are imported on
first use.
"""

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...utils.turns import current_stream
from ..support import num_processors as num_processors  # for the modules beside this one
from ..support import on_device
from . import nvrtc
from .nvrtc import compile_source


if TYPE_CHECKING:
    from cuda.bindings.driver import CUfunction, CUlaunchConfig, CUtensorMap
    from triton.runtime.cache import CacheManager

_HEADER = Path(__file__).with_name("common.cuh")
_TIMEOUT_SECONDS = 120  # of a process that compiles a kernel, which takes some seconds
_CUBIN, _ELF = "kernel.cubin", b"\x7fELF"  # file name in the cache, and first bytes of its content


@lru_cache
def has_bindings() -> bool:
    """Return whether `cuda.bindings`, which compile and launch kernels, are installed."""
    try:
        return find_spec("cuda.bindings") is not None
    except ImportError:  # no `cuda`, or another one
        return False


def why_not_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no CUDA kernel can run with tensors of this device and dtype, as a sentence, or None if some may."""
    if device.type != "cuda":
        return f"the tensors are on {device}."
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA."
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the GPU is not a Hopper GPU."
    if not has_bindings():
        return "cuda.bindings is not installed."
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, and not {str(dtype).removeprefix('torch.')}."
    return None


def are_aligned(*tensors: torch.Tensor | None) -> bool:
    """Return whether tensors, except those that are None, are contiguous and aligned to 16 bytes."""
    return all(tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0) for tensor in tensors)


def product(
    name: str,
    columns: int,
    dtype: str,
    from_registers: bool = False,
    transposed: bool | None = None,
    may_overwrite: bool = False,
) -> str:
    """Write a CUDA function that adds a product of a 64 x 16 and a 16 x `columns` matrix to a warpgroup's registers.

    Args:
        name: of the function.
        columns: of the second matrix.
        dtype: "f16" or "bf16".
        from_registers: whether the first matrix is in registers. The second, and otherwise both, are in shared memory.
        transposed: whether the second is stored transposed. Default: if the first is in shared memory.
        may_overwrite: whether the function has one more argument: whether to add the product, or to overwrite.

    Returns:
        Its source.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    if from_registers:
        parameters = "".join(f"unsigned x{i}, " for i in range(4))
        first = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        inputs = "".join(f'"r"(x{i}), ' for i in range(4))
        second, options = count + 4, f"1, 1, {int(not transposed)}"
    else:
        parameters, first, inputs = "unsigned long long x, ", f"%{count}", '"l"(x), '
        second, options = count + 1, f"1, 1, 0, {int(transposed is False)}"
    before, adds, after, last_input = "", "1", "", ""
    if may_overwrite:
        before, adds, after = f"{{.reg .pred adds; setp.ne.b32 adds, %{second + 1}, 0; ", "adds", "}"
        last_input = ', "r"(adds)'
    parameters += f"unsigned long long y{', int adds' if may_overwrite else ''}"
    return (
        f"__device__ __forceinline__ void {name}(float (&sums)[{count}], {parameters}) {{\n"
        f'    asm volatile("{before}wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype} {{{sums}}}, '
        f'{first}, %{second}, {adds}, {options};{after}" : {operands} : {inputs}"l"(y){last_input});\n}}\n'
    )


def source_of(path: Path, constants: dict[str, int | str], functions: str = "") -> str:
    """Return a CUDA source: `#define`s of the constants, then `functions`, then the file with its header inlined."""
    defined = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return defined + functions + _inlined(path)


@lru_cache
def _inlined(path: Path) -> str:
    return path.read_text().replace(f'#include "{_HEADER.name}"', _HEADER.read_text())


def compiled(source: str) -> bytes:
    """Return machine code, from Triton's cache or newly compiled.

    Other processes may clear the cache at any time, and it may be full or not writable; the code is compiled again
    then. The cache is trusted: its content is run without a check.
    """
    code, cache = _cached(source)
    if code is None:
        code = compile_source(source)[0]
        _keep(cache, code)
    return code


def compile_in_process(source: str):
    """Compile a source for the cache in another process. Where this fails, `compiled` compiles it, or says why not."""
    code, cache = _cached(source)
    if code is not None or cache is None or not _can_start_python():
        return
    library = nvrtc.library()
    command = [sys.executable, nvrtc.__file__, library]
    paths = filter(None, (os.path.dirname(library), os.environ.get("LD_LIBRARY_PATH")))  # NVRTC opens another beside it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LD_LIBRARY_PATH": os.pathsep.join(paths)}
    try:
        child = subprocess.run(
            command, input=source.encode(), capture_output=True, env=environment, timeout=_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    version, _, code = child.stdout.partition(b"\n")
    if child.returncode == 0 and version == repr(nvrtc.version()).encode() and code.startswith(_ELF):
        _keep(cache, code)


def _can_start_python() -> bool:
    """Return whether `sys.executable` runs scripts: not where Python is embedded, or frozen into an application."""
    return "python" in Path(sys.executable or "").name.lower() and not getattr(sys, "frozen", False)


def _cached(source: str) -> tuple[bytes | None, "CacheManager | None"]:
    """Return the machine code that is in the cache, and the place in the cache for it; None for what there is not."""
    from triton.runtime.cache import get_cache_manager

    key = hashlib.sha256(repr((nvrtc.version(), nvrtc.OPTIONS, source)).encode()).hexdigest()
    cache = None
    with contextlib.suppress(OSError, RuntimeError):  # removed in the meantime, or no directory for it
        cache = get_cache_manager(key)  # makes a directory
        if (path := cache.get_file(_CUBIN)) and (code := Path(path).read_bytes()).startswith(_ELF):
            return code, cache
    return None, cache


def _keep(cache: "CacheManager | None", code: bytes):
    with contextlib.suppress(OSError):
        if cache is not None:
            cache.put(code, _CUBIN)  # atomic: written to a temporary file and moved


def load_kernel(device: torch.device, code: bytes, name: str, shared_bytes: int) -> "CUfunction":
    """Load a kernel onto a device and allow it `shared_bytes` of shared memory."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        module = _checked(driver.cuModuleLoadData(code))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, limit, shared_bytes))
    return function


def tensor_map(
    tensor: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> "CUtensorMap":
    """Describe a tensor to the tensor memory accelerator, which copies boxes of it.

    Args:
        tensor: float16 or bfloat16.
        sizes: of five dimensions, the innermost first.
        strides: of all dimensions but the innermost, in elements.
        box: sizes of the boxes; 64 or 16 in the innermost dimension, which are 128 or 32 bytes.
    """
    return _map_of_address(tensor.data_ptr(), tensor.dtype, sizes, strides, box)


@lru_cache(maxsize=256)  # weights, and what graphs return, are always in one place
def _map_of_address(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> "CUtensorMap":
    """Describe what is, or will be, at an address; see `tensor_map`."""
    from cuda.bindings import driver

    kinds, u32, u64 = driver.CUtensorMapDataType, driver.cuuint32_t, driver.cuuint64_t
    permutations, bfloat16 = driver.CUtensorMapSwizzle, dtype == torch.bfloat16
    return _checked(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            len(sizes),
            address,
            [u64(size) for size in sizes],
            [u64(stride * dtype.itemsize) for stride in strides],
            [u32(size) for size in box],
            [u32(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            {
                64: permutations.CU_TENSOR_MAP_SWIZZLE_128B,
                16: permutations.CU_TENSOR_MAP_SWIZZLE_32B,
            }[box[0]],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def launch_kernel(
    kernel: "CUfunction",
    device: torch.device,
    num_blocks: int,
    num_threads: int,
    shared_bytes: int,
    *arguments: "torch.Tensor | int | float | CUtensorMap | None",
):
    """Launch a kernel that may start before the previous one ends, and that waits for it by itself.

    Args:
        kernel: the kernel.
        device: of the tensors.
        num_blocks: number of thread blocks.
        num_threads: number of threads per thread block.
        shared_bytes: shared memory per thread block.
        arguments: of the kernel; None is a null pointer.
    """
    from cuda.bindings import driver

    config = _launch_config(num_blocks, num_threads, shared_bytes, current_stream(device).cuda_stream)
    values, types = zip(*map(_argument, arguments))
    with on_device(None if device.index == torch.cuda.current_device() else device):
        _checked(driver.cuLaunchKernelEx(config, kernel, (values, types), 0))


@lru_cache(maxsize=64)
def _launch_config(num_blocks: int, num_threads: int, shared_bytes: int, stream: int) -> "CUlaunchConfig":
    """Make a configuration for `launch_kernel` on a stream with this handle: launches read it, and do not keep it."""
    from cuda.bindings import driver

    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = num_blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(stream)
    config.attrs, config.numAttrs = [overlap], 1
    return config


def _argument(value) -> tuple:
    """Return value and C type of a kernel's argument."""
    if value is None or isinstance(value, torch.Tensor):
        return 0 if value is None else value.data_ptr(), ctypes.c_void_p
    return value, {int: ctypes.c_int, float: ctypes.c_float}.get(type(value))


def _checked(answer: tuple):
    """Return the results of a function of `cuda.bindings`, without its status.

    Raises:
        torch.OutOfMemoryError: if the status says that memory ran out.
        RuntimeError: for any other failure.
    """
    status, *values = answer
    if int(status):
        kind = torch.OutOfMemoryError if "OUT_OF_MEMORY" in status.name else RuntimeError
        raise kind(f"CUDA says {status.name}.")
    return values[0] if len(values) == 1 else values
