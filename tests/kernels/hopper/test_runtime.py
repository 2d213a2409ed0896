"""Tests that CUDA kernels are compiled, cached, and compiled again if the cache has lost them."""

import subprocess
from pathlib import Path

import pytest
import torch

from samlight_hf.kernels.hopper import runtime as hopper

from .test_linear import needs_compiler


SOURCE = 'extern "C" __global__ void add(int* x) { x[threadIdx.x] += NUMBER; }'


@pytest.fixture
def cache_directory(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """Record the sources that are compiled."""
    sources, compile_source = [], hopper.compile_source
    monkeypatch.setattr(hopper, "compile_source", lambda source: (sources.append(source), compile_source(source))[1])
    return sources


def source(number: int) -> str:
    return SOURCE.replace("NUMBER", str(number))


@needs_compiler
def test_code_is_kept_for_the_next_process(cache_directory, compilations):
    code = hopper.compiled(source(1))
    assert code.startswith(b"\x7fELF") and hopper.compiled(source(1)) == code and compilations == [source(1)]
    assert hopper.compiled(source(2)) != code and len(compilations) == 2
    kept = [path for path in cache_directory.rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == ["kernel.cubin"] * 2  # no partial files


@needs_compiler
def test_another_process_compiles_for_this_one(cache_directory, compilations):
    hopper.compile_in_process(source(1))
    assert [path.name for path in cache_directory.rglob("*") if path.is_file()] == ["kernel.cubin"]
    code = hopper.compiled(source(1))
    assert compilations == [] and code == hopper.compile_source(source(1))[0]
    hopper.compile_in_process(SOURCE.replace("NUMBER", "nothing"))  # an error is told where the kernel is needed
    with pytest.raises(RuntimeError, match="nothing"):
        hopper.compiled(SOURCE.replace("NUMBER", "nothing"))


@needs_compiler
@pytest.mark.parametrize("why", ["frozen", "embedded", "no cache", "hangs", "cannot start"])
def test_where_no_other_process_can_compile_this_one_does(cache_directory, compilations, monkeypatch, why):
    from triton.runtime import cache

    started = []

    def run(*arguments, **options):
        started.append(options["timeout"])
        raise subprocess.TimeoutExpired("python", 1) if why == "hangs" else OSError("no more processes")

    def no_directory(key):
        raise RuntimeError("no directory")

    monkeypatch.setattr(hopper.subprocess, "run", run)
    if why == "frozen":
        monkeypatch.setattr(hopper.sys, "frozen", True, raising=False)
    elif why == "embedded":
        monkeypatch.setattr(hopper.sys, "executable", "/usr/bin/uwsgi")
    elif why == "no cache":
        monkeypatch.setattr(cache, "get_cache_manager", no_directory)
    hopper.compile_in_process(source(1))
    assert bool(started) == (why in ("hangs", "cannot start")) and all(seconds > 0 for seconds in started)
    assert hopper.compiled(source(1)).startswith(b"\x7fELF") and compilations == [source(1)]


@needs_compiler
def test_what_another_process_compiled_differently_is_not_kept(cache_directory, compilations, monkeypatch):
    monkeypatch.setattr(hopper.nvrtc, "version", lambda: (1, 2))
    hopper.compile_in_process(source(1))
    assert not [path for path in cache_directory.rglob("*") if path.is_file()] and compilations == []


@needs_compiler
@pytest.mark.parametrize("left", [None, b"", b"\0" * 1000], ids=["removed", "empty", "zeros"])
def test_code_that_is_gone_when_it_is_read_is_compiled_again(cache_directory, compilations, monkeypatch, left):
    from triton.runtime.cache import FileCacheManager

    code, get_file = hopper.compiled(source(1)), FileCacheManager.get_file

    def found_and_lost(cache, name):
        path = get_file(cache, name)
        if left is None:
            Path(path).unlink()
        else:
            Path(path).write_bytes(left)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(FileCacheManager, "get_file", found_and_lost)
        assert hopper.compiled(source(1)) == code and len(compilations) == 2
    assert hopper.compiled(source(1)) == code and len(compilations) == 2


@needs_compiler
def test_without_a_place_to_keep_code_it_is_compiled_each_time(cache_directory, compilations):
    cache_directory.write_text("no directory")
    assert hopper.compiled(source(1)) == hopper.compiled(source(1)) and len(compilations) == 2


@needs_compiler
def test_the_compiler_writes_into_memory_that_may_be_written(monkeypatch):
    from cuda.bindings import nvrtc

    sizes = {}

    def watch(name: str):
        write, size_of = getattr(nvrtc, name), getattr(nvrtc, f"{name}Size")

        def watched(program, memory):
            assert isinstance(memory, bytearray)
            sizes[name] = len(memory), size_of(program)[1]
            return write(program, memory)

        monkeypatch.setattr(nvrtc, name, watched)

    watch("nvrtcGetProgramLog")
    watch("nvrtcGetCUBIN")
    code, log = hopper.compile_source(source(1))
    assert type(code) is bytes and code.startswith(b"\x7fELF") and "registers" in log and "\0" not in log
    assert len(sizes) == 2 and all(given == needed for given, needed in sizes.values())


@needs_compiler
def test_an_error_of_the_compiler_is_raised_with_its_message():
    with pytest.raises(RuntimeError, match='identifier "nothing" is undefined'):
        hopper.compile_source(SOURCE.replace("NUMBER", "nothing"))


def test_the_drivers_out_of_memory_is_torchs():
    class Status(int):
        name = "CUDA_ERROR_OUT_OF_MEMORY"

    with pytest.raises(torch.OutOfMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        hopper._checked((Status(2),))
    Status.name = "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(RuntimeError, match="INVALID_VALUE") as raised:
        hopper._checked((Status(1),))
    assert not isinstance(raised.value, torch.OutOfMemoryError)
    assert hopper._checked((Status(0), 3)) == 3
