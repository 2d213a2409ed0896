"""Probes that find out whether a kernel runs, by running it; a reason why it does not is warned of once."""

import contextlib
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar

import torch

from ..utils.autocast import without_autocast
from ..utils.messages import one_line
from ..utils.turns import is_capturing
from . import records


try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton
    triton = tl = None


_LAUNCHER = "__triton_launcher"


def _load_launchers_one_by_one():
    """Have Triton load its launchers one at a time, each as a module object of its own.

    Triton up to version 3.6 compiles a launcher for each kernel, as an extension module that is always called
    `_LAUNCHER`. When CPython loads one again, it writes its functions into the module that has this name in
    `sys.modules`. That may be the launcher which another thread has just loaded, and not yet read.
    """
    from triton.runtime import build

    load, lock = getattr(build, "_load_module_from_path", None), threading.RLock()
    if load is None:  # another version
        return

    def load_alone(name: str, path: str):
        if name != _LAUNCHER:
            return load(name, path)
        with lock:
            other = sys.modules.pop(name, None)
            try:
                return load(name, path)
            finally:
                sys.modules.pop(name, None)
                if other is not None:
                    sys.modules[name] = other

    build._load_module_from_path = load_alone


if triton is not None:
    _load_launchers_one_by_one()

_COMPILERS = 16  # threads that compile at the same time, at most

_only_compiles: ContextVar[bool] = ContextVar("only_compiles", default=False)
_compile_threads: ContextVar["_CompileThreads | None"] = ContextVar("compile_threads", default=None)

Result = TypeVar("Result")


