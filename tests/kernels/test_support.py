"""Tests of kernel probes: one per device and variant, one warning per reason, and no verdict if memory runs out."""

import shutil
import subprocess
import sys
import sysconfig
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from samlight_hf.kernels import records
from samlight_hf.kernels import support as triton_support
from samlight_hf.kernels.support import (
    compile_ahead,
    compiling_ahead,
    failure,
    in_compile_thread,
    is_out_of_memory,
    launch,
    launch_again,
    launched,
    only_compiles,
    only_compiling,
    settled,
    tried,
    why_not_tried,
)


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(records, "machine_of", lambda device: None)  # also not by other processes
    monkeypatch.setattr(triton_support, "_reasons", {})
    monkeypatch.setattr(triton_support, "_warned", set())


def broken():
    raise RuntimeError("no C\ncompiler")


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def in_turn(*functions):
    """Return a function that calls these in turn, and the list of its calls."""
    calls = []

    def run():
        calls.append(None)
        return functions[len(calls) - 1]()

    return run, calls


def test_a_kernel_that_fails_gives_one_warning_with_the_reason():
    assert failure("tests", lambda: True) is None
    assert "its result is wrong" in failure("tests", lambda: False)
    with pytest.warns(UserWarning, match="for tests does not run here: no C compiler.*operations are used instead"):
        assert "no C compiler" in why_not_tried("tests", CPU, 1, broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for variant in (1, 2):
            assert "no C compiler" in why_not_tried("tests", CPU, variant, broken)


@pytest.mark.filterwarnings("ignore")
def test_an_answer_is_kept_for_one_variant_on_one_device_of_one_kernel():
    devices = [torch.device(name) for name in ("cpu:0", "cpu:1", "meta")]
    places = [(name, device, variant) for name in "ab" for device in devices for variant in (1, 2)]
    calls = []
    for _ in range(3):
        for place in places:
            works = places.index(place) % 2 == 0
            reason = why_not_tried(*place, lambda p=place, w=works: (calls.append(p), w)[1])
            assert (reason is None) == works
    assert calls == places


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA says CUDA_ERROR_OUT_OF_MEMORY."),
        MemoryError(),
    ],
    ids=str,
)
def test_running_out_of_memory_is_no_answer(error):
    def fails():
        raise error

    attempt, calls = in_turn(fails, fails, lambda: True, broken)
    with pytest.raises(torch.OutOfMemoryError, match="no memory to try the Triton kernel for tests"):
        why_not_tried("tests", CPU, 1, attempt)
    assert len(calls) == 2  # repeated once with an empty cache
    for _ in range(2):
        assert why_not_tried("tests", CPU, 1, attempt) is None
    assert len(calls) == 3
    attempt, calls = in_turn(fails, lambda: True)
    assert why_not_tried("tests", CPU, 2, attempt) is None and len(calls) == 2


def test_too_few_resources_for_a_kernel_are_not_out_of_memory():
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 1, Hardware limit: 2"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_several_threads_try_a_kernel_once():
    calls, ready = [], threading.Barrier(8)

    def attempt() -> bool:
        calls.append(None)
        threading.Event().wait(0.1)
        return True

    def run():
        ready.wait()
        assert why_not_tried("tests", CPU, 1, attempt) is None

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_autocast_and_gradients_do_not_reach_an_attempt():
    def attempt() -> bool:
        assert torch.is_inference_mode_enabled()
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32

    with torch.autocast("cpu", torch.bfloat16):
        assert why_not_tried("tests", CPU, 1, attempt) is None


def test_a_variant_that_cannot_be_compiled_falls_back_with_one_warning():
    launch, calls = in_turn(lambda: "kernel", broken)
    assert launched("tests", CPU, 1, launch, lambda: "reference") == "kernel"
    with pytest.warns(UserWarning, match="for tests does not run here: no C compiler"):
        assert launched("tests", CPU, 1, launch, lambda: "reference") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launched("tests", CPU, 1, launch, lambda: "reference") == "reference"
    assert len(calls) == 2
    assert launched("tests", CPU, 2, lambda: "kernel", lambda: "reference") == "kernel"
    with pytest.raises(torch.OutOfMemoryError):
        launched("tests", CPU, 2, out_of_memory, lambda: "reference")
    assert launched("tests", CPU, 2, lambda: "kernel", lambda: "reference") == "kernel"


