"""FlashInfer's compiled kernels: which ones a model needs, where they lie, and how they are loaded or built.

Owns the kernel folder and the order of places to load from:

    1. the kernel folder      loads at once, needs neither nvcc nor ninja
    2. FlashInfer's own       kernels that came with its package
    3. a build                all that are missing in one ninja run, then kept in the kernel folder for the next start

A library is known by the name FlashInfer gives it, which says everything it depends on but the version and the
architecture; these are in the folder's path. Never launches a kernel. The worker calls `load_libraries` through
flashinfer.py, `graphgen prebuild` calls `build_libraries`, which needs no GPU.
"""

import logging
import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec import Struct

from graphgen.caches import kernels_root
from graphgen.ipc.errors import ConfigError, UnsupportedModelError

_HEAD_DIMS = (64, 128, 256)
_LEAST_MAJOR = 8
_BUILD_LOG_LINES = 15

logger = logging.getLogger("graphgen.kernels")


class Kernel(IntEnum):
    """Which kernel attends for a region."""

    FA2 = 0
    FA3 = 1
    XQA = 2
    SPLIT_KV = 3  # ours, in Triton: see split_kv.py


class AttentionShape(Struct, frozen=True):
    """What the kernels are built for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    windows: tuple[int, ...]  # the distinct sliding windows of the layers, 0 for full attention


def check_supported(shape: AttentionShape) -> None:
    """Raises UnsupportedModelError or ConfigError for what FlashInfer's kernels cannot run."""
    remedy = "use attention='torch'"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"FlashInfer attends in bfloat16 or float16, dtype is {shape.dtype}: {remedy}")
    if shape.head_dim not in _HEAD_DIMS:
        raise UnsupportedModelError(f"head_dim is {shape.head_dim}, FlashInfer has {_HEAD_DIMS}: {remedy}")


def best_kernels(capability: tuple[int, int]) -> tuple[Kernel, Kernel]:
    """The fastest measured pair of a compute capability: FA3 reads a chunk twice as fast as FA2 on SM90, and the
    split-KV kernel needs no plan, reads KV at the speed of memory and lets padded rows off with a page."""
    return (Kernel.FA3 if capability[0] == 9 else Kernel.FA2), Kernel.SPLIT_KV


class Source(StrEnum):
    """Where a loaded library came from, in the words of `graphgen info`."""

    PREBUILT = "prebuilt"
    PACKAGED = "from FlashInfer's package"
    BUILT = "built now"


