"""A stand-in for the FlashInfer package: its build system's behaviour over files, without a compiler or a GPU.

Like the original: a library that lies in `env.FLASHINFER_AOT_DIR` is loaded from there, any other is built by ninja
and loaded from the build folder, and a module that was loaded once is kept.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

SOME_LIBRARY = Path(msgspec._core.__file__)  # a real shared library, whatever it does
VERSION = "9.9.9"


class FakeFlashInfer:
    """What was built and what was loaded, in order."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[list[str]] = []  # of each ninja run
        self.loaded: list[Path] = []
        self.build_error: Exception | None = None
        self.unloadable: set[Path] = set()
        self.build_folder = folder / "cached_ops"
        self.env = ModuleType("flashinfer.jit.env")
        self.env.FLASHINFER_AOT_DIR = folder / "packaged"  # type: ignore[attr-defined]
        self._modules: dict[str, object] = {}
        modules: dict[str, dict[str, Any]] = {
            "flashinfer": {"__version__": VERSION},
            "flashinfer.jit": {"env": self.env},
            "flashinfer.jit.core": {"build_jit_specs": self._build},
            "flashinfer.jit.xqa": {"gen_xqa_module": self._maker("xqa")},
            "flashinfer.jit.attention": {},
            "flashinfer.jit.attention.modules": {"gen_batch_prefill_module": self._maker("prefill")},
            "flashinfer.xqa": {"get_xqa_module": self._getter("xqa")},
            "flashinfer.prefill": {"get_batch_prefill_module": self._getter("prefill")},
        }
        for name, contents in modules.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)

    def _maker(self, kind: str) -> Callable[..., "FakeSpec"]:
        return lambda *arguments: FakeSpec(self, "_".join([kind, *map(str, arguments)]))

    def _getter(self, kind: str) -> Callable[..., object]:
        def get(*arguments: object) -> object:
            spec = self._maker(kind)(*arguments)
            if spec.name not in self._modules:
                self._modules[spec.name] = spec.build_and_load()
            return self._modules[spec.name]

        return get

    def _build(self, specs: Sequence["FakeSpec"], skip_prebuilt: bool = True) -> None:
        wanted = [spec for spec in specs if not (skip_prebuilt and spec.is_aot)]
        self.built.append([spec.name for spec in wanted])
        if self.build_error is not None:
            raise self.build_error
        for spec in wanted:
            spec.jit_library_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOME_LIBRARY, spec.jit_library_path)

    def load_file(self, path: Path) -> object:
        if path in self.unloadable:
            raise OSError(f"{path}: undefined symbol")
        self.loaded.append(path)
        return object()

    def forget(self) -> None:
        """A new process: nothing is loaded."""
        self._modules.clear()
        self.loaded.clear()
        self.built.clear()


class FakeSpec:
    """FlashInfer's JitSpec."""

    def __init__(self, package: FakeFlashInfer, name: str) -> None:
        self.name = name
        self._package = package

    @property
    def aot_path(self) -> Path:
        folder: Path = self._package.env.FLASHINFER_AOT_DIR
        return folder / self.name / f"{self.name}.so"

    @property
    def is_aot(self) -> bool:
        return self.aot_path.exists()

    @property
    def jit_library_path(self) -> Path:
        return self._package.build_folder / self.name / f"{self.name}.so"

    def build_and_load(self) -> object:
        if self.is_aot:
            return self._package.load_file(self.aot_path)
        self._package._build([self])
        return self._package.load_file(self.jit_library_path)
