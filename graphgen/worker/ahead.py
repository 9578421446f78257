"""An engine's Triton kernels, compiled before its worker launches them, by a process that has no device.

Owns that process, and the note that it leaves in Triton's cache: which kernels an engine needs takes seconds to find
out, so it is found out once. The worker starts it before anything else and waits for its end before the first launch:
between the two it knows nothing of it, asks no driver and starts no thread for it. `graphgen prebuild` runs it where
there need not be a GPU. What fails here, also by a signal, is compiled, or fails again with its reason, at its first
launch. This module imports no torch; as a program it does.

    python -m graphgen.worker.ahead FOLDER RANK [MAJOR.MINOR]     # FOLDER has the launch file
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct

from graphgen.base.logs import log_to_stderr
from graphgen.ipc.worker_messages import Phase
from graphgen.launch.launch_config import LaunchConfig

MODULE = "graphgen.worker.ahead"
MOST_PROCESSES = 16
"""A model has some forty kernels, and each takes one compiler for a second."""
PATIENCE_S = 300.0
"""After which the worker goes on without what this process would have compiled."""

_SOURCES = ("models", "worker")
"""Where kernels are defined and launched."""
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")
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


def has_driver() -> bool:
    """Whether there may be a GPU: not where no driver made its device files, under Linux or under Windows' Linux."""
    return any(Path(path).exists() for path in _DRIVER_FILES)


def has_kernels(config: LaunchConfig) -> bool:
    """Whether an engine with this config launches Triton kernels that can be known ahead."""
    return config.device != "cpu" and config.attention != "torch"


class KernelsAhead:
    """The process, beside the worker that started it."""

    def __init__(self, command: Sequence[str], patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

    @classmethod
    def of(cls, folder: Path, rank: int) -> "KernelsAhead":
        """For the engine whose launch file will be in `folder`. To be called before threads are started."""
        return cls([sys.executable, "-P", "-m", MODULE, str(folder), str(rank)])

    def wait(self) -> Phase:
        """Returns when the process has ended, well or not: what was left of its work, and what other phases hid."""
        begun_s = time.monotonic()
        took_s = 0.0
        try:
            said, _ = self._process.communicate(timeout=self._patience_s)
            took_s = float(said or 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        except ValueError:
            logger.warning("the process that compiles Triton kernels said %r, not how long it took", said)
        if self._process.returncode < 0:
            logger.warning(
                "the process that compiles Triton kernels ahead was ended by signal %d: what it left is compiled at its"
                " first launch",
                -self._process.returncode,
            )
        waited_s = time.monotonic() - begun_s
        return Phase("triton kernels", waited_s, hidden_s=max(0.0, took_s - waited_s))


def compile_for_engine(config: LaunchConfig, capability: Capability, environment: Mapping[str, str]) -> Note | None:
    """The same where there need be no device; None where it cannot be done, which the program has said why."""
    path = note_path(environment, config, capability)
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="graphgen-kernels-") as folder:
            config.write(Path(folder))
            arguments = [sys.executable, "-P", "-m", MODULE, folder, "0", "{}.{}".format(*capability)]
            nothing = subprocess.DEVNULL
            subprocess.run(arguments, stdin=nothing, stdout=nothing, env=dict(environment))
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


def main(folder: Path, rank: int, capability: Capability | None) -> float:
    """Compiles what the engine of the launch file lacks; returns the seconds it took. Of several ranks the first one
    does it for all. capability: None: of the device that the launch file names."""
    config = LaunchConfig.read(folder)
    if rank or not has_kernels(config):
        return 0.0
    begun_s = time.monotonic()
    capability = capability or _ask_driver(int(config.device.partition(":")[2] or 0))
    if capability is not None and not note_path(os.environ, config, capability).exists():
        # From here on: what is imported below must find no device, since this process will fork.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        compile_kernels(config, capability)
    return time.monotonic() - begun_s


def _ask_driver(ordinal: int) -> Capability | None:
    """capability_of, by another process: this one has never called the driver when it forks."""
    imports = f"import ctypes; from {MODULE} import capability_of"
    program = f"{imports}; print(capability_of(ctypes.CDLL('libcuda.so.1'), {ordinal}))"
    done = subprocess.run([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    found = re.fullmatch(r"\((\d+), (\d+)\)", done.stdout.strip())
    return None if found is None else (int(found[1]), int(found[2]))


def compile_kernels(config: LaunchConfig, capability: Capability) -> None:
    """Compiles the kernels and leaves the note; says on standard error why, where it cannot."""
    begun_s = time.monotonic()
    try:
        importlib.import_module("triton")  # first: torch takes long, and is there without it
        from graphgen.models.triton_ahead import compile_sources, recorded_launches, target_of
        from graphgen.worker.dry_run import run_dry

        target = target_of(capability)
        with recorded_launches(target) as sources:
            run_dry(config, capability)
        compiled = compile_sources(sources, target, min(MOST_PROCESSES, len(os.sched_getaffinity(0))))
    except Exception as error:  # of torch, of Triton, or of an attention backend that does not serve this model
        logger.warning("Triton kernels are compiled at their first launch, not ahead: %s", str(error) or repr(error))
        return
    note = Note(compiled.num_kernels, compiled.failures, time.monotonic() - begun_s)
    for failure in note.failures:
        logger.warning("not compiled ahead: %s", failure)
    path = note_path(os.environ, config, capability)
    with contextlib.suppress(OSError):
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(msgspec.json.encode(note))
        partial.replace(path)


if __name__ == "__main__":
    log_to_stderr("kernels", logging.WARNING)
    named = tuple(map(int, sys.argv[3].split("."))) if len(sys.argv) > 3 else None
    print(main(Path(sys.argv[1]), int(sys.argv[2]), None if named is None else (named[0], named[1])))
