"""Which torch users may have, and which one make installs."""

import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement

from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {it.name: it.specifier for it in map(Requirement, PROJECT["dependencies"])}


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1", "2.13.0", "2.13.0+cpu", "2.14.0", "2.14.1"])
def test_users_of_a_torch_that_the_suite_ran_on_are_let_in(version: str) -> None:
    assert REQUIREMENTS["torch"].contains(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0"])
def test_a_torch_that_no_test_has_seen_is_not_installed(version: str) -> None:
    assert not REQUIREMENTS["torch"].contains(version)


def test_the_known_versions_of_flashinfer_are_let_in() -> None:
    (flashinfer,) = map(Requirement, PROJECT["optional-dependencies"]["cuda"])
    assert all(flashinfer.specifier.contains(version) for version in ("0.6.13", "0.7.2", "0.7.4"))


def commands(*variables: str) -> list[str]:
    """What make would run on a fresh machine."""
    done = subprocess.run(
        ["make", "-n", "demo", "VENV=/no/such/folder", *variables], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if " install " in line]


def test_make_installs_the_pinned_torch_before_the_project() -> None:
    torch, project = commands()
    pinned = Requirement(torch.split()[-1].strip('"'))
    assert pinned.name == "torch"
    assert pinned.specifier.contains("2.13.0+cpu")
    assert not pinned.specifier.contains("2.14.1")
    assert "--editable" in project
    assert commands("TORCH=torch==2.11.*") == [torch.replace("2.13", "2.11"), project]
    (alone,) = commands("TORCH=")
    assert "--editable" in alone
