"""FlashInfer's compiled libraries: where they lie, and how they are loaded or built.

Owns the kernel folder and the order of places to load from:

    1. the kernel folder      loads at once, needs neither nvcc nor ninja
    2. FlashInfer's own       kernels that came with its package
    3. a build                all that are missing in one ninja run, then kept in the kernel folder for the next start

A library that lies ready is loaded without FlashInfer's Python package (direct.py). The package is imported only for
what that cannot do: to build, to load a library that takes other arguments than its known versions do, and for XQA.
Never launches a kernel. The worker calls `load_libraries` through flashinfer.py, `graphgen prebuild` calls
`build_libraries`, which needs no GPU.
"""

import importlib.metadata
import logging
import os
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from graphgen.base.caches import kernels_root
from graphgen.ipc.errors import ConfigError
from graphgen.models.attention.direct import Function, PlannedFunctions, asked_types, open_planned, wrapped_functions
from graphgen.models.attention.kernels import Library, PlannedLibrary

_DISTRIBUTION = "flashinfer-python"
_PACKAGED = "flashinfer/data/aot"  # libraries that came with the package, in the same form as the kernel folder
_BUILD_LOG_LINES = 15
_TYPES_FILE = "types.json"
_END_BYTES = 1 << 20

logger = logging.getLogger("graphgen.kernels")


class Source(StrEnum):
    """Where a loaded library came from, in the words of `graphgen info`."""

    PREBUILT = "prebuilt"
    PACKAGED = "from FlashInfer's package"
    BUILT = "built now"


# --- the folder ------------------------------------------------------------------------------------------------


class KernelFolder(Struct, frozen=True):
    """Built libraries of one FlashInfer version and one architecture: NAME/NAME.so."""

    path: Path

    @classmethod
    def of(cls, arch: str) -> "KernelFolder":
        """The folder in graphgen's caches. Raises ImportError where FlashInfer is not installed."""
        return cls(kernels_root(os.environ) / _flashinfer_version() / arch)

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


def _flashinfer_version() -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        import flashinfer

        return str(flashinfer.__version__)


# --- without FlashInfer's package ------------------------------------------------------------------------------


def planned_functions(library: PlannedLibrary, folder: KernelFolder) -> PlannedFunctions:
    """The functions of a library. One that `load_libraries` has not loaded may be built by FlashInfer's loader.

    Raises ConfigError for a version of FlashInfer whose functions are not known here.
    """
    opened = _open_ready(library, folder)
    if opened is not None:
        return opened[0]
    try:
        return wrapped_functions(library, library.load())
    except ValueError as error:
        raise ConfigError(
            f"FlashInfer {_flashinfer_version()} has changed the kernel {library.name}: {error}. Install"
            " 'flashinfer-python>=0.6.13,<0.8', or use attention='torch'"
        ) from error


class KeptTypes:
    """What the functions of a library take: asked once, and kept in the kernel folder, where it says of which file it
    is."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._path = folder / _TYPES_FILE
        self._library = _fingerprint(library)
        self._kept = _TypesDocument(library=self._library, types={})
        with suppress(OSError, ValueError):
            kept = msgspec.json.decode(self._path.read_bytes(), type=_TypesDocument)
            self._kept = kept if kept.library == self._library else self._kept

    def __call__(self, name: str, function: Function) -> list[str]:
        """See TypesOf."""
        if name not in self._kept.types:
            self._kept.types[name] = asked_types(name, function)
            with suppress(OSError):  # a folder that cannot be written costs the next start what this one cost
                self._path.parent.mkdir(parents=True, exist_ok=True)
                partial = self._path.with_suffix(f".{os.getpid()}.partial")
                partial.write_bytes(msgspec.json.encode(self._kept))
                partial.replace(self._path)
        return self._kept.types[name]


class _TypesDocument(Struct, frozen=True):
    """The document."""

    library: str  # its fingerprint
    types: dict[str, list[str]]  # by the function's name


def _fingerprint(path: Path) -> str:
    """Of a library: its size, and its end, where the table of its sections lies."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        return f"{size}-{zlib.crc32(file.read()):08x}"


def package_to_load(libraries: Sequence[Library], folder: KernelFolder) -> str | None:
    """The Python package that loading them will import first, so that it can be imported ahead."""
    if not libraries:
        return None
    ready = (
        isinstance(library, PlannedLibrary) and any(_is_whole(path) for path, _ in _places(library.name, folder))
        for library in libraries
    )
    return "tvm_ffi" if all(ready) else "flashinfer"


def _open_ready(library: PlannedLibrary, folder: KernelFolder) -> tuple[PlannedFunctions, Source] | None:
    """A library that lies ready and is what it should be; None leaves it to FlashInfer's own loader."""
    for path, source in _places(library.name, folder):
        if not path.exists():
            continue
        try:
            _check_whole(path)
            return open_planned(library, path, KeptTypes(folder.path / library.name, path)), source
        except Exception as error:  # the linker's words, or another version's functions
            logger.info("the kernel %s is left to FlashInfer's loader: %s", path, error)
    return None


def _places(name: str, folder: KernelFolder) -> list[tuple[Path, Source]]:
    """Where a library may lie ready, whether or not it does."""
    places = [(folder.library_path(name), Source.PREBUILT)]
    with suppress(importlib.metadata.PackageNotFoundError):
        packaged = importlib.metadata.distribution(_DISTRIBUTION).locate_file(_PACKAGED)
        places.append((KernelFolder(Path(str(packaged))).library_path(name), Source.PACKAGED))
    return places


# --- loading and building --------------------------------------------------------------------------------------


def load_libraries(libraries: Sequence[Library], folder: KernelFolder) -> list[Source]:
    """Loads every library, building what is found nowhere; where each came from, in order.

    Raises ConfigError when a build is needed and fails.
    """
    sources: dict[Library, Source] = {}
    for library in libraries:
        if isinstance(library, PlannedLibrary) and (opened := _open_ready(library, folder)) is not None:
            sources[library] = opened[1]
    if rest := [library for library in libraries if library not in sources]:
        sources |= _load_with_flashinfer(rest, folder)
    return [sources[library] for library in libraries]


def _load_with_flashinfer(libraries: Sequence[Library], folder: KernelFolder) -> dict[Library, Source]:
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
    return sources


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
    if not counts:
        return "nothing to build"
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
