"""What CONTRIBUTING says of the code is there: files, functions, folders, commands."""

import ast
import re
from pathlib import Path

import pytest

from tests import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
HOP = re.compile(r"`([\w/]+\.py)` `([\w.]+)`")
"""A file and a name in it."""


def sections() -> list[list[str]]:
    """The numbered lists, line by line."""
    found: list[list[str]] = []
    goes_on = False
    for line in TEXT.splitlines():
        if re.match(r"1\. ", line):
            found.append([])
            goes_on = True
        goes_on = goes_on and re.match(r"\d+\. ", line) is not None
        if goes_on:
            found[-1].append(line)
    return found


def names_in(file: Path) -> set[str]:
    """Functions, classes and methods, as `Class.method`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{one.name}"
                for one in node.body
                if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
    return names


def test_the_ways_are_told_in_hops() -> None:
    lengths = [len(section) for section in sections()]
    assert lengths[:5] == [11, 8, 7, 14, 4], "a request, at a server, over HTTP, a step, a death"
    for line in [line for section in sections()[:5] for line in section]:
        assert HOP.search(line) or "see below" in line, f"a hop names its file and function: {line}"


@pytest.mark.parametrize(("file", "name"), sorted(set(HOP.findall(TEXT))))
def test_a_hop_is_where_it_is_said_to_be(file: str, name: str) -> None:
    assert name in names_in(ROOT / file)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z][a-z]\w*\.\w+)`", TEXT))))
def test_a_method_that_is_named_without_its_file_exists_somewhere(name: str) -> None:
    files = (path for folder in ("graphgen", "capture", "models", "ipc") for path in (ROOT / folder).rglob("*.py"))
    assert any(name in names_in(path) for path in files)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ((?:tests|graphgen)[\w.]*)", TEXT))))
def test_a_command_is_a_module(module: str) -> None:
    path = ROOT.joinpath(*module.split("."))
    path = path if path.exists() else ROOT.joinpath(*module.removeprefix("graphgen.").split("."))
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_the_layout_names_every_folder() -> None:
    layout = TEXT.partition("## Layout")[2].partition("```")[2].partition("```")[0]
    for folder in (path for path in (ROOT / "graphgen").iterdir() if path.is_dir() and not path.is_symlink()):
        if folder.name != "__pycache__":
            assert f"  {folder.name}/" in layout, f"CONTRIBUTING's layout lacks {folder.name}/"
