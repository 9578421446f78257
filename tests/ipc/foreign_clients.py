"""The clients in other languages, as programs that tests run: what they need, where they are, what they print.

Their tools are installed by `make clients`. Without them the tests are skipped, or fail where REQUIRE_CLIENTS is set,
as it is in continuous integration.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import ROOT

NODE = ROOT / "ipc" / "clients" / "node"
CPP = ROOT / "ipc" / "clients" / "cpp"
HEADERS = ("zmq.hpp", "msgpack.hpp", "nlohmann/json.hpp")
TIMEOUT_S = 60.0


class Language(NamedTuple):
    """One client and how its test programs are started."""

    name: str
    vectors: list[str]
    """Runs all vectors; a file for the frames that it encodes is given in VECTORS_OUT, or as the last argument."""
    conversation: list[str]
    """Plays a plan, and prints a line of JSON for each step."""


LANGUAGES = [
    Language(
        "node", ["node", "--test", str(NODE / "test/vectors.test.js")], ["node", str(NODE / "test/conversation.js")]
    ),
    Language("cpp", [str(CPP / "build/vectors"), str(ROOT / "ipc/vectors")], [str(CPP / "build/conversation")]),
]


def installed() -> list[str]:
    """The names of those that can run; all of them where they are required."""
    required = bool(os.environ.get("REQUIRE_CLIENTS"))
    return [one.name for one in LANGUAGES if required or _what_is_missing(one) is None]


def prepare(language: Language) -> None:
    """Skips, or fails, if the language's tools are missing. C++ is compiled where a source has changed."""
    reason = _what_is_missing(language)
    if reason is not None:
        reason = f"{reason}: run `make clients`"
        if os.environ.get("REQUIRE_CLIENTS"):
            pytest.fail(reason)
        pytest.skip(reason)
    if language.name == "cpp":
        with (CPP / "Makefile").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a program that another test's make is writing cannot be run
            built = subprocess.run(["make", "-s", "-j2", "-C", str(CPP), "tests"], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr


def _what_is_missing(language: Language) -> str | None:
    if language.name == "node":
        if shutil.which("node") is None:
            return "Node is not installed"
        return None if (NODE / "node_modules/zeromq").is_dir() else "the packages of the Node client are not installed"
    for tool in ("g++", "make"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    missing = [header for header in HEADERS if not (Path("/usr/include") / header).exists()]
    return f"headers of C++ libraries are not installed: {', '.join(missing)}" if missing else None


def start(language: Language, folder: Path, plan: dict[str, Any]) -> "subprocess.Popen[str]":
    """Plays a plan; its lines are read with `lines_of` or one by one."""
    path = folder / f"{language.name}-plan.json"
    path.write_text(json.dumps(plan))
    return subprocess.Popen([*language.conversation, str(path)], stdout=subprocess.PIPE, text=True)


def lines_of(process: "subprocess.Popen[str]") -> list[Any]:
    """What it prints up to its end, which must be a good one."""
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, printed
    return [json.loads(line) for line in printed.splitlines()]


def play(language: Language, folder: Path, address: str, steps: Sequence[dict[str, Any]], **options: Any) -> list[Any]:
    return lines_of(start(language, folder, {"address": address, "steps": list(steps), **options}))