class PlannedLibrary(Struct, frozen=True):
    """Attention of ragged rows over paged KV, planned by the host."""

    backend: Literal["fa2", "fa3"]
    dtype: torch.dtype
    head_dim: int
    windowed: bool

    def spec(self) -> Any:  # FlashInfer is untyped
        """FlashInfer's JitSpec: name, paths and sources."""
        from flashinfer.jit.attention.modules import gen_batch_prefill_module

        return gen_batch_prefill_module(*self._arguments())

    def load(self) -> Any:
        """The module. FlashInfer keeps it: later calls return the same."""
        from flashinfer.prefill import get_batch_prefill_module

        return get_batch_prefill_module(*self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        dtypes = (self.dtype, self.dtype, self.dtype, torch.int32)  # of q, KV, output and indices
        no_rope, no_soft_cap, no_fp16_qk = 0, False, False
        return self.backend, *dtypes, self.head_dim, self.head_dim, no_rope, self.windowed, no_soft_cap, no_fp16_qk


class XqaLibrary(Struct, frozen=True):
    """Attention of one row per request, which reads block tables on the device."""

    dtype: torch.dtype
    page_size: int
    head_dim: int
    group: int  # query heads of one KV head
    windowed: bool

    def spec(self) -> Any:  # FlashInfer is untyped
        """FlashInfer's JitSpec: name, paths and sources."""
        from flashinfer.jit.xqa import gen_xqa_module

        return gen_xqa_module(*self._arguments())

    def load(self) -> Any:
        """The module. FlashInfer keeps it: later calls return the same."""
        from flashinfer.xqa import get_xqa_module

        return get_xqa_module(*self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        rows_per_request = 1
        return (
            self.dtype,
            self.dtype,
            self.page_size,
            self.head_dim,
            self.group,
            self.windowed,
            self.dtype,
            rows_per_request,
        )


Library = PlannedLibrary | XqaLibrary


def needed_libraries(shape: AttentionShape, kernels: Sequence[Kernel]) -> list[Library]:
    """Every library that layers of this shape use with these kernels, each once."""
    libraries = [
        _library(shape, kernel, window > 0)
        for window in shape.windows
        for kernel in kernels
        if kernel is not Kernel.SPLIT_KV  # Triton compiles it at its first launch
    ]
    return list(dict.fromkeys(libraries))


def _library(shape: AttentionShape, kernel: Kernel, windowed: bool) -> Library:
    if kernel is Kernel.XQA:
        group = shape.num_heads // shape.num_kv_heads
        return XqaLibrary(shape.dtype, shape.page_size, shape.head_dim, group, windowed)
    return planned_library(kernel, shape.dtype, shape.head_dim, windowed)


def planned_library(kernel: Kernel, dtype: torch.dtype, head_dim: int, windowed: bool) -> PlannedLibrary:
    """The library of a kernel that the host plans."""
    backends: dict[Kernel, Literal["fa2", "fa3"]] = {Kernel.FA2: "fa2", Kernel.FA3: "fa3"}
    return PlannedLibrary(backends[kernel], dtype, head_dim, windowed)


# --- architectures ---------------------------------------------------------------------------------------------


def arch_of(capability: tuple[int, int]) -> str:
    """A compute capability as nvcc's architecture: from 9.0 on with the suffix that opens its own instructions."""
    major, minor = capability
    if major < 9:
        return f"{major}.{minor}"
    return f"{major}.{minor}f" if capability == (12, 0) else f"{major}.{minor}a"


def parse_arch(text: str) -> tuple[int, int]:
    """The compute capability of "9.0a" or "9.0". Raises ConfigError."""
    found = re.fullmatch(r"(\d+)\.(\d)([a-z]?)", text)
    if found is None:
        raise ConfigError(f"arch is {text!r}: write it like 8.0 or 9.0a")
    capability = int(found[1]), int(found[2])
    if capability[0] < _LEAST_MAJOR:
        raise ConfigError(f"arch is {text!r}, FlashInfer's kernels need {_LEAST_MAJOR}.0 or newer")
    if found[3] and text != arch_of(capability):
        raise ConfigError(f"arch is {text!r}, kernels are built for {arch_of(capability)}: use that")
    return capability


# --- the folder ------------------------------------------------------------------------------------------------


class KernelFolder(Struct, frozen=True):
    """Built libraries of one FlashInfer version and one architecture: NAME/NAME.so."""

    path: Path

    @classmethod
    def of(cls, arch: str) -> "KernelFolder":
        """The folder in graphgen's caches."""
        import flashinfer

        return cls(kernels_root(os.environ) / flashinfer.__version__ / arch)

    def library_path(self, name: str) -> Path:
        return self.path / name / f"{name}.so"

    def load(self, library: Library, name: str) -> bool:
        """Loads a library that lies here; False where none lies here that can be loaded."""
        path = self.library_path(name)
        if not path.exists():
            return False
        try:
            _check_whole(path)
            with _loading_from(self.path):
                library.load()
        except Exception as error:  # the loader raises whatever the platform's linker says
            logger.warning("the prebuilt kernel %s cannot be loaded and is built again: %s", path, error)
            return False
        return True

    def keep(self, name: str, built: Path) -> None:
        """Copies a built library here in one rename, so that whoever reads meanwhile sees all of it or nothing."""
        path = self.library_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            shutil.copyfile(built, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _loading_from(folder: Path) -> Iterator[None]:
    """FlashInfer looks for a built library in this folder before it builds one.

    Its packages' folder is a module attribute that it reads at every look, meant for such use; it is put back so that
    nothing else in this process is affected.
    """
    from flashinfer.jit import env

    packaged = env.FLASHINFER_AOT_DIR
    env.FLASHINFER_AOT_DIR = folder
    try:
        yield
    finally:
        env.FLASHINFER_AOT_DIR = packaged


def _check_whole(path: Path) -> None:
    """Raises ValueError for a file that was cut short: loading one may kill the process, where others only fail.

    An ELF file ends with the table of its sections: its header says where that lies and how long it is.
    """
    with path.open("rb") as file:
        header = file.read(64)
        file_bytes = file.seek(0, os.SEEK_END)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        raise ValueError(f"it has {file_bytes} bytes and is no 64-bit ELF library")
    (table_start,) = struct.unpack_from("<Q", header, 40)
    entry_bytes, num_entries = struct.unpack_from("<HH", header, 58)
    if file_bytes < table_start + entry_bytes * num_entries:
        raise ValueError(f"it has {file_bytes} bytes of {table_start + entry_bytes * num_entries}")


# --- loading and building --------------------------------------------------------------------------------------


def load_libraries(libraries: Sequence[Library], folder: KernelFolder) -> list[Source]:
    """Loads every library, building what is found nowhere; where each came from, in order.

    Raises ConfigError when a build is needed and fails.
    """
    sources: dict[Library, Source] = {}
    missing: dict[Library, Any] = {}  # JitSpec, untyped
    for library in libraries:
        spec = library.spec()
        if folder.load(library, spec.name):
            sources[library] = Source.PREBUILT
        elif spec.is_aot:
            library.load()
            sources[library] = Source.PACKAGED
        else:
            missing[library] = spec
    if missing:
        logger.info("building %d attention kernels, which takes minutes", len(missing))
        _build(list(missing.values()))
    for library, spec in missing.items():
        try:
            folder.keep(spec.name, spec.jit_library_path)
        except OSError as error:
            logger.warning("the next start builds %s again, since it was not kept: %s", spec.name, error)
        if not folder.load(library, spec.name):
            library.load()
        sources[library] = Source.BUILT
    return [sources[library] for library in libraries]


def build_libraries(libraries: Sequence[Library], folder: KernelFolder) -> dict[str, Source]:
    """Puts every library into the folder: its name, and whether it lay there or was built now. Loads none.

    Raises ConfigError when a build fails or the folder cannot be written.
    """
    try:
        specs = [library.spec() for library in libraries]
    except ValueError as error:  # a size that no kernel is written for
        raise ConfigError(f"FlashInfer has no kernel for this model: {error}") from error
    found = {spec.name: _is_whole(folder.library_path(spec.name)) for spec in specs}
    missing = [spec for spec in specs if not found[spec.name]]
    if missing:
        _build(missing)
    for spec in missing:
        try:
            folder.keep(spec.name, spec.jit_library_path)
        except OSError as error:
            raise ConfigError(f"the kernel folder {folder.path} cannot be written ({error}): use another") from error
    return {name: Source.PREBUILT if there else Source.BUILT for name, there in found.items()}


def describe_sources(sources: Sequence[Source]) -> str:
    """For people: "kernels prebuilt", or how many came from where."""
    counts = Counter(sources)
    if len(counts) == 1:
        return f"kernels {sources[0]}"
    return "kernels: " + ", ".join(f"{counts[source]} {source}" for source in Source if counts[source])


def _is_whole(path: Path) -> bool:
    try:
        _check_whole(path)
    except (OSError, ValueError):
        return False
    return True


def _build(specs: Sequence[Any]) -> None:
    """One ninja run for all, so that the sources of every library compile side by side."""
    from flashinfer.jit.core import build_jit_specs

    try:
        build_jit_specs(list(specs), skip_prebuilt=False)
    except (RuntimeError, OSError) as error:  # nvcc or ninja is not there, or a compilation failed
        names = ", ".join(spec.name for spec in specs)
        log = "\n".join(str(error).splitlines()[-_BUILD_LOG_LINES:])
        raise ConfigError(
            f"the attention kernels {names} are not prebuilt and cannot be built here: install nvcc and ninja, run"
            f" `graphgen prebuild` where they are, or use attention='torch'. The build said:\n{log}"
        ) from error
