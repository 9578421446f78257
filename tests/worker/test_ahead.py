"""Whether and for whom Triton kernels are compiled ahead of a start. That all of them are is tested on a GPU."""

import ctypes
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from graphgen import demo
from graphgen.launch.launch_config import LaunchConfig
from graphgen.scheduler.worker_processes import BEHIND_ANOTHER
from graphgen.worker import ahead
from graphgen.worker.ahead import KernelsAhead, Note, capability_of, note_path, read_note
from tests import ROOT
from tests.worker.local_engine import launch_config


class FakeDriver:
    """libcuda with one device of compute capability 9.0; `failing` is the function that reports an error."""

    def __init__(self, failing: str | None = None) -> None:
        self._failing = failing

    def cuInit(self, flags: int) -> int:
        return self._failing == "cuInit"

    def cuDeviceGet(self, device: object, ordinal: int) -> int:
        return self._failing == "cuDeviceGet"

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]  # type: ignore[attr-defined]  # what ctypes.byref refers to
        return self._failing == "cuDeviceGetAttribute"


@pytest.fixture
def config() -> LaunchConfig:
    return msgspec.structs.replace(launch_config(demo.model_folder(), device="cpu"), device="cuda")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The capabilities for which kernels were compiled; none is."""
    found: list[tuple[int, int]] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(ahead, "_ask_driver", lambda ordinal: (9, ordinal))
    monkeypatch.setattr(ahead, "compile_kernels", lambda config, capability: found.append(capability))
    return found


def test_the_device_is_known_without_a_context() -> None:
    assert capability_of(FakeDriver(), 0) == (9, 0)
    for failing in ("cuInit", "cuDeviceGet", "cuDeviceGetAttribute"):
        assert capability_of(FakeDriver(failing), 0) is None


def test_kernels_are_compiled_until_they_are(
    tmp_path: Path, config: LaunchConfig, compiled: list[tuple[int, int]]
) -> None:
    config.write(tmp_path)
    assert ahead.main(tmp_path, 0, None) > 0.0
    assert compiled == [(9, 0)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "the process forks: what it imports then must find no device"
    note = note_path(os.environ, config, (9, 0))
    note.parent.mkdir()
    note.write_bytes(msgspec.json.encode(Note(40, (), 9.0)))
    ahead.main(tmp_path, 0, None)
    ahead.main(tmp_path, 0, (9, 0))
    assert len(compiled) == 1
    assert read_note(note) == Note(40, (), 9.0)
    note.unlink()
    assert ahead.main(tmp_path, 1, None) == 0.0
    assert len(compiled) == 1, "the first rank does it for all"


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"attention": "torch"}])
def test_nothing_is_compiled_for_an_engine_that_launches_no_such_kernel(
    settings: dict[str, str], tmp_path: Path, config: LaunchConfig, compiled: list[tuple[int, int]]
) -> None:
    msgspec.structs.replace(config, **settings).write(tmp_path)
    assert ahead.main(tmp_path, 0, None) == 0.0
    assert compiled == []
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_worker_asks_no_driver_and_starts_no_thread_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that two threads called for the first time, or that was called beside a fork, has ended workers."""

    def load(name: str) -> None:
        raise AssertionError(f"{name} is loaded in the worker")

    monkeypatch.setattr(ctypes, "CDLL", load)
    threads = threading.enumerate()
    launch_config(demo.model_folder(), device="cpu").write(tmp_path)
    kernels = KernelsAhead.of(tmp_path, 0)
    assert threading.enumerate() == threads
    phase = kernels.wait()
    assert (phase.name, phase.hidden_s) == ("triton kernels", 0.0)


@pytest.mark.parametrize(("arguments", "first"), [((), "kernels"), ((BEHIND_ANOTHER,), "turn")])
def test_beside_a_worker_that_serves_nothing_looks_for_kernels(arguments: tuple[str, ...], first: str) -> None:
    """They are there, and to look asks the driver."""
    program = """
import runpy
from graphgen.launch import processes
from graphgen.worker import ahead, turn

def say(word):
    raise SystemExit(word)

processes.end_with_parent = lambda *pids: None
ahead.has_driver = lambda: True
ahead.KernelsAhead.of = lambda folder, rank: say("kernels")
turn.Turn = lambda pipe: say("turn")
runpy.run_module("graphgen.worker", run_name="__main__")
"""
    command = [sys.executable, "-c", program, "folder", "1", "worker-0", "1", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.stderr.split() == [first]


def test_seconds_of_the_process_are_waited_for_or_hidden() -> None:
    phase = KernelsAhead([sys.executable, "-c", "print(500.0)"]).wait()
    assert phase.hidden_s == pytest.approx(500.0 - phase.seconds)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", "was ended by signal 11"),
        ("import time; time.sleep(600)", "was ended by signal 9"),
        ("print('no number')", "not how long it took"),
        ("raise SystemExit(1)", ""),
    ],
)
def test_a_process_that_dies_hangs_or_fails_ends_no_worker(
    program: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    patience_s = 2.0 if "sleep" in program else 60.0
    phase = KernelsAhead([sys.executable, "-c", program], patience_s).wait()
    assert phase.hidden_s == 0.0
    assert words in caplog.text


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (lambda config: msgspec.structs.replace(config, dtype="float16"), True),
        (lambda config: msgspec.structs.replace(config, kv_format="int8"), True),
        (lambda config: msgspec.structs.replace(config, num_slots=config.num_slots - 1), True),
        (lambda config: msgspec.structs.replace(config, spec=msgspec.structs.replace(config.spec, vocab_size=8)), True),
        (lambda config: msgspec.structs.replace(config, model_path="/elsewhere", seed=7, num_pages=9), False),
    ],
)
def test_kernels_are_those_of_a_model_and_its_sizes(
    change: Callable[[LaunchConfig], LaunchConfig], is_another: bool, config: LaunchConfig
) -> None:
    paths = [note_path(os.environ, one, (9, 0)) for one in (config, change(config))]
    assert (paths[0] != paths[1]) == is_another
    assert paths[0] != note_path(os.environ, config, (8, 0))


def test_kernels_whose_source_has_changed_are_others(config: LaunchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = note_path(os.environ, config, (9, 0))
    names = {name for name, _, _ in ahead._own_sources()}
    assert {"few_rows_kernels.py", "split_kv.py", "draw.py", "rows_cuda.py"} <= names
    monkeypatch.setattr(ahead, "_own_sources", lambda: [("draw.py", 1, 2)])
    assert note_path(os.environ, config, (9, 0)) != before


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="says what is told where Triton is missing")
def test_without_triton_the_program_says_so_and_leaves_no_note(tmp_path: Path, config: LaunchConfig) -> None:
    config.write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", ahead.MODULE, str(tmp_path), "0", "9.0"],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert float(done.stdout) > 0.0
    assert "compiled at their first launch, not ahead: No module named 'triton'" in done.stderr
    assert not list(tmp_path.glob("*.note"))
