"""A stand-in for the FlashInfer package and for TVM FFI: their behaviour over files, without a compiler or a GPU.

Like the original: a library that lies in `env.FLASHINFER_AOT_DIR` is loaded from there, any other is built by ninja
and loaded from the build folder, and a module that was loaded once is kept. TVM FFI loads any file; a function in it
refuses a wrong number of arguments and names the types of all.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

SOME_LIBRARY = Path(msgspec._core.__file__)  # a real shared library, whatever it does
VERSION = "9.9.9"

SHARED_RUN_TYPES = (
    ["DLTensor*"] * 2 + ["Array<int>"] + ["DLTensor*"] * 8 + ["Optional<DLTensor*>"] + ["int"] * 3 + ["bool"]
)
SHARED_PLAN_TYPES = ["DLTensor*"] * 6 + ["int"] * 5 + ["bool", "int", "int", "bool", "int"]
FA3_RUN_TYPES = ["Optional<ffi.Tensor>"] * 4 + ["float"] * 3 + ["int"]
FA2_RUN_TYPES = ["Optional<ffi.Tensor>"] * 8 + ["float"] * 4 + ["int"]
SINKS_RUN_TYPES = ["ffi.Tensor", "float"]
FA2_PLAN_TYPES = ["int", "bool", "int"]
"""What the libraries of version 0.6.13 answer to a call without arguments."""

FA3_NAME = (
    "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128"
    "_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False_sm90"
)


class FakeFunction:
    """A function of a library, which keeps what it was called with."""

    def __init__(self, name: str, types: Sequence[str], asked: list[str]) -> None:
        """asked: where it enters its name when it is called with a wrong number of arguments."""
        self._asked = asked
        self.calls: list[tuple[object, ...]] = []
        self._name = name
        self._types = types

    def __call__(self, *arguments: object) -> list[int]:
        if len(arguments) != len(self._types):
            self._asked.append(self._name)
            types = ", ".join(f"{index}: {text}" for index, text in enumerate(self._types))
            raise TypeError(
                f"Mismatched number of arguments when calling: `{self._name}({types}) -> void`. "
                f"Expected {len(self._types)} but got {len(arguments)} arguments"
            )
        self.calls.append(arguments)
        return []


class FakeLibrary:
    """A loaded file."""

    def __init__(
        self, name: str, extra_run_types: Sequence[str], extra_plan_types: Sequence[str], asked: list[str]
    ) -> None:
        is_fa3 = "_sm90" in name
        run_types = [*(FA3_RUN_TYPES if is_fa3 else FA2_RUN_TYPES), *extra_run_types]
        if "attention_sink" in name:
            run_types = SINKS_RUN_TYPES
        self.plan = FakeFunction(
            "plan", [*SHARED_PLAN_TYPES, *([] if is_fa3 else FA2_PLAN_TYPES), *extra_plan_types], asked
        )
        self.paged_run = FakeFunction("paged_run", SHARED_RUN_TYPES + run_types, asked)


class FakeFlashInfer:
    """What was built and what was loaded, in order."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[list[str]] = []  # of each ninja run
        self.loaded: list[Path] = []
        self.build_error: Exception | None = None
        self.unloadable: set[Path] = set()
        self.extra_run_types: list[str] = []  # of a version whose libraries take more arguments
        self.extra_plan_types: list[str] = []
        self.opened: list[Path] = []  # by TVM FFI alone
        self.asked: list[str] = []  # functions for the types that they take
        self.build_folder = folder / "cached_ops"
        self.env = ModuleType("flashinfer.jit.env")
        self.env.FLASHINFER_AOT_DIR = folder / "site" / "flashinfer" / "data" / "aot"  # type: ignore[attr-defined]
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
            "tvm_ffi": {"load_module": self._open},
        }
        for name, contents in modules.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
        metadata = folder / "site" / f"flashinfer_python-{VERSION}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {VERSION}\n")
        monkeypatch.syspath_prepend(metadata.parent.parent)
        self._monkeypatch = monkeypatch

    def uninstall(self) -> None:
        """From now on an import of FlashInfer fails; its metadata stays."""
        for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
            self._monkeypatch.setitem(sys.modules, name, None)

    def _maker(self, kind: str) -> Callable[..., "FakeSpec"]:
        return lambda *arguments: FakeSpec(self, _name(kind, arguments))

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
        """By FlashInfer's loader. What its Python around `paged_run` offers takes any arguments here; `plan` is the
        library's own."""
        if path in self.unloadable:
            raise OSError(f"{path}: undefined symbol")
        self.loaded.append(path)
        return SimpleNamespace(plan=self._library(path).plan, paged_run=lambda *arguments: None)

    def _open(self, path: str) -> FakeLibrary:
        if Path(path) in self.unloadable:
            raise OSError(f"{path}: undefined symbol")
        self.opened.append(Path(path))
        return self._library(Path(path))

    def _library(self, path: Path) -> FakeLibrary:
        return FakeLibrary(path.name, self.extra_run_types, self.extra_plan_types, self.asked)

    def forget(self) -> None:
        """A new process: nothing is loaded."""
        self._modules.clear()
        self.loaded.clear()
        self.opened.clear()
        self.asked.clear()
        self.built.clear()


def _name(kind: str, arguments: tuple[object, ...]) -> str:
    """FlashInfer's name of the libraries the tests ask for; any other is told apart by its arguments."""
    bf16 = torch.bfloat16
    if kind == "prefill" and arguments == ("fa3", bf16, bf16, bf16, torch.int32, 128, 128, 0, False, False, False):
        return FA3_NAME
    return "_".join([kind, *map(str, arguments)])


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
