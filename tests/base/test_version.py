"""The version and the name of the distribution are said in one place, and messages tell to install what exists."""

import re
import subprocess
import sys
import tomllib

import graphgen
from graphgen.base import version
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT = tomllib.loads((ROOT / "ipc" / "clients" / "python" / "pyproject.toml").read_text())
FOLDERS = ("graphgen", "models", "capture", "ipc", "benchmarks")


def test_the_version_is_said_in_one_place() -> None:
    for project in (PROJECT, CLIENT):
        assert "version" in project["project"]["dynamic"]
        assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "graphgen.base.version.__version__"
    assert f"{version.CLIENT_DISTRIBUTION}=={version.__version__}" in PROJECT["project"]["dependencies"]
    assert graphgen.__version__ == version.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.__version__)


def test_the_command_prints_the_version() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graphgen", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"graphgen {version.__version__}\n")


def test_the_distribution_is_not_another_projects() -> None:
    """`graphgen` on the Python package registry is a tool for something else."""
    assert PROJECT["project"]["name"] == version.DISTRIBUTION != "graphgen"
    assert CLIENT["project"]["name"] == version.CLIENT_DISTRIBUTION != "graphgen"


def test_the_engines_recipe_knows_every_package_of_the_clients() -> None:
    """An editable install of the engine maps the whole folder, and its source archive holds all of it."""
    assert set(CLIENT["tool"]["setuptools"]["packages"]) < set(PROJECT["tool"]["setuptools"]["packages"])


def test_nothing_tells_users_to_install_another_projects_package() -> None:
    wrong = re.compile(r"pip install (-\S+ )*['\"]?graphgen(?![-\w/])")
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files += [*ROOT.glob("*.md"), ROOT / "Makefile", *(ROOT / "ipc").rglob("*.md")]
    assert [str(path) for path in files if wrong.search(path.read_text())] == []


def test_an_extra_that_a_message_names_exists() -> None:
    extras = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        extras |= set(re.findall(r"how_to_install\(['\"](\w+)['\"]\)", path.read_text()))
    assert extras == {"cuda", "bench", "http", "otel", "ray"}
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    assert "'.[cuda]'" in version.how_to_install("cuda")
