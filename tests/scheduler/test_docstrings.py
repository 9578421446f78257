"""What the modules' first lines say of each other is so."""

import ast
import functools
import re

import pytest

from tests import ROOT

MODULES = {
    f"graphgen.{folder}.{path.stem}": path
    for folder in ("scheduler", "launch")
    for path in sorted((ROOT / "graphgen" / folder).glob("*.py"))
    if path.stem != "__init__"
}
POLICY, LIFE = "graphgen.scheduler.policy", "graphgen.scheduler.life"
CALLERS = re.compile(r"\bby ((?:`[\w.]+`(?:,| and)? ?)+)")
"""Called by, read by, made by these modules."""


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@functools.cache
def imports(module: str) -> set[str]:
    return {str(node.module) for node in ast.walk(tree_of(module)) if isinstance(node, ast.ImportFrom)}


def importers(module: str) -> set[str]:
    """The modules here that import it, policy for the parts that it reaches through `life`."""
    found = {name for name in MODULES if module in imports(name)}
    return found | ({POLICY} if LIFE in found else set())


def opening(module: str) -> str:
    return " ".join((ast.get_docstring(tree_of(module)) or "").split())


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_names_is_there(module: str) -> None:
    for name in re.findall(r"`(graphgen(?:\.\w+)+)`", opening(module)):
        path = ROOT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{module} names {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("graphgen.scheduler.")])
def test_who_is_said_to_call_a_module_imports_it(module: str) -> None:
    said = {name for callers in CALLERS.findall(opening(module)) for name in re.findall(r"`([\w.]+)`", callers)}
    for name in said & set(MODULES):
        assert name in importers(module), f"{name} does not import {module}"


def test_the_policy_names_all_its_parts() -> None:
    parts = set(re.findall(r"\b[a-z_]+\b", opening(POLICY).partition("The parts:")[2])) | {"policy"}
    around = {"__main__", "loop", "process", "step_log", "step_times", "step_watch", "warm_up"}
    around |= {"worker_processes", "workers", "standby", "recent_steps", "senders", "captures"}
    names = {name.rpartition(".")[2] for name in MODULES if name.startswith("graphgen.scheduler.")}
    assert not names - around - parts, "parts that the policy does not name"
