"""`graphgen prebuild`: the attention kernels of a model, built ahead of its first start.

Owns what is specific to building without an engine: the architecture is named instead of found, no GPU is needed, and
only the model's config is read. Which kernels those are, and how they are built, is decided in
graphgen.models.attention. Called by the command line alone, since FlashInfer takes its build settings from the
process's environment.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from msgspec import Struct

from graphgen import demo
from graphgen.base.caches import cache_environment, cache_root
from graphgen.base.version import how_to_install
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig, resolve
from graphgen.models.attention.kernels import arch_of, best_kernels, check_supported, needed_libraries, parse_arch
from graphgen.models.attention.libraries import KernelFolder, Source, build_libraries
from graphgen.models.families import load_spec
from graphgen.worker.backend import attention_shape


class Prebuilt(Struct, frozen=True):
    """What lies in the kernel folder now."""

    folder: Path
    arch: str
    libraries: dict[str, Source]  # by name: there before, or built now


def prebuild(config: EngineConfig, arch: str | None, jobs: int | None) -> Prebuilt:
    """Builds what an engine with this config loads on `arch`, the one of the GPU here if None.

    jobs: compilations at once; None leaves it to ninja. Raises ConfigError when a kernel cannot be built or kept.
    Changes this process's environment, so it must run before FlashInfer is imported.
    """
    capability = _capability_here() if arch is None else parse_arch(arch)
    arch = arch_of(capability)
    location: str | Path = demo.model_folder() if config.model is None else config.model
    launch = resolve(config, load_spec(location, config.revision), Path(location))
    shape = attention_shape(launch, getattr(torch, launch.dtype))
    check_supported(shape)
    with tempfile.TemporaryDirectory() as spare:
        _prepare_environment(arch, jobs, Path(spare))
        try:
            folder = KernelFolder.of(arch)
            libraries = build_libraries(needed_libraries(shape, best_kernels(capability)), folder)
        except ImportError as error:
            raise ConfigError(f"FlashInfer cannot be imported ({error}): {how_to_install('cuda')}") from error
    return Prebuilt(folder.path, arch, libraries)


def _capability_here() -> tuple[int, int]:
    if not torch.cuda.is_available():
        raise ConfigError("no GPU is here to build for: name the architecture, as in --arch 9.0a")
    return torch.cuda.get_device_capability()


def _prepare_environment(arch: str, jobs: int | None, spare: Path) -> None:
    if "flashinfer" in sys.modules:
        raise RuntimeError("FlashInfer is imported already and would build for the GPU it found: use a new process")
    root = cache_root(os.environ)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the caches folder {root} cannot be made ({error}): set GRAPHGEN_CACHE to another"
        ) from error
    os.environ.update(cache_environment(os.environ, spare))
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch
    if jobs is not None:
        os.environ["MAX_JOBS"] = str(jobs)
