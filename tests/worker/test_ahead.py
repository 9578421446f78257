"""Whether and for whom Triton kernels are compiled ahead of a start. That all of them are is tested on a GPU."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from graphgen import demo
from graphgen.launch.launch_config import LaunchConfig
from graphgen.worker import ahead
from graphgen.worker.ahead import Note, capability_of, compile_for_worker, note_path, read_note
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
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, tuple[int, int]]]:
    """The programs that were run, none of which does anything."""
    found: list[tuple[Path, tuple[int, int]]] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    monkeypatch.setattr(
        ahead, "run_program", lambda folder, capability, environment: found.append((folder, capability))
    )
    return found


def test_the_device_is_known_without_a_context() -> None:
    assert capability_of(FakeDriver(), 0) == (9, 0)
    for failing in ("cuInit", "cuDeviceGet", "cuDeviceGetAttribute"):
        assert capability_of(FakeDriver(failing), 0) is None


def test_a_worker_has_its_kernels_compiled_until_they_are(
    tmp_path: Path, config: LaunchConfig, runs: list[tuple[Path, tuple[int, int]]]
) -> None:
    config.write(tmp_path)
    compile_for_worker(tmp_path, 0, lambda: None)
    assert runs == [(tmp_path, (9, 0))]
    note = note_path(os.environ, config, (9, 0))
    note.parent.mkdir()
    note.write_bytes(msgspec.json.encode(Note(40, (), 9.0)))
    assert compile_for_worker(tmp_path, 0, lambda: None) == 0.0
    assert len(runs) == 1
    assert read_note(note) == Note(40, (), 9.0)
    note.unlink()
    compile_for_worker(tmp_path, 1, lambda: None)
    assert len(runs) == 1, "the first rank does it for all"


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"attention": "torch"}])
def test_nothing_is_compiled_for_an_engine_that_launches_no_such_kernel(
    settings: dict[str, str], tmp_path: Path, config: LaunchConfig, runs: list[tuple[Path, tuple[int, int]]]
) -> None:
    msgspec.structs.replace(config, **settings).write(tmp_path)
    assert compile_for_worker(tmp_path, 0, lambda: None) == 0.0
    assert runs == []


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
        [sys.executable, "-P", "-m", ahead.MODULE, str(tmp_path), "9.0"],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "compiled at their first launch, not ahead: No module named 'triton'" in done.stderr
    assert not list(tmp_path.glob("*.note"))
