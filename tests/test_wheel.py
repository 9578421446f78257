"""The built wheels of engine and client, installed in environments of their own: every file is in one of them, the
client's alone talks to a server, and both together serve outside the checkout."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT
from tests.ipc.raw_client import running_mock

SOURCES = {"graphgen": "graphgen", "capture": "graphgen/capture", "models": "graphgen/models", "ipc": "graphgen/ipc"}
"""Folders of the checkout, and where they are in the wheels."""
NO_PART = ("ipc/clients", "ipc/PROTOCOL.md", "ipc/vectors/README.md", "graphgen/demo/README.md")
"""What programs do not need: the recipes of clients, and what is there to be read."""
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
ENGINE_PROGRAM = """
import graphgen
from graphgen import Engine, SamplingParams
with Engine(device="cpu", cpu_threads=1) as engine:
    (output,) = engine.generate("ROMEO:", SamplingParams(max_tokens=8, temperature=0.0))
print(graphgen.__file__)
print(len(output.token_ids), repr(output.text))
"""
CLIENT_PROGRAM = """
import asyncio, importlib.util, sys
import graphgen
from graphgen import *
from graphgen import AsyncClient, Client, SamplingParams

async def ask():
    async with await AsyncClient.create(sys.argv[1]) as client:
        return [piece.text async for piece in client.generate("one two")]

with Client(sys.argv[1]) as client:
    (output,) = client.generate("one two", SamplingParams(max_tokens=9))
    print(output.text, "|", "".join(asyncio.run(ask())), "|", client.health().status)
print([name for name in ("torch", "transformers", "numpy") if importlib.util.find_spec(name)])
print(sorted(name for name in ("Engine", "Client") if name in graphgen.__all__ and name in dir(graphgen)))
try:
    from graphgen import Engine
except ImportError as error:
    print(error)
"""


class Wheels(NamedTuple):
    client: Path
    engine: Path


def run(*command: str | Path, folder: Path) -> str:
    """Without this checkout on the import path; standard output."""
    done = run_any(*command, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_any(*command: str | Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Built from a copy, since a build writes into its source."""
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("__pycache__", "node_modules", "build")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
    recipes = (source / "ipc" / "clients" / "python", source)
    return Wheels(
        *(folder / run(sys.executable, "-P", "-c", BUILD, folder, folder=recipe).splitlines()[-1] for recipe in recipes)
    )


def files_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


def metadata_of(wheel: Path) -> importlib.metadata.PackageMetadata:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        archive.extract(name, wheel.parent / "metadata")
    return importlib.metadata.PathDistribution(wheel.parent / "metadata" / name.rpartition("/")[0]).metadata


def make_environment(folder: Path, *wheels: Path) -> tuple[Path, Path]:
    """With these wheels and nothing else; its interpreter and its site-packages."""
    environment = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=folder)
    python = environment / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, *install, *wheels, folder=folder)
    return python, Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder)[:-1])


def test_every_file_of_every_folder_is_in_one_wheel(wheels: Wheels) -> None:
    """A folder that is missing in a pyproject's list of packages fails here."""
    wanted = sorted(
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in SOURCES.items()
        for path in (ROOT / folder).rglob("*")  # does not follow the links to the other three
        if path.is_file()
        and "__pycache__" not in path.parts
        and not str(path.relative_to(ROOT)).startswith(NO_PART)
        and not any((ROOT / folder / part).is_symlink() for part in path.relative_to(ROOT / folder).parts[:1])
    )
    client, engine = files_of(wheels.client), files_of(wheels.engine)
    assert sorted(client + engine) == wanted
    assert "graphgen/__init__.py" in client
    assert not {name.rpartition("/")[0] for name in client} & {name.rpartition("/")[0] for name in engine}


def test_the_engines_wheel_needs_the_clients_of_its_own_version(wheels: Wheels) -> None:
    client, engine = metadata_of(wheels.client), metadata_of(wheels.engine)
    assert (client["Name"], engine["Name"]) == ("graphgen-client", "graphgen-serve")
    assert f"graphgen-client=={client['Version']}" in engine.get_all("Requires-Dist", [])
    assert client["Version"] == engine["Version"]
    assert not re.search("torch|transformers", " ".join(client.get_all("Requires-Dist", [])))


def test_the_clients_wheel_alone_talks_to_a_server(wheels: Wheels, tmp_path: Path) -> None:
    python, site = make_environment(tmp_path, wheels.client)
    for requirement in metadata_of(wheels.client).get_all("Requires-Dist", []):
        files = importlib.metadata.files(re.split("[^a-z]", requirement)[0]) or ()
        for name in {file.parts[0] for file in files} - {".."}:
            (site / name).symlink_to(Path(sysconfig.get_path("platlib")) / name)
    with running_mock() as server:
        said, heavy, names, refusal = run(
            python, "-P", "-c", CLIENT_PROGRAM, server.address, folder=tmp_path
        ).splitlines()
    assert said == "one two | one two | ok"
    assert (heavy, names) == ("[]", "['Client']")
    assert refusal.startswith(
        "Engine comes with the engine, graphgen-serve, and only graphgen-client is installed here"
    )
    done = run_any(python, "-P", "-m", "graphgen", "demo", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("graphgen: the command comes with the engine")


def test_both_wheels_serve_where_there_is_no_checkout(wheels: Wheels, tmp_path: Path) -> None:
    python, site = make_environment(tmp_path, *wheels)
    # Its dependencies are those of this environment; an editable graphgen there is none of them, since only .pth files
    # in a site's own folder are read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where, what = run(python, "-P", "-c", ENGINE_PROGRAM, folder=tmp_path).splitlines()
    assert Path(where).is_relative_to(site)
    assert what.startswith("8 ")
    said = run(python.parent / "graphgen", "demo", "--device", "cpu", "--max-tokens", "4", folder=tmp_path)
    assert "ROMEO" in said
