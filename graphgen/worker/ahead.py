"""An engine's Triton kernels, compiled before its worker launches them, by a process that has no device.

Owns that process, and the note that it leaves in Triton's cache: which kernels an engine needs takes seconds to find
out, so it is found out once. The worker starts it beside its imports and the loading of weights and waits for it before
the first launch; `graphgen prebuild` runs it where there need not be a GPU. What fails here is compiled, or fails again
with its reason, at its first launch. This module imports no torch; as a program it does.

    python -m graphgen.worker.ahead FOLDER MAJOR.MINOR     # FOLDER has the launch file
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct

from graphgen.base.logs import log_to_stderr
from graphgen.launch.launch_config import LaunchConfig

MODULE = "graphgen.worker.ahead"
MOST_PROCESSES = 16
"""A model has some forty kernels, and each takes one compiler for a second."""
PATIENCE_S = 300.0
"""After which the worker goes on without what this process would have compiled."""

_SOURCES = ("models", "worker")
"""Where kernels are defined and launched."""
_PACKAGES = ("torch", "triton", "flashinfer-python")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*

Capability = tuple[int, int]

logger = logging.getLogger("graphgen.worker.ahead")


class Note(Struct, frozen=True):
    """What was compiled for an engine, beside it in Triton's cache."""

    num_kernels: int
    failures: tuple[str, ...]
    seconds: float


class Driver(Protocol):
    """The functions of libcuda that tell what a device is. Each returns 0 or an error code."""

    def cuInit(self, flags: int) -> int: ...

    def cuDeviceGet(self, device: object, ordinal: int) -> int: ...

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int: ...


def capability_of(driver: Driver, ordinal: int) -> Capability | None:
    """The compute capability of a device, for which no context is made; None where the driver does not tell."""
    device, values = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    for value, attribute in zip(values, (_MAJOR, _MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return values[0].value, values[1].value


def has_kernels(config: LaunchConfig) -> bool:
    """Whether an engine with this config launches Triton kernels that can be known ahead."""
    return config.device != "cpu" and config.attention != "torch"


def compile_for_worker(folder: Path, rank: int, wait_for_turn: Callable[[], object]) -> float:
    """Has the kernels of the engine compiled of which `folder` has the launch file, if they are not yet; returns the
    seconds it took. For a thread of the worker. Of several ranks the first one does it for all."""
    wait_for_turn()
    config = LaunchConfig.read(folder)
    if rank or not has_kernels(config):
        return 0.0
    begun_s = time.monotonic()
    capability = capability_of(ctypes.CDLL("libcuda.so.1"), int(config.device.partition(":")[2] or 0))
    if capability is None or note_path(os.environ, config, capability).exists():
        return 0.0
    run_program(folder, capability, os.environ)
    return time.monotonic() - begun_s


def run_program(folder: Path, capability: Capability, environment: Mapping[str, str]) -> None:
    """Runs this module as a program, and waits for it. Its output is this process's."""
    arguments = [sys.executable, "-P", "-m", MODULE, str(folder), "{}.{}".format(*capability)]
    hidden = {**environment, "CUDA_VISIBLE_DEVICES": ""}  # it forks, which a process with a context must not
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(arguments, stdin=subprocess.DEVNULL, env=hidden, timeout=PATIENCE_S)


def compile_for_engine(config: LaunchConfig, capability: Capability, environment: Mapping[str, str]) -> Note | None:
    """The same where there need be no device; None where it cannot be done, which the program has said why."""
    path = note_path(environment, config, capability)
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="graphgen-kernels-") as folder:
            config.write(Path(folder))
            run_program(Path(folder), capability, environment)
    return read_note(path)


def note_path(environment: Mapping[str, str], config: LaunchConfig, capability: Capability) -> Path:
    """Where the note of this engine lies, once its kernels are compiled: with the kernels, so that who removes them
    removes it."""
    digest = blake2b(digest_size=12)
    for part in (*_what_decides(config), capability, *map(_version, _PACKAGES), *_own_sources()):
        digest.update(msgspec.msgpack.encode(part))
    return Path(environment.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache", f"{digest.hexdigest()}.note")


def read_note(path: Path) -> Note | None:
    """None where there is none, or none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Note)
    except (OSError, ValueError):
        return None


def _what_decides(config: LaunchConfig) -> tuple[object, ...]:
    """Of a config, what kernels and their constants follow from."""
    sizes = config.page_size, config.token_budget, config.num_slots, config.max_model_len, config.num_ranks
    return config.spec, config.dtype, config.kv_format, *sizes


def _own_sources() -> list[tuple[str, int, int]]:
    """Of every module that may define or launch a kernel: name, size and time of its last change."""
    package = Path(__file__).parent.parent
    files = (path for name in _SOURCES for path in (package / name).resolve().rglob("*.py"))
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(folder: Path, capability: Capability) -> None:
    """Compiles the kernels and leaves the note; says on standard error why, where it cannot."""
    log_to_stderr("kernels", logging.WARNING)
    begun_s = time.monotonic()
    try:
        importlib.import_module("triton")  # first: torch takes long, and is there without it
        from graphgen.models.triton_ahead import compile_sources, recorded_launches, target_of
        from graphgen.worker.dry_run import run_dry

        config, target = LaunchConfig.read(folder), target_of(capability)
        with recorded_launches(target) as sources:
            run_dry(config, capability)
        compiled = compile_sources(sources, target, min(MOST_PROCESSES, len(os.sched_getaffinity(0))))
    except Exception as error:  # of torch, of Triton, or of an attention backend that does not serve this model
        logger.warning("Triton kernels are compiled at their first launch, not ahead: %s", str(error) or repr(error))
        sys.exit(1)
    note = Note(compiled.num_kernels, compiled.failures, time.monotonic() - begun_s)
    for failure in note.failures:
        logger.warning("not compiled ahead: %s", failure)
    path = note_path(os.environ, config, capability)
    with contextlib.suppress(OSError):
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(msgspec.json.encode(note))
        partial.replace(path)


if __name__ == "__main__":
    major, minor = map(int, sys.argv[2].split("."))
    main(Path(sys.argv[1]), (major, minor))
