"""Triton kernels compiled before their first launch, by several processes; launches on no device tell which.

Owns the recording of launches and the compilation of what they need, into Triton's own cache, where the first launch on
a device finds them. Never launches and needs no GPU: a program of Triton depends on the kernel, on the types and
constants of its arguments and on the architecture alone. Called by graphgen.worker.dry_run and graphgen.worker.ahead,
in a process that launches nothing: what is recorded is not launched.

    with recorded_launches(target) as sources:
        ...                                    # runs whatever launches kernels, on fake tensors
    compile_sources(sources, target, 8)

It stands in for two functions of Triton, `JITFunction.run` and the `compile` that it calls: those are the same in
Triton 3.6 and later. A version in which they differ costs the time that compiling ahead would have saved.
"""

import contextlib
import ctypes
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

WARP_SIZE = 32
_MESSAGE_LEN = 300


def target_of(capability: tuple[int, int]) -> GPUTarget:
    """What Triton calls a GPU of this compute capability."""
    return GPUTarget("cuda", 10 * capability[0] + capability[1], WARP_SIZE)


class Source(NamedTuple):
    """A kernel with the types and constants of one launch, as Triton compiles it."""

    ast: Any  # triton.compiler.ASTSource
    options: dict[str, Any]  # num_warps and the like

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.ast.name)


class Compiled(NamedTuple):
    """What came of compiling."""

    num_kernels: int
    failures: tuple[str, ...]  # kernels that Triton does not compile, and why


class _NoDriver:
    """What Triton asks of a device before it compiles for one."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class _Pointer:
    """A tensor without memory, as Triton sees one: a type, and where it begins within an allocation, of which every
    begins at a multiple of 256 bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._begin = int(tensor.storage_offset()) * tensor.itemsize

    def data_ptr(self) -> int:
        return self._begin


@contextlib.contextmanager
def recorded_launches(target: GPUTarget) -> Iterator[list[Source]]:
    """The sources of all kernels that are launched meanwhile, each once; nothing runs. Tensors may be fake ones."""
    sources: dict[str, Source] = {}
    run = JITFunction.run

    def record(ast: Any, target: GPUTarget, options: dict[str, Any]) -> object:
        sources[f"{ast.hash()} {sorted(options.items(), key=str)}"] = Source(ast, dict(options))
        found[:] = sources.values()
        return object()  # None would say that nothing was compiled

    def launch(kernel: Any, *args: object, grid: object, warmup: bool, **options: object) -> object:
        del warmup
        by_name = {name: _without_memory(value) for name, value in options.items()}
        return run(kernel, *map(_without_memory, args), grid=grid, warmup=True, **by_name)

    found: list[Source] = []
    before = triton.runtime.driver._active  # asking for the active one would look for a device
    triton.runtime.driver.set_active(_NoDriver(target))
    try:
        with mock.patch.object(JITFunction, "run", launch), mock.patch("triton.compiler.compile", record):
            yield found
    finally:
        triton.runtime.driver._active = before


def _without_memory(value: object) -> object:
    return _Pointer(value) if isinstance(value, Tensor) else value


def compile_sources(sources: Sequence[Source], target: GPUTarget, num_processes: int) -> Compiled:
    """Compiles them into Triton's cache, several at once; those that lie there already cost a look.

    This process must have no CUDA context, since it forks.
    """
    context = multiprocessing.get_context("fork")
    following, failures = context.Value("i", 0), context.SimpleQueue()
    with _library_to_link(target) as folder:
        arguments = (sources, target, folder, following, failures)
        workers = [context.Process(target=_work, args=arguments) for _ in range(min(num_processes, len(sources)))]
        for worker in workers:
            worker.start()
        failed = []
        for worker in workers:
            worker.join()
        while not failures.empty():
            failed.append(failures.get())
    return Compiled(len(sources), tuple(failed))


def _work(sources: Sequence[Source], target: GPUTarget, folder: str | None, following: Any, failures: Any) -> None:
    """Of one process: the next source that nobody has taken, until there is none."""
    if folder is not None:
        triton.knobs.nvidia.libcuda_path = folder
    while True:
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= len(sources):
            return
        try:
            _compile(sources[number], target)
        except Exception as error:  # whatever Triton's compiler raises
            said = " ".join(str(error).split())
            failures.put(f"{sources[number].name}: {type(error).__name__}: {said[:_MESSAGE_LEN]}")


def _compile(source: Source, target: GPUTarget) -> None:
    """The program of the device, and the few lines of C that launch it, where Triton has some for each kernel."""
    kernel = triton.compile(source.ast, target=target, options=source.options)
    from triton.backends.nvidia.driver import CudaLauncher

    # Without a driver these lines are compiled and kept, and cannot be loaded: ImportError. From Triton 3.7 on they are
    # the same for all kernels, and the driver is asked for them: RuntimeError.
    with contextlib.suppress(ImportError, RuntimeError):
        CudaLauncher(kernel.src, kernel.metadata)


@contextlib.contextmanager
def _library_to_link(target: GPUTarget) -> Iterator[str | None]:
    """A folder with an empty libcuda.so.1, where there is no driver: what launches a kernel is linked to that name."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with tempfile.TemporaryDirectory(prefix="graphgen-libcuda-") as folder:
            path = Path(folder, "libcuda.so.1")
            compiler = os.environ.get("CC", "cc")
            subprocess.run([compiler, "-shared", "-o", path, "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1"])
            yield folder
    else:
        yield None
