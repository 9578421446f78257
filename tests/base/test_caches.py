"""Caches: one folder, the user's choices respected, and a folder that cannot be used costs a warning, not the start."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphgen import Engine, SamplingParams
from graphgen.base import caches
from graphgen.base.caches import COMPILER_FOLDERS, cache_environment, cache_root, kernels_root
from graphgen.ipc.errors import ConfigError
from graphgen.launch.processes import EngineProcesses


def test_every_cache_lies_under_the_named_root(tmp_path: Path) -> None:
    root = tmp_path / "caches"
    environment = cache_environment({"GRAPHGEN_CACHE": str(root), "OTHER": "kept"}, tmp_path / "spare")
    assert environment["OTHER"] == "kept"
    assert environment["GRAPHGEN_CACHE"] == str(root)
    assert {environment[variable] for variable in COMPILER_FOLDERS} == {
        str(root / "inductor"),
        str(root / "triton"),
        str(root / "flashinfer"),
    }
    assert kernels_root(environment) == root / "kernels"
    assert not (tmp_path / "spare").exists()


def test_the_default_root_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root({}) == tmp_path / ".cache" / "graphgen"
    assert cache_root({"GRAPHGEN_CACHE": "~/elsewhere"}) == tmp_path / "elsewhere"


def test_variables_of_the_user_win(tmp_path: Path) -> None:
    environment = cache_environment(
        {"GRAPHGEN_CACHE": str(tmp_path), "TRITON_CACHE_DIR": "/the/user's", "TORCHINDUCTOR_CACHE_DIR": ""},
        tmp_path / "spare",
    )
    assert environment["TRITON_CACHE_DIR"] == "/the/user's"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")  # empty is unset


def test_a_folder_that_cannot_be_written_is_replaced_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernels are still read from the root that was named: it may be a read-only image that holds them."""
    (tmp_path / "triton").write_text("a file where a folder should be")
    spare = tmp_path / "spare"
    with caplog.at_level(logging.WARNING, "graphgen.base.caches"):
        environment = cache_environment({"GRAPHGEN_CACHE": str(tmp_path)}, spare)
    assert environment["TRITON_CACHE_DIR"] == str(spare / "triton")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert environment["GRAPHGEN_CACHE"] == str(tmp_path)
    (warning,) = caplog.messages
    assert str(tmp_path / "triton") in warning
    assert "set GRAPHGEN_CACHE" in warning


def import_package(site: Path, environment: dict[str, str]) -> None:
    """In a process of its own."""
    environment = {**environment, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", "import large_package.part"], env=environment, check=True, timeout=60)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package that has no bytecode, which stands for the one whose import is slow."""
    package = tmp_path / "site" / "large_package"
    package.mkdir(parents=True)
    for name in ("__init__.py", "part.py"):
        (package / name).touch()
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(caches, "_LARGEST_PACKAGE", "large_package")
    return package.parent


def test_packages_without_bytecode_get_it_in_the_caches_folder(tmp_path: Path, site: Path) -> None:
    """Also where the environment forbids to write it beside the sources, as images do."""
    root = tmp_path / "caches"
    environment = cache_environment(
        {**os.environ, "GRAPHGEN_CACHE": str(root), "PYTHONDONTWRITEBYTECODE": "1"}, tmp_path / "spare"
    )
    import_package(site, environment)
    kept = [path.name.partition(".")[0] for path in root.joinpath("bytecode").rglob("large_package/*.pyc")]
    assert sorted(kept) == ["__init__", "part"]
    assert not list(site.rglob("*.pyc"))


def test_bytecode_that_lies_beside_the_sources_is_used(tmp_path: Path, site: Path) -> None:
    import_package(site, {**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
    environment = cache_environment({"GRAPHGEN_CACHE": str(tmp_path / "caches")}, tmp_path / "spare")
    assert "PYTHONPYCACHEPREFIX" not in environment
    assert "PYTHONDONTWRITEBYTECODE" not in environment


@pytest.mark.usefixtures("site")
def test_bytecode_is_left_to_a_user_who_chose_its_place_and_to_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    user = {"PYTHONPYCACHEPREFIX": "/the/user's", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = cache_environment({"GRAPHGEN_CACHE": str(tmp_path / "caches"), **user}, tmp_path / "spare")
    assert user.items() <= environment.items()
    (tmp_path / "file").touch()
    environment = cache_environment({"GRAPHGEN_CACHE": str(tmp_path / "file")}, tmp_path / "spare")
    assert "PYTHONPYCACHEPREFIX" not in environment


def test_an_unknown_home_is_an_error_with_a_remedy_and_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="GRAPHGEN_CACHE"):
        cache_root({})
    assert cache_environment({}, tmp_path)["GRAPHGEN_CACHE"] == str(tmp_path)


def test_an_engine_serves_though_its_caches_folder_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHGEN_CACHE", str(tmp_path / "file"))
    with Engine(device="cpu", token_budget=8, num_pages=160, cpu_threads=1) as engine:
        assert len(engine.generate("x", SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_the_children_are_told_where_the_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHGEN_CACHE", str(tmp_path))
    for variable in COMPILER_FOLDERS:
        monkeypatch.delenv(variable, raising=False)
    processes = EngineProcesses()
    try:
        place = Path(f"/proc/{processes.pids['scheduler']}/environ")
        while not (environ := place.read_bytes().split(b"\0"))[1:]:  # it is empty for a moment after the fork
            time.sleep(0.001)
    finally:
        processes.stop(grace_s=0.0)
    assert f"TORCHINDUCTOR_CACHE_DIR={tmp_path}/inductor".encode() in environ
    assert f"TRITON_CACHE_DIR={tmp_path}/triton".encode() in environ


def test_asking_for_the_folder_imports_no_torch() -> None:
    program = (
        "import sys, graphgen.base.caches; print([name for name in ('torch', 'flashinfer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