@pytest.mark.gpu
def test_nothing_is_tried_while_a_graph_is_captured():
    device, graph, numbers = torch.device("cuda"), torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
    with torch.cuda.graph(graph):
        numbers.add_(1)
        assert "while a CUDA graph is captured" in why_not_tried("tests", device, 1, broken)
    assert why_not_tried("tests", device, 1, lambda: True) is None
    assert why_not_tried("tests", torch.device("cuda", torch.cuda.current_device()), 1, broken) is None  # the same one


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_attempt_runs_on_its_own_device():
    for index in (1, 0):
        seen = []
        device = torch.device("cuda", index)
        assert why_not_tried("tests", device, 1, lambda s=seen: s.append(torch.cuda.current_device()) or True) is None
        assert seen == [index] and torch.cuda.current_device() == 0


class Kernel:
    """Stands for a Triton kernel, which needs a GPU; it is "compiled" as Triton does it, by whatever mode is active."""

    def __init__(self):
        self.compiled, self.launched = [], []

    def warmup(self, *arguments, grid, **options):
        self.compiled.append((grid, arguments, options))

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))


needs_threads = pytest.mark.skipif(
    not hasattr(triton_support.triton, "AsyncCompileMode"), reason="this Triton cannot compile in threads"
)


@needs_threads
def test_ahead_kernels_are_compiled_and_not_launched():
    kernel, call = Kernel(), ((2, 3), (1, "x"), {"ROWS": 4})

    def run():
        launch(kernel, call[0], *call[1], **call[2])
        assert only_compiles() == (len(kernel.launched) == 0)
        raise ValueError("a result that is not there")

    compile_ahead(run)
    assert (kernel.compiled, kernel.launched) == ([call], []) and not only_compiles()
    with pytest.raises(ValueError, match="not there"):
        run()
    assert (kernel.compiled, kernel.launched) == ([call], [call])


@needs_threads
def test_ahead_each_variant_is_asked_for_once():
    kernel, tensor = Kernel(), torch.zeros(64)
    calls = [
        ((tensor, 3, 0.5), {"ROWS": 4}), ((tensor[16:], 5, 7.5), {"ROWS": 4}),  # the same variant
        ((tensor[1:], 3, 0.5), {"ROWS": 4}), ((tensor.half(), 3, 0.5), {"ROWS": 4}), ((tensor, 3, None), {"ROWS": 4}),
        *(((tensor, number, 0.5), {"ROWS": 4}) for number in (1, 16, 2**31)), ((tensor, 3, 0.5), {"ROWS": 8}),
    ]  # fmt: skip
    with compiling_ahead():
        for arguments, options in calls * 2:
            compile_ahead(lambda a=arguments, o=options: launch(kernel, (1,), *a, **o))
    assert len(kernel.compiled) == len(calls) - 1
    compile_ahead(lambda: launch(kernel, (1,), tensor, 3, 0.5, ROWS=4))
    assert len(kernel.compiled) == len(calls)


@needs_threads
def test_ahead_kernels_wait_for_the_compiler_and_the_caller_does_not(monkeypatch):
    def prepare() -> threading.Event:
        ready = threading.Event()
        thread = threading.Thread(target=ready.wait, daemon=True)
        thread.start()
        monkeypatch.setattr(triton_support, "prepare_compiler", lambda: thread)
        return ready

    kernel, ready = Kernel(), prepare()
    with compiling_ahead():
        for number in (1, 2):
            compile_ahead(lambda number=number: launch(kernel, (number,), ROWS=number))
        assert kernel.compiled == []
        ready.set()
        triton_support.prepare_compiler().join()
        compile_ahead(lambda: launch(kernel, (3,), ROWS=3))
        assert [grid for grid, _, _ in kernel.compiled] == [(1,), (2,), (3,)]
    ready = prepare()
    with compiling_ahead():
        compile_ahead(lambda: launch(kernel, (4,), ROWS=4))
        threading.Timer(0.1, ready.set).start()
    assert len(kernel.compiled) == 4 and ready.is_set()  # the end of the block waits


