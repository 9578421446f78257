"""However a user's program ends, no process and no file of its engine is left; however a process ends, nobody hangs."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graphgen import Engine, EngineDeadError, SamplingParams
from tests import ROOT
from tests.forks import outcome_in_a_fork
from tests.serving import is_alive

GONE_WITHIN_S = 5.0

SETTINGS = {"device": "cpu", "token_budget": 8, "num_pages": 160, "cpu_threads": 1}
PREAMBLE = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it is ignored from the start
from graphgen import Engine, SamplingParams
SETTINGS = {SETTINGS!r}
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)
def say(*words):
    print(*words, flush=True)
"""


class Program:
    """A user's program in a process of its own; `folder` is where its engines put theirs."""

    def __init__(self, folder: Path, body: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PREAMBLE + textwrap.dedent(body)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, timeout_s: float = 30.0) -> tuple[int, str]:
        """(exit code, standard error)."""
        _, said = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said

    @property
    def children(self) -> list[int]:
        """Processes that were started with a folder of this program's as argument."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if os.fsencode(f"{self.folder}/graphgen-") in command:
                    found.append(int(entry.name))
        return found

    def assert_gone(self) -> None:
        deadline = time.monotonic() + GONE_WITHIN_S
        while self.children or any(self.folder.glob("graphgen-*")):  # torch keeps a cache of its own beside it
            assert time.monotonic() < deadline, (self.children, list(self.folder.rglob("*")))
            time.sleep(0.05)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: pytest's own folders are too long for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="gg") as name:
        yield Path(name)


def test_kill_9_of_the_program_leaves_nothing(folder: Path) -> None:
    program = Program(
        folder,
        """
        engine = Engine(**SETTINGS)
        for piece in engine.stream("A", ENDLESS):
            say("streaming")
        """,
    )
    assert program.line() == "streaming"
    assert len(program.children) == 2
    program.process.kill()
    program.end()
    program.assert_gone()


def test_kill_9_during_the_start_leaves_nothing(folder: Path) -> None:
    program = Program(folder, "Engine(**SETTINGS)")
    deadline = time.monotonic() + 30
    while len(program.children) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    program.process.kill()
    program.end()
    program.assert_gone()


def test_ctrl_c_ends_a_call_and_the_program_closes_in_order(folder: Path) -> None:
    program = Program(
        folder,
        """
        with Engine(**SETTINGS) as engine:
            try:
                say("ready")
                engine.generate(["A"] * 5, ENDLESS)
            except KeyboardInterrupt:
                while engine.stats().running:
                    pass
                say("interrupted", engine.generate("A", SamplingParams(max_tokens=3))[0].finish_reason)
        """,
    )
    assert program.line() == "ready"
    time.sleep(0.3)
    program.process.send_signal(signal.SIGINT)
    assert program.line() == "interrupted length"
    assert program.end() == (0, "")
    program.assert_gone()


def test_a_fork_gets_an_error_at_once_and_leaves_the_engine_alone() -> None:
    with Engine(**SETTINGS) as engine:  # type: ignore[arg-type]  # a plain dict of settings
        stream = engine.stream("A", SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0))
        first = next(stream)
        calls: dict[str, Callable[[], object]] = {
            "generate": lambda: engine.generate("A", SamplingParams(max_tokens=1)),
            "stream": lambda: engine.stream("A"),
            "an open stream": lambda: next(stream),
            "stats": engine.stats,
        }
        for name, call in calls.items():
            said = outcome_in_a_fork(call)
            assert said.startswith(f"EngineDeadError: the engine was made in process {os.getpid()}"), (name, said)
        for close in (stream.close, engine.close):  # what a `with` does when the fork leaves it
            assert outcome_in_a_fork(close) == "None"
        pieces = [first, *stream]
        assert sum(len(piece.token_ids) for piece in pieces) == 40, "the parent's stream went on"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("with Engine(**SETTINGS) as engine: raise SystemError('mine')", 1, "SystemError: mine"),
        ("engine = Engine(**SETTINGS); engine.stream('A', ENDLESS)", 0, ""),
        ("engine = Engine(**SETTINGS); sys.exit(3)", 3, ""),
        ("Engine(model='/no/such/folder', **SETTINGS)", 1, "CheckpointError"),
        ("Engine(**{**SETTINGS, 'start_timeout_s': 0.1})", 1, "start_timeout_s"),
    ],
    ids=["exception", "never closed", "exit", "bad model", "slow start"],
)
def test_a_program_that_ends_otherwise_leaves_nothing(folder: Path, body: str, code: int, said: str) -> None:
    program = Program(folder, body)
    ended, stderr = program.end(60.0)
    assert ended == code
    assert said in stderr
    assert said or not stderr
    program.assert_gone()


@pytest.mark.alone
def test_a_killed_scheduler_is_an_error_within_a_second() -> None:
    with Engine(**SETTINGS) as engine:  # type: ignore[arg-type]  # a plain dict of settings
        folder, pids = engine._core.folder, engine._core.pids
        stream = engine.stream("A", SamplingParams(max_tokens=None, ignore_eos=True))
        next(stream)
        os.kill(pids["scheduler"], signal.SIGKILL)
        killed_s = time.monotonic()
        with pytest.raises(EngineDeadError, match="the scheduler process was killed by SIGKILL"):
            for _ in stream:
                pass
        assert time.monotonic() - killed_s < 1.0
        with pytest.raises(EngineDeadError):
            engine.generate("A")
        deadline = time.monotonic() + GONE_WITHIN_S
        while any(map(is_alive, pids.values())) or folder.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_two_engines_live_in_one_program() -> None:
    sampling = SamplingParams(max_tokens=10, temperature=0)
    with Engine(**SETTINGS) as first:  # type: ignore[arg-type]  # a plain dict of settings
        with Engine(**SETTINGS) as second:  # type: ignore[arg-type]  # as above
            assert first.generate("A", sampling)[0].token_ids == second.generate("A", sampling)[0].token_ids
        assert first.generate("A", sampling)[0].finish_reason == "length"


def test_a_user_file_named_like_a_library_is_not_imported(folder: Path, tmp_path: Path) -> None:
    """Children run in the program's folder; its torch.py must not become theirs."""
    (tmp_path / "torch.py").write_text("raise SystemError('the wrong torch')")
    program = Program(folder, f"import os; os.chdir({str(tmp_path)!r}); Engine(**SETTINGS).close(); say('served')")
    assert program.line() == "served"
    assert program.end() == (0, "")
