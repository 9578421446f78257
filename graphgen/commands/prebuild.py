"""`graphgen prebuild`: the attention kernels of a model, or of most models, built ahead of a first start.

Owns what is specific to building without an engine: the architecture is named instead of found, no GPU is needed, and
only the model's config is read. Which kernels those are, and how they are built, is decided in
graphgen.models.attention. Called by the command line alone, since FlashInfer takes its build settings from the
process's environment.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from msgspec import Struct

from graphgen.base.caches import cache_environment, cache_root
from graphgen.base.version import how_to_install
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig
from graphgen.launch.resolve import resolve
from graphgen.models.attention.kernels import (
    HEAD_DIMS,
    AttentionShape,
    arch_of,
    best_kernels,
    check_supported,
    needed_libraries,
    parse_arch,
)
from graphgen.models.attention.libraries import KernelFolder, Source, build_libraries
from graphgen.models.families import load_spec
from graphgen.worker.backend import attention_shape


class Prebuilt(Struct, frozen=True):
    """What lies in the kernel folder now."""

    folder: Path
    arch: str
    libraries: dict[str, Source]  # by name: there before, or built now
    serves: str  # which models, for people


def prebuild(config: EngineConfig, arch: str | None, jobs: int | None) -> Prebuilt:
    """Builds what an engine with this config loads on `arch`, the one of the GPU here if None.

    Without a model: what models of every head size load, unless they have sliding windows. jobs: compilations at once;
    None leaves it to ninja. Raises ConfigError when a kernel cannot be built or kept. Changes this process's
    environment, so it must run before FlashInfer is imported.
    """
    capability = _capability_here() if arch is None else parse_arch(arch)
    arch = arch_of(capability)
    shapes = _any_shapes(config) if config.model is None else [_shape_of(config, config.model)]
    for shape in shapes:
        check_supported(shape)
    needed = [
        library for shape in shapes for library in needed_libraries(shape, best_kernels(capability, shape.scores))
    ]
    with tempfile.TemporaryDirectory() as spare:
        _prepare_environment(arch, jobs, Path(spare))
        try:
            folder = KernelFolder.of(arch)
            libraries = build_libraries(needed, folder)
        except ImportError as error:
            raise ConfigError(f"FlashInfer cannot be imported ({error}): {how_to_install('cuda')}") from error
    return Prebuilt(folder.path, arch, libraries, _describe(config.model, shapes))


def _shape_of(config: EngineConfig, model: str) -> AttentionShape:
    spec = load_spec(model, config.revision)
    if spec.latent is not None:
        raise ConfigError(f"{model} has latent attention, whose kernels Triton compiles at its first start: start it")
    launch = resolve(config, spec, Path(model))
    return attention_shape(launch, getattr(torch, launch.dtype))


def _any_shapes(config: EngineConfig) -> list[AttentionShape]:
    """One of each head size. The kernels that are built depend neither on the numbers of heads nor on the page size."""
    dtype = getattr(torch, "bfloat16" if config.dtype == "auto" else config.dtype)
    return [
        AttentionShape(num_heads=1, num_kv_heads=1, head_dim=head_dim, page_size=64, dtype=dtype, windows=(0,))
        for head_dim in HEAD_DIMS
    ]


def _describe(model: str | None, shapes: Sequence[AttentionShape]) -> str:
    dtype = str(shapes[0].dtype).removeprefix("torch.")
    if model is not None:
        return f"{model} in {dtype}"
    *most, last = (str(shape.head_dim) for shape in shapes)
    return (
        f"models with heads of {', '.join(most)} or {last} in {dtype}, but for those with sliding windows, which need"
        " --model"
    )


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