def why_not_decoder(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return why a mask decoder's half-precision kernels cannot run, as a sentence, or None if they may be tried.

    Args:
        device: of the weights.
        dtype: of the weights.
        channels: number of the decoder's channels.
    """
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
    """Return a generator of test inputs: a function from a shape to seeded normal float32 numbers on the device."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, device=device, dtype=torch.float32, generator=generator)


def on_device(device: torch.device | None) -> contextlib.AbstractContextManager:
    """Return a context in which a CUDA device is the current one; for other devices, and for None, it does nothing."""
    is_cuda = device is not None and device.type == "cuda"
    return torch.cuda.device(device) if is_cuda else contextlib.nullcontext()


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which a tensor's device is the current one, where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():  # entering it takes microseconds
        return contextlib.nullcontext()
    return torch.cuda.device_of(tensor)


def overlap_options(tensor: torch.Tensor) -> dict[str, bool]:
    """Return launch options of a kernel with `grid_dependency_wait`, which may start before the previous one ends."""
    overlaps = tensor.is_cuda and _can_overlap(tensor.device)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


@lru_cache
def _can_overlap(device: torch.device) -> bool:
    """Return whether the device has programmatic dependent launch (Hopper and newer)."""
    return nvidia_generation(device) >= 9


def nvidia_generation(device: torch.device) -> int:
    """Return the major version of a GPU of NVIDIA, such as 9 for Hopper, and 0 for one of AMD, which has others."""
    return 0 if torch.version.cuda is None else torch.cuda.get_device_capability(device)[0]


@lru_cache
def num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device with an index."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *arguments, **options):
    """Launch a Triton kernel; within `compile_ahead` have it compiled and loaded instead."""
    if not only_compiles():
        kernel[grid](*arguments, **options)
        return
    threads = _compile_threads.get()
    variant = kernel, *map(_specialization, arguments), *options.items()
    if threads is not None and variant not in threads.variants:  # asking Triton whether it is compiled takes long
        threads.variants.add(variant)
        threads.waiting_kernels.append(partial(_compile, _current_device(), kernel, grid, arguments, options))
        if not prepare_compiler().is_alive():  # else they wait for it, and this thread goes on
            threads.compile_waiting()


_compiled: dict[tuple, Any] = {}  # what `launch_again` launches


def launch_again(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[torch.Tensor, ...], numbers: tuple, constants: tuple,
    num_warps: int,
):  # fmt: skip
    """Launch a Triton kernel that is launched often: Triton looks at each argument anew, for tens of microseconds.

    From the second launch of a variant on, the compiled kernel is launched itself. Variants are told apart by the
    tensors' dtypes and alignments and by the constants alone: all integers that are no constants are in the kernel's
    `do_not_specialize`, and fit into 32 bits. The tensors' device is the current one.

    Args:
        kernel: The kernel, of a module: it lives as long as the process.
        grid: Of its thread blocks.
        tensors: The first arguments, in the order of the kernel's signature, as all arguments are.
        numbers: The integers and floats behind them.
        constants: The `tl.constexpr` behind these.
        num_warps: Of a thread block.
    """
    kinds = [(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
    variant = id(kernel), tensors[0].device, num_warps, constants, *kinds
    compiled = _compiled.get(variant)
    if compiled is not None:
        compiled[grid](*tensors, *numbers, *constants)
        return
    compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
    # Not in Triton's interpreter, nor while it is compiled elsewhere; and for AMD Triton looks at tensors' sizes, too.
    if hasattr(type(compiled), "__getitem__") and torch.version.hip is None:
        _compiled[variant] = compiled


def _compile(device: torch.device | None, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict):
    with contextlib.suppress(Exception), on_device(device):  # the real launch says what is wrong
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if isinstance(future := getattr(compiled, "future", None), Future):
            future.add_done_callback(partial(_load, device))


@lru_cache
def prepare_compiler() -> threading.Thread:
    """Start a thread that does what Triton does once in a process before it compiles: it reads all of its own files.

    That takes a third of a second, and another half to compile a part of it where the cache is empty. Another thread
    imports what is imported when a kernel is first asked for.
    """
    threading.Thread(target=_import_tools, name="import tools", daemon=True).start()
    thread = threading.Thread(target=_prepare_compiler, name="prepare compiler", daemon=True)
    thread.start()
    return thread


def _prepare_compiler():
    with contextlib.suppress(Exception):  # it is done again, or fails again, when a kernel is compiled
        from triton.runtime.cache import triton_key

        triton.runtime.driver.active.get_current_target()
        triton_key()


def _import_tools():
    names = "triton.tools.tensor_descriptor", "triton.experimental.gluon.nvidia.hopper", "cuda.bindings.nvrtc"
    for name in names:
        with contextlib.suppress(Exception):  # not in this version, or not installed
            importlib.import_module(name)


def _load(device: torch.device | None, compiled: Future):
    """Load a kernel that has been compiled, in the thread that compiled it: older Tritons compile a launcher in C."""
    with contextlib.suppress(Exception), on_device(device):  # the real launch says what is wrong
        kernel = compiled.result()
        try:
            kernel[(1, 1, 1)]  # a function that would launch it
        except Exception:
            if getattr(kernel, "module", None) is None:
                kernel._run = None  # else Triton would take it for loaded, though it has no function
            raise


def _current_device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None


def _specialization(argument) -> tuple:
    """Return what Triton may compile for: dtype and alignment, or if an integer is 1, a multiple of 16, and large."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return type(argument), argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return (type(argument),)


def only_compiles() -> bool:
    """Return whether kernels are compiled now and not launched, see `compile_ahead`."""
    return _only_compiles.get()


class _CompileThreads(ThreadPoolExecutor):
    """The threads of `compiling_ahead`, and what was given to them.

    Attributes:
        variants: Variants of Triton's kernels.
        sources: Sources in CUDA.
        attempts: Keys of attempts, see `why_not_tried`.
        waiting: Threads that wait for processes which compile sources.
        waiting_kernels: Triton's kernels that wait for `prepare_compiler`.
    """

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        super().__init__(min(_COMPILERS, cores), thread_name_prefix="compile")
        self.waiting = ThreadPoolExecutor(min(_COMPILERS, cores), thread_name_prefix="wait")
        self.variants: set[tuple] = set()
        self.sources: set[str] = set()
        self.attempts: set[tuple] = set()
        self.waiting_kernels: list[Callable[[], None]] = []

    def compile_waiting(self):
        """Have the kernels compiled that wait for `prepare_compiler`."""
        while self.waiting_kernels:
            prepare_compiler().join()
            self.waiting_kernels.pop(0)()


def in_compile_thread(compiler: Callable[[str], object], source: str):
    """Compile a source, once, in another process that a thread of `compiling_ahead` waits for; errors are ignored."""
    threads = _compile_threads.get()
    if threads is not None and source not in threads.sources:
        threads.sources.add(source)
        threads.waiting.submit(compiler, source)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Compile the kernels of all `compile_ahead` inside at the same time; they are ready at the end.

    Triton compiles a kernel when it is first launched, one after another, in a second or so each. Where it cannot
    compile in threads, as within the caller's own `triton.AsyncCompileMode`, nothing is compiled ahead.
    """
    with contextlib.ExitStack() as stack:
        if _compile_threads.get() is None and hasattr(triton, "AsyncCompileMode"):
            with contextlib.suppress(RuntimeError):  # the caller's own mode is active
                threads = _CompileThreads()
                stack.callback(_forget_failed, threads)
                stack.enter_context(triton.AsyncCompileMode(threads, ignore_errors=True))
                stack.enter_context(threads)
                stack.enter_context(threads.waiting)
                stack.enter_context(_switched(_compile_threads, threads))
                stack.callback(threads.compile_waiting)
        yield


def _forget_failed(threads: _CompileThreads):
    """Let Triton compile again, when they are launched, the kernels that failed: it would keep the error for ever."""
    for kernel in {variant[0] for variant in threads.variants}:
        for compiled, *_ in getattr(kernel, "device_caches", {}).values():
            for key, future in list(compiled.items()):
                if type(future).__name__ == "FutureKernel" and future.kernel is None:
                    del compiled[key]


def compile_ahead(function: Callable[[], object]):
    """Compile the kernels that a function launches, all at the same time.

    The function is called once within `only_compiling`, and may fail there.
    """
    with compiling_ahead():
        if _compile_threads.get() is None:
            return
        with only_compiling(), contextlib.suppress(Exception):
            function()  # without results it may fail; the real call is what counts


@contextlib.contextmanager
def only_compiling() -> Iterator[None]:
    """Launch no kernels inside, but have them compiled, and those of attempts: kernels are taken to run.

    So code inside must not depend on their results, and nothing that they change may be used later. Outside of
    `compiling_ahead` nothing is compiled.
    """
    with _switched(_only_compiles, True):
        yield


class settled(cached_property[Result]):
    """A cached property that depends on which kernels run: within `only_compiling` it is computed, and not kept."""

    def __get__(self, instance, owner=None):
        if instance is None or not only_compiles():
            return super().__get__(instance, owner)
        return self.func(instance)


@contextlib.contextmanager
def _switched(variable: ContextVar[Result], value: Result) -> Iterator[None]:
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def why_not_tried(
    name: str,
    device: torch.device,
    variant: Hashable,
    attempt: Callable[[], bool],
    language: str = "Triton",
    fallback: str = "PyTorch's operations",
) -> str | None:
    """Return why a variant of a kernel does not run on a device, as a sentence, or None if it runs.

    The first call for a variant and a device tries it; later calls return the same answer. A reason is warned of once.
    That a kernel runs is recorded for other processes, too, see `records`.
    Within `only_compiling` a kernel is taken to run, and the kernels of its attempt are compiled.

    Args:
        name: the kernel's purpose, for messages.
        device: the device to try it on.
        variant: all properties that the kernel is compiled for.
        attempt: function that runs this variant, within `tried`, on a small input on the device and returns whether the
            result is right. The device is the current one during the call.
        language: the kernel's language, for messages.
        fallback: what runs instead of the kernel, for the warning.

    Raises:
        torch.OutOfMemoryError: if memory does not suffice for the attempt. The next call tries again.
    """
    key = name, language, _numbered(device), variant
    if key not in _reasons:
        if is_capturing(device):
            return f"the {language} kernel for {name} has not been tried, and cannot be while a CUDA graph is captured."
        if records.has_run(device, (name, language, variant)):
            _reasons[key] = None
            return None
        if only_compiles():
            threads = _compile_threads.get()
            if threads is not None and key not in threads.attempts:
                threads.attempts.add(key)
                with on_device(device):
                    _compile_attempt(attempt)
            return None
        with _trying:  # one thread at a time
            if key not in _reasons:
                with on_device(device):
                    reason = failure(name, attempt, language)
                if reason is None:
                    records.record(device, (name, language, variant))
                else:
                    _warn_once(reason, fallback)
                _reasons[key] = reason
    return _reasons[key]


def tried(run: Callable[[], Result], several: bool = False) -> Result:
    """Return the result of an attempt's kernels; within `only_compiling` they are compiled, and the attempt ends here.

    Args:
        run: function that launches the kernels.
        several: whether there are several, which are then compiled at the same time.
    """
    if only_compiles():
        run()
        raise _OnlyCompiled
    if several:
        compile_ahead(run)
    return run()


class _OnlyCompiled(Exception):
    """The end of an attempt that is there for its kernels to be compiled."""


@without_autocast
@torch.inference_mode()
def _compile_attempt(attempt: Callable[[], bool]):
    with contextlib.suppress(Exception):  # the real attempt is what counts
        attempt()


def launched(
    name: str,
    device: torch.device,
    variant: Hashable,
    launch: Callable[[], Result],
    reference: Callable[[], Result],
) -> Result:
    """Return the result of `launch`, or, with one warning, of `reference` if Triton cannot compile this variant.

    This is for kernels of which `why_not_tried` tries only some variants.

    Args:
        name: the kernel's purpose, for messages.
        device: the device that it runs on.
        variant: all properties that the kernel is compiled for.
        launch: function that runs the kernel. If it fails it has not written anything that `reference` reads.
        reference: function that computes the same without the kernel.

    Raises:
        torch.OutOfMemoryError: if memory does not suffice for the kernel.
    """
    if only_compiles():
        return launch()
    key = name, "Triton", _numbered(device), variant
    if _reasons.get(key) is None:
        try:
            return launch()
        except Exception as error:  # any error, as in `failure`
            if is_out_of_memory(error):
                raise
            reason = _sentence(name, "Triton", one_line(error, 300))
            _reasons[key] = reason
            _warn_once(reason, "PyTorch's operations")
    return reference()


_reasons: dict[tuple, str | None] = {}  # None for a kernel that runs
_warned: set[str] = set()
_trying = threading.RLock()


def _numbered(device: torch.device) -> tuple[str, int | None]:
    """Return a device's type and index; "cuda" without an index means the current device."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return device.type, index


def _warn_once(reason: str, fallback: str):
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"{reason} {fallback} are used instead, which are slower.", stacklevel=3)


def _sentence(name: str, language: str, reason: str) -> str:
    return f"the {language} kernel for {name} does not run here: {reason}."


@without_autocast
@torch.inference_mode()
def failure(name: str, attempt: Callable[[], bool], language: str = "Triton") -> str | None:
    """Return why a kernel does not run here, as a sentence, or None if `attempt` returns that its result is right.

    Missing compiler tools and unsupported GPUs only show in an attempt. If memory runs out, the attempt is repeated
    after torch's cache has been emptied.

    Raises:
        torch.OutOfMemoryError: if memory runs out again.
    """
    try:
        try:
            reason = None if attempt() else "its result is wrong"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _empty_cache()
            reason = None if attempt() else "its result is wrong"
    except Exception as error:  # any error: it depends on what is missing
        if is_out_of_memory(error):  # not a property of the kernel
            raise torch.OutOfMemoryError(f"no memory to try the {language} kernel for {name}: {error}") from error
        reason = one_line(error, 300)
    _empty_cache()  # or later allocations would be scattered over the attempt's memory
    return None if reason is None else _sentence(name, language, reason)


def _empty_cache():
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch, Triton, the driver or cuBLAS says that device or host memory ran out."""
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
        """Wait for the previous kernel, whose results may be read afterwards, and allow the next kernel to start."""
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