@needs_threads
@pytest.mark.parametrize("several", [False, True])
def test_ahead_a_kernel_is_taken_to_run_and_the_kernels_of_its_attempt_are_compiled(several):
    kernel, reasons, ended = Kernel(), [], []

    def attempt() -> bool:
        tried(lambda: launch(kernel, (1,)), several)
        ended.append(torch.is_inference_mode_enabled())
        return bool(kernel.launched)

    def run():
        reasons.append(why_not_tried("tests", CPU, 1, attempt))
        reasons.append(why_not_tried("tests", CPU, 2, broken, "CUDA", "others"))
        launch(kernel, (2,), None)

    with compiling_ahead():
        for _ in range(2):
            compile_ahead(run)
    assert reasons == 4 * [None] and ended == [] == kernel.launched
    assert [grid for grid, _, _ in kernel.compiled] == [(1,), (2,)]
    reasons.clear()
    with pytest.warns(UserWarning, match="no C compiler"):
        run()
    assert reasons[0] is None and "no C compiler" in reasons[1]
    assert len(ended) == 1 and [grid for grid, _, _ in kernel.launched] == [(1,), (2,)]
    assert len(kernel.compiled) == 2 + several


def test_without_threads_no_attempt_is_made_for_compiling():
    with only_compiling():
        assert why_not_tried("tests", CPU, 1, lambda: pytest.fail("an attempt")) is None


@needs_threads
def test_ahead_a_kernel_is_loaded_in_the_thread_that_compiled_it():
    """Loading may take as long as compiling, and a failure shows when the kernel is launched."""
    from triton.runtime import _async_compile

    class Compiled:
        def __init__(self, fails: bool):
            self.fails, self.loaded, self._run, self.module = fails, [], None, None

        def __getitem__(self, grid):
            self.loaded.append(threading.current_thread().name)
            self._run = "a launcher"  # before Triton loads the kernel itself
            if self.fails:
                raise RuntimeError("out of resources")

    class Jitted(Kernel):
        def warmup(self, *arguments, grid, **options):
            kernel = Compiled(fails=arguments[0])
            kernels.append(kernel)
            return _async_compile.active_mode.get().submit(arguments, lambda: kernel, lambda kernel: None)

    kernels: list[Compiled] = []
    jitted = Jitted()
    with compiling_ahead():
        for fails in (False, True):
            compile_ahead(lambda fails=fails: launch(jitted, (1,), fails))
    assert [len(kernel.loaded) for kernel in kernels] == [1, 1]
    assert [kernel._run for kernel in kernels] == ["a launcher", None]


