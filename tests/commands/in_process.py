"""A command of graphgen without a new interpreter: torch alone takes seconds to import.

That `python -m graphgen` reaches the same function, `tests.commands.test_cli` and the servers' tests hold.
"""

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import NoReturn

import pytest

from graphgen.commands import cli

LIMIT_S = 120


def run_here(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdin: str = ""
) -> "subprocess.CompletedProcess[str]":
    """In this process, whose objects a test may have replaced."""
    monkeypatch.setattr(sys, "stdin", StringIO(stdin))
    monkeypatch.setattr(sys, "argv", ["graphgen", *arguments])
    capsys.readouterr()
    code = _run()
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())


def run_forked(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, import_path: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """In a fork of this process: the command may change its environment and import what it likes. import_path: a folder
    to look into first."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            _become(arguments, environment or {}, import_path, (stdout.fileno(), stderr.fileno()))
        _, status = os.waitpid(child, 0)
        stdout.seek(0)
        stderr.seek(0)
        texts = stdout.read().decode(), stderr.read().decode()
    return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(status), *texts)


def _become(
    arguments: Sequence[str], environment: Mapping[str, str], import_path: str | None, outputs: tuple[int, int]
) -> NoReturn:
    """Nothing of the tests' own goes on in the fork, whatever happens."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT_S)
        for descriptor, output in enumerate(outputs, start=1):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        sys.path[:0] = [import_path] if import_path else []
        sys.argv = ["graphgen", *arguments]
        code = _run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run() -> int:
    """The exit code."""
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
