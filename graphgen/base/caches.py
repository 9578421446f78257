"""Where graphgen keeps what is slow to make: kernels, compiled layers, compiled Triton code, Python's bytecode.

Owns the caches folder and the environment variables that send torch, Triton and FlashInfer there. Never deletes
anything and imports neither torch nor FlashInfer. The engine asks for its children's environment, `graphgen prebuild`
for its own; the worker asks where kernels lie.

    $GRAPHGEN_CACHE, by default ~/.cache/graphgen
        kernels/<FlashInfer version>/<arch>/<name>/<name>.so    complete, may be copied to another machine
        inductor/  triton/  flashinfer/                         what the compilers keep for themselves
        bytecode/                                               of Python packages that were installed without theirs

A cache saves time and nothing else, so a folder that cannot be used costs a warning and never the start. Kernels are
read from a folder that cannot be written, such as one that came with a container image.
"""

import contextlib
import importlib.util
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from graphgen.ipc.errors import ConfigError

ROOT_VARIABLE = "GRAPHGEN_CACHE"
COMPILER_FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
"""The variable that each compiler reads, and its folder under the root."""

_LARGEST_PACKAGE = "torch"

logger = logging.getLogger("graphgen.base.caches")


def cache_root(environment: Mapping[str, str]) -> Path:
    """The caches folder, absolute; it need not exist. Raises ConfigError where no home folder is known."""
    named = environment.get(ROOT_VARIABLE)
    try:
        return (Path(named).expanduser() if named else Path.home() / ".cache" / "graphgen").absolute()
    except RuntimeError as error:
        raise ConfigError(f"{ROOT_VARIABLE} is {named!r} and {error}: set it to an absolute path") from error


def kernels_root(environment: Mapping[str, str]) -> Path:
    """Where prebuilt kernels lie."""
    return cache_root(environment) / "kernels"


def cache_environment(environment: Mapping[str, str], spare: Path) -> dict[str, str]:
    """`environment` and the cache variables that it lacks. What the user set stays.

    spare: a folder that is gone after this run, which stands in for one that cannot be written.
    """
    try:
        root = cache_root(environment)
    except ConfigError as error:
        logger.warning("%s; nothing is kept for the next start", error)
        root = spare
    chosen = {ROOT_VARIABLE: str(root)}
    if root != spare:
        chosen |= _bytecode_environment(environment, root / "bytecode")
    for variable, name in COMPILER_FOLDERS.items():
        if environment.get(variable):
            continue
        folder = root / name
        if (problem := _write_problem(folder)) is not None:
            logger.warning(
                "the caches folder %s cannot be written (%s), so the next start compiles again: set %s to one that can",
                folder,
                problem,
                ROOT_VARIABLE,
            )
            folder = spare / name
        chosen[variable] = str(folder)
    return {**environment, **chosen}


def _bytecode_environment(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What makes Python keep bytecode in `folder`, where the packages have none beside their sources.

    Images are often made without it, and forbid to write it. Without it every start compiles the sources of two
    thousand modules, which takes three times as long as their import with it. A folder that cannot be written may
    hold it all the same, and costs nothing where it does not.
    """
    if environment.get("PYTHONPYCACHEPREFIX") or _has_bytecode(_LARGEST_PACKAGE):
        return {}
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        return {}
    # What forbids to write beside the sources need not forbid it here. Empty is unset.
    return {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}


def _has_bytecode(package: str) -> bool:
    """True also where the package is missing: then there is nothing to keep."""
    spec = importlib.util.find_spec(package)
    return spec is None or spec.cached is None or Path(spec.cached).exists()


def _write_problem(folder: Path) -> OSError | None:
    """Why no file can be made in `folder`, if so. Permission bits would not tell of a read-only file system."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error