EXTENSION = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *arguments) { return PyLong_FromLong(NUMBER); }
static PyMethodDef methods[] = {{"launch", launch, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___triton_launcher(void) { return PyModule_Create(&module); }
"""


@pytest.mark.skipif(triton_support.triton is None, reason="Triton is not installed")
def test_a_launcher_that_is_loaded_again_replaces_no_other(tmp_path, monkeypatch):
    """In the order in which two threads may load them, with Triton up to version 3.6."""
    from triton.runtime import build

    compiler, headers = shutil.which("cc") or shutil.which("gcc"), sysconfig.get_paths()["include"]
    if compiler is None or not Path(headers, "Python.h").exists():
        pytest.skip("there is no C compiler, or no header of Python")
    paths = []
    for number in range(2):
        source, path = tmp_path / f"{number}.c", tmp_path / f"{number}.so"
        source.write_text(EXTENSION)
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-DNUMBER={number}", f"-I{headers}", source, "-o", path], check=True
        )
        paths.append(str(path))
    name, own = triton_support._LAUNCHER, object()
    monkeypatch.setitem(sys.modules, name, own)
    first, second, again = (build._load_module_from_path(name, paths[number]) for number in (0, 1, 0))
    assert [module.launch() for module in (first, second, again)] == [0, 1, 0]
    assert sys.modules[name] is own


def test_a_settled_property_is_kept_only_where_kernels_are_tried():
    class Uses:
        @settled
        def kernels(self) -> int:
            calls.append(only_compiles())
            return len(calls)

    calls: list[bool] = []
    uses = Uses()
    with only_compiling():
        assert (uses.kernels, uses.kernels) == (1, 2)
    assert (uses.kernels, uses.kernels) == (3, 3)
    with only_compiling():
        assert uses.kernels == 3
    assert calls == [True, True, False] and isinstance(Uses.kernels, settled)


@needs_threads
def test_ahead_nothing_is_concluded_from_an_error():
    compile_ahead(lambda: launched("tests", CPU, 1, broken, lambda: "slow"))
    assert launched("tests", CPU, 1, lambda: "fast", lambda: "slow") == "fast"


@needs_threads
def test_sources_are_compiled_once_and_ready_at_the_end():
    done = []

    def compiler(source: str):
        done.append((source, threading.current_thread() is threading.main_thread()))
        raise RuntimeError("the kernel's launch will say so")

    with compiling_ahead():
        for source in ("a", "b", "a"):
            compile_ahead(lambda source=source: in_compile_thread(compiler, source))
    assert sorted(done) == [("a", False), ("b", False)]
    in_compile_thread(compiler, "c")  # not ahead: nothing waits for it
    assert len(done) == 2


@needs_threads
def test_ahead_a_kernel_that_failed_is_compiled_again_when_it_is_launched():
    """Triton keeps the future of a compilation in the kernel's cache, with its error."""
    from triton.runtime import _async_compile

    results = [MemoryError("no memory"), "code"]

    class Jitted(Kernel):
        def __init__(self):
            super().__init__()
            self.device_caches = {0: ({}, "target")}

        def warmup(self, *arguments, grid, **options):
            def compiled():
                result = results[len(compiling)]
                compiling.append(arguments)
                if isinstance(result, Exception):
                    raise result
                return result

            cache, mode = self.device_caches[0][0], _async_compile.active_mode.get()
            finish = partial(cache.__setitem__, arguments)
            cache[arguments] = mode.submit(arguments, compiled, finish)

    compiling: list[tuple] = []
    kernel = Jitted()
    compile_ahead(lambda: launch(kernel, (1,), 1))
    assert compiling == [(1,)] and kernel.device_caches[0][0] == {}
    compile_ahead(lambda: launch(kernel, (1,), 1))
    assert kernel.device_caches[0][0] == {(1,): "code"}


@needs_threads
def test_within_the_callers_own_asynchronous_compilation_nothing_is_compiled_ahead():
    calls = []
    with ThreadPoolExecutor(1) as executor, triton_support.triton.AsyncCompileMode(executor), compiling_ahead():
        compile_ahead(lambda: calls.append(1))
    assert calls == []
    compile_ahead(lambda: calls.append(1))
    assert calls == [1]


def test_where_triton_cannot_compile_in_threads_nothing_is_compiled_ahead(monkeypatch):
    monkeypatch.setattr(triton_support, "triton", None)
    calls = []
    with compiling_ahead():
        compile_ahead(lambda: calls.append(1))
    assert calls == []


class Launched:
    """Stands for a kernel of Triton: a launch returns what was compiled for it, which can be launched, too."""

    def __init__(self, launches: list, compiled: object = None):
        self.launches, self.compiled = launches, compiled

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append((self, grid, arguments, options))
            return self.compiled

        return launch


def test_a_variant_of_a_kernel_is_looked_up_once(monkeypatch):
    monkeypatch.setattr(triton_support, "_compiled", {})
    launches: list = []
    compiled = Launched(launches)
    kernel, grid = Launched(launches, compiled), (3, 1, 1)
    memory = torch.zeros(9, dtype=torch.int32)
    aligned, odd = memory[:8], memory[1:]
    for tensor, number, constant, warps in (
        (aligned, 5, True, 4), (aligned, 16, True, 4), (odd, 5, True, 4), (odd, 6, True, 4), (aligned, 5, False, 4),
        (aligned, 5, True, 2), (aligned.float(), 5, True, 4), (aligned, 7, True, 4),
    ):  # fmt: skip
        launch_again(kernel, grid, (tensor,), (number,), (constant,), num_warps=warps)
    assert [launched is compiled for launched, *_ in launches] == [False, True, False, True, False, False, False, True]
    assert {grid for _, grid, *_ in launches} == {(3, 1, 1)}
    numbers = [arguments[1:] for *_, arguments, _ in launches]
    assert numbers == [(5, True), (16, True), (5, True), (6, True), (5, False), (5, True), (5, True), (7, True)]
    assert [options.get("num_warps") for *_, options in launches] == [4, None, 4, None, 4, 2, 4, None]


@pytest.mark.parametrize(
    ("compiled", "hip"),
    [(None, None), (object(), None), (Launched([]), "7.0")],
    ids=["the interpreter", "compiled elsewhere", "AMD"],
)
def test_what_cannot_be_launched_itself_is_looked_up_each_time(compiled, hip, monkeypatch):
    monkeypatch.setattr(triton_support, "_compiled", {})
    monkeypatch.setattr(torch.version, "hip", hip)
    launches: list = []
    kernel = Launched(launches, compiled)
    for _ in range(2):
        launch_again(kernel, (1, 1, 1), (torch.zeros(8),), (), (), num_warps=1)
    assert [launched for launched, *_ in launches] == [kernel, kernel]
