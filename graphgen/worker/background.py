"""What a worker does beside its imports, which are most of a start: it owns the threads and nothing that they make.

Importing takes the interpreter; a CUDA context is made by the driver, and weights are read by the kernel and copied by
the device, which need no interpreter. So the context is made while torch is imported, and the compiler is imported
while weights are read. Nothing depends on this: a piece that fails is done again, or fails again with its reason, at
its usual place. Started by `__main__` and by the runner.
"""

import contextlib
import ctypes
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from graphgen.ipc.worker_messages import Phase
from graphgen.launch.launch_config import LaunchConfig


class Background:
    """A piece of the start in a thread of its own."""

    def __init__(self, name: str, work: Callable[[], float]) -> None:
        """name: of its phase. work: returns the seconds it took, without those it spent waiting for a file."""
        self._name = name
        self._work = work
        self._took_s = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait(self) -> Phase:
        """Returns when the work has ended, well or not: what was left of it, and what other phases hid."""
        begun_s = time.monotonic()
        self._thread.join()
        waited_s = time.monotonic() - begun_s
        return Phase(self._name, waited_s, hidden_s=max(0.0, self._took_s - waited_s))

    def _run(self) -> None:
        # Whoever needs the result finds it missing and says why.
        with contextlib.suppress(Exception):
            self._took_s = self._work()


_SWITCH_S = 0.0003


def share_interpreter_fairly() -> None:
    """Threads that import, load and hash hand the interpreter on often: each of the thousands of small waits for it
    that loading and launching make costs one interval, by default 5 ms."""
    sys.setswitchinterval(_SWITCH_S)


def prepare_first_use(compiles: bool, on_cuda: bool, kernel_package: str | None) -> list[Background]:
    """Begins what the first compiled step and the loading of kernels would do before anything else.

    kernel_package: the package that loading imports, if any.
    """
    imports: list[Callable[[], object]] = [_import_compiler] if compiles else []
    imports += [partial(importlib.import_module, kernel_package)] if kernel_package else []
    pieces = [Background("late imports", partial(_in_turn, imports))] if imports else []
    return [*pieces, Background("triton key", partial(_in_turn, [_hash_triton]))] if on_cuda else pieces


def _in_turn(works: Sequence[Callable[[], object]]) -> float:
    begun_s = time.monotonic()
    for work in works:
        with contextlib.suppress(ImportError):
            work()
    return time.monotonic() - begun_s


def _import_compiler() -> None:
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch._inductor.compile_fx")
    # Part of every key in the compiler's cache: a hash over the sources of torch, computed once in a process.
    importlib.import_module("torch._inductor.codecache").torch_key()


def _hash_triton() -> None:
    # The same of Triton's caches, over its sources and its library of 400 MB.
    importlib.import_module("triton.runtime.cache").triton_key()


class CudaDriver(Protocol):
    """The functions of libcuda that make a context. Each returns 0 or an error code."""

    def cuInit(self, flags: int) -> int: ...

    def cuDeviceGet(self, device: object, ordinal: int) -> int: ...

    def cuDevicePrimaryCtxRetain(self, context: object, device: object) -> int: ...


def open_context(folder: Path, rank: int, wait_for_turn: Callable[[], object]) -> float:
    """Makes the CUDA context that torch will use, on the device that the launch file in `folder` names for this rank,
    once it is this worker's turn to use that device.

    That is the device's primary context: the runtime takes the one that is there. Returns the seconds it took.
    """
    wait_for_turn()
    device = LaunchConfig.read(folder).device_of(rank)
    if device == "cpu":
        return 0.0
    begun_s = time.monotonic()
    # What torch sets before it makes a context: a driver older than CUDA 12.2 would load every kernel at once.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    retain_primary_context(ctypes.CDLL("libcuda.so.1"), int(device.partition(":")[2] or 0))
    return time.monotonic() - begun_s


def retain_primary_context(driver: CudaDriver, ordinal: int) -> bool:
    """Whether device `ordinal` has its primary context now, which then stays until the process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), ordinal) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )
