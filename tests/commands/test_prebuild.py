"""`graphgen prebuild` as a user runs it, with a FlashInfer package that only writes down what it was asked for."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from graphgen.commands import prebuild  # with its imports, for all commands that are forked here
from tests.commands.in_process import run_forked
from tests.models.fake_flashinfer import SOME_LIBRARY

PACKAGE = {
    "__init__.py": "__version__ = '9.9.9'",
    "jit/__init__.py": "",
    "jit/env.py": "",
    "jit/core.py": f"""
import os, shutil
from pathlib import Path
class Spec:
    is_aot = False
    def __init__(self, *words):
        self.name = "_".join(map(str, words)).replace("torch.", "")
        self.jit_library_path = Path(os.environ["FLASHINFER_WORKSPACE_BASE"], "cached_ops", self.name + ".so")
def build_jit_specs(specs, skip_prebuilt):
    print("building for", os.environ["FLASHINFER_CUDA_ARCH_LIST"], "jobs", os.environ.get("MAX_JOBS"))
    for spec in specs:
        spec.jit_library_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile({str(SOME_LIBRARY)!r}, spec.jit_library_path)
""",
    "jit/xqa.py": "from flashinfer.jit.core import Spec\ndef gen_xqa_module(*a): return Spec('xqa', *a)",
    "jit/attention/__init__.py": "",
    "jit/attention/modules.py": """
from flashinfer.jit.core import Spec
def gen_batch_prefill_module(*a): return Spec('prefill', *a)
""",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the package, to be put in front of the import path. Torch's bytecode would take minutes."""
    monkeypatch.setattr(prebuild, "PACKAGES", ())
    for name, text in PACKAGE.items():
        path = tmp_path / "site" / "flashinfer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "site"


def run(site: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    caches = {"GRAPHGEN_CACHE": str(site.parent / "caches")}
    return run_forked(["prebuild", *arguments], {**caches, **environment}, import_path=str(site))


def prefill(head_dim: int, dtype: str = "bfloat16", backend: str = "fa3", windowed: bool = False) -> str:
    return f"prefill_{backend}_{dtype}_{dtype}_{dtype}_int32_{head_dim}_{head_dim}_0_{windowed}_False_False"


def built(site: Path, arch: str) -> set[str]:
    return {path.stem for path in (site.parent / "caches" / "kernels" / "9.9.9" / arch).rglob("*.so")}


def test_kernels_of_a_model_are_built_once_for_the_named_architecture(site: Path, tmp_path: Path) -> None:
    """This one has heads of 128, the last of its layers with a window; its decode kernel needs no build."""
    model = tmp_path / "model"
    model.mkdir()
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 256}
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 99, **sizes, **window}))
    first = run(site, "--arch", "9.0", "--jobs", "3", "--model", str(model))
    assert first.returncode == 0, first.stderr
    assert "building for 9.0a jobs 3" in first.stdout
    names = {prefill(128), prefill(128, windowed=True)}
    assert built(site, "9.0a") == names
    second = run(site, "--arch", "9.0a", "--model", str(model))
    assert "building" not in second.stdout
    assert {tuple(line.split()[:2]) for line in second.stdout.splitlines()[:2]} == {("prebuilt", it) for it in names}
    assert f"serves    {model} in bfloat16" in second.stdout
    assert str(site.parent / "caches" / "kernels" / "9.9.9" / "9.0a") in second.stdout


@pytest.mark.parametrize(("arch", "backend"), [("9.0a", "fa3"), ("8.0", "fa2")])
def test_without_a_model_kernels_of_every_head_size_are_built(arch: str, backend: str, site: Path) -> None:
    """The first start of most models then builds nothing."""
    done = run(site, "--arch", arch)
    assert done.returncode == 0, done.stderr
    assert built(site, arch) == {prefill(head_dim, backend=backend) for head_dim in (64, 128, 256)}
    assert done.stdout.count("building for") == 1, "one ninja run for all"
    assert (
        "serves    models with heads of 64, 128 or 256 in bfloat16, but for those with sliding windows" in done.stdout
    )


def test_the_dtype_is_part_of_a_kernel(site: Path) -> None:
    done = run(site, "--arch", "9.0a", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    assert built(site, "9.0a") == {prefill(head_dim, "float16") for head_dim in (64, 128, 256)}
    assert "or 256 in float16" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "9.0b"], "arch is '9.0b'"),
        (["--arch", "8.0", "--dtype", "float32"], "dtype is torch.float32"),
        (["--arch", "8.0", "--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_message(site: Path, arguments: list[str], words: str) -> None:
    done = run(site, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("graphgen: ")
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_caches_folder_that_cannot_be_made_is_an_error_here(site: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(site, "--arch", "9.0a", GRAPHGEN_CACHE=str(tmp_path / "file" / "caches"))
    assert done.returncode == 2
    assert "set GRAPHGEN_CACHE" in " ".join(done.stderr.split())


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="what is told where Triton is missing")
def test_the_triton_kernels_of_a_model_are_compiled_too(site: Path, tmp_path: Path) -> None:
    """By a program of its own, which is told the engine's config and the architecture, and leaves a note."""
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 256}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 99, **sizes}))
    done = run(site, "--arch", "9.0a", "--model", str(model))
    assert done.returncode == 0, done.stderr
    assert "Triton kernels are compiled at their first launch, not ahead: No module named 'triton'" in done.stderr
    assert "Triton kernels" not in done.stdout


def test_bytecode_is_kept_where_packages_have_none_beside_their_sources(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    prebuild.keep_bytecode(environment, ("graphgen.capture", "no_such_package"), 1)
    assert {path.name.partition(".")[0] for path in tmp_path.rglob("*.pyc")} >= {"graphs", "buckets"}
    prebuild.keep_bytecode({"PYTHONPYCACHEPREFIX": ""}, ("no_such_package",), 1)
