"""NVIDIA's compiler as a library. As a script it compiles in a process of its own, without importing PyTorch.

NVRTC compiles one program at a time in a process.
"""

import ctypes
import sys


OPTIONS = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--ptxas-options=-v"]


def version() -> tuple[int, int]:
    """Return the compiler's version, major and minor."""
    from cuda.bindings import nvrtc

    return tuple(_checked(nvrtc.nvrtcVersion()))


def compile_source(source: str) -> tuple[bytes, str]:
    """Compile a CUDA source; this needs no GPU.

    Returns:
        Machine code (a cubin), and the compiler's log about registers and memory.

    Raises:
        RuntimeError: With the compiler's messages, if it rejects the source.
        MemoryError: If there is no memory for it.
    """
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), OPTIONS)
        buffer = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))  # mutable: NVRTC writes into it
        _checked(nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.decode(errors="replace").strip("\0 ")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(log)
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple):
    """Return the results of a function of `cuda.bindings`, without its status."""
    status, *values = answer
    if int(status):
        kind = MemoryError if "OUT_OF_MEMORY" in status.name else RuntimeError
        raise kind(f"NVRTC says {status.name}.")
    return values[0] if len(values) == 1 else values


def library() -> str:
    """Return the path of the library that this process uses, which PyTorch may have loaded."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return load_nvidia_dynamic_lib("nvrtc").abs_path or ""


if __name__ == "__main__":  # the library; a source on standard input, the version and the code on standard output
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)  # the one that `cuda.bindings` then finds
    compiled, _ = compile_source(sys.stdin.buffer.read().decode())
    sys.stdout.buffer.write(repr(version()).encode() + b"\n" + compiled)
