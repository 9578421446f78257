"""The built wheel, installed in an environment of its own: every file is in it, and it serves outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"graphgen": "graphgen", "capture": "graphgen/capture", "models": "graphgen/models", "ipc": "graphgen/ipc"}
"""Folders of the checkout, and where they are in the wheel."""
NO_PART = ("ipc/clients", "ipc/PROTOCOL.md", "ipc/vectors/README.md", "graphgen/demo/README.md")
"""What programs do not need: other languages' clients, and what is there to be read."""
PROGRAM = """
import graphgen
from graphgen import Engine, SamplingParams
with Engine(device="cpu", cpu_threads=1) as engine:
    (output,) = engine.generate("ROMEO:", SamplingParams(max_tokens=8, temperature=0.0))
print(graphgen.__file__)
print(len(output.token_ids), repr(output.text))
"""


def run(*command: str | Path, folder: Path) -> str:
    """Without this checkout on the import path; standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build writes into its source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("__pycache__", "node_modules", "build")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
    build = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    run(sys.executable, "-m", *build, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_every_folder(wheel: Path) -> None:
    """A folder that is missing in pyproject's list of packages fails here."""
    wanted = {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in SOURCES.items()
        for path in (ROOT / folder).rglob("*")  # does not follow the links to the other three
        if path.is_file()
        and "__pycache__" not in path.parts
        and not str(path.relative_to(ROOT)).startswith(NO_PART)
        and not any((ROOT / folder / part).is_symlink() for part in path.relative_to(ROOT / folder).parts[:1])
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_the_wheel_serves_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=tmp_path)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, folder=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip())
    # Its dependencies are those of this environment; an editable graphgen there is none of them, since only .pth files
    # in a site's own folder are read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where, what = run(python, "-P", "-c", PROGRAM, folder=tmp_path).splitlines()
    assert Path(where).is_relative_to(site)
    assert what.startswith("8 ")
    said = run(environment / "bin" / "graphgen", "demo", "--device", "cpu", "--max-tokens", "4", folder=tmp_path)
    assert "ROMEO" in said
