"""`graphgen prebuild`: what a first start would compile, compiled ahead: kernels, and Python's bytecode.

Owns what is specific to building without an engine: the architecture is named instead of found, no GPU is needed, and
only the model's config is read. Which attention kernels those are, and how they are built, is decided in
graphgen.models.attention; Triton's kernels, those of a model alone, are graphgen.worker.ahead's. Called by the command
line alone, since FlashInfer takes its build settings from the process's environment.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from msgspec import Struct

from graphgen.base.caches import cache_environment, cache_root
from graphgen.base.version import how_to_install
from graphgen.commands.first_start import cards_here
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig
from graphgen.launch.launch_config import LaunchConfig
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
from graphgen.worker.ahead import Note, compile_for_engine
from graphgen.worker.backend import attention_shape

PACKAGES = ("torch", "triton", "sympy", "tvm_ffi", "graphgen")
"""Of what a worker imports, the most."""


class Prebuilt(Struct, frozen=True):
    """What lies in the kernel folder now."""

    folder: Path
    arch: str
    capability: tuple[int, int]  # that it is for
    libraries: dict[str, Source]  # by name: there before, or built now
    serves: str  # which models, for people
    triton: Note | None  # of the model's Triton kernels; None where there is no model or they cannot be compiled


def prebuild(config: EngineConfig, arch: str | None, jobs: int | None) -> Prebuilt:
    """Builds what an engine with this config loads on `arch`, the one of the GPU here if None.

    Without a model: what models of every head size load, unless they have sliding windows. jobs: compilations at once;
    None leaves it to ninja. Raises ConfigError when a kernel cannot be built or kept. Changes this process's
    environment, so it must run before FlashInfer is imported.
    """
    capability = _capability_here() if arch is None else parse_arch(arch)
    arch = arch_of(capability)
    launch = None if config.model is None else launch_of(config, config.model)
    shapes = _any_shapes(config) if launch is None else shapes_of(launch)
    for shape in shapes:
        check_supported(shape)
    needed = [
        library for shape in shapes for library in needed_libraries(shape, best_kernels(capability, shape.scores))
    ]
    with tempfile.TemporaryDirectory() as spare:
        _prepare_environment(arch, jobs, Path(spare))
        try:
            folder = KernelFolder.of(arch)
            libraries = build_libraries(needed, folder) if needed else {}
        except ImportError as error:
            raise ConfigError(f"FlashInfer cannot be imported ({error}): {how_to_install('cuda')}") from error
        keep_bytecode(os.environ, PACKAGES, jobs)
        kernels = None if launch is None else compile_for_engine(launch, capability, os.environ)
    return Prebuilt(folder.path, arch, capability, libraries, _describe(config.model, launch, shapes), kernels)


def keep_bytecode(environment: Mapping[str, str], packages: Sequence[str], jobs: int | None) -> None:
    """Compiles packages that were installed without bytecode, to where `environment` has it kept; where Python keeps
    it beside the sources it is there already."""
    if not environment.get("PYTHONPYCACHEPREFIX"):
        return
    specs = [importlib.util.find_spec(package) for package in packages]
    folders = [folder for spec in specs if spec is not None for folder in spec.submodule_search_locations or ()]
    if not folders:
        return
    # Some files of large packages are for other versions of Python: what does not compile is never imported.
    arguments = ["-m", "compileall", "-q", "-q", "-j", str(jobs or 0), *folders]
    subprocess.run([sys.executable, *arguments], env=dict(environment), stdout=subprocess.DEVNULL)


def launch_of(config: EngineConfig, model: str) -> LaunchConfig:
    """Of an engine that would serve this model here."""
    return resolve(config, load_spec(model, config.revision), Path(model))


def shapes_of(launch: LaunchConfig) -> list[AttentionShape]:
    """None of a model with latent attention, whose kernels are all Triton's."""
    if launch.spec.latent is not None:
        return []
    return [attention_shape(launch, getattr(torch, launch.dtype))]


def _any_shapes(config: EngineConfig) -> list[AttentionShape]:
    """One of each head size. The kernels that are built depend neither on the numbers of heads nor on the page size."""
    dtype = getattr(torch, "bfloat16" if config.dtype == "auto" else config.dtype)
    return [
        AttentionShape(num_heads=1, num_kv_heads=1, head_dim=head_dim, page_size=64, dtype=dtype, windows=(0,))
        for head_dim in HEAD_DIMS
    ]


def _describe(model: str | None, launch: LaunchConfig | None, shapes: Sequence[AttentionShape]) -> str:
    if launch is not None:
        return f"{model} in {launch.dtype}"
    dtype = str(shapes[0].dtype).removeprefix("torch.")
    *most, last = (str(shape.head_dim) for shape in shapes)
    return (
        f"models with heads of {', '.join(most)} or {last} in {dtype}, but for those with sliding windows, which need"
        " --model"
    )


def _capability_here() -> tuple[int, int]:
    if not (cards := cards_here()):
        raise ConfigError("no GPU is here to build for: name the architecture, as in --arch 9.0a")
    return cards[0]


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
