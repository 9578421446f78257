"""A worker waits for its turn: what a standby has done by then, what it has not, and how its start is told."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from graphgen import demo
from graphgen.launch.processes import process_age_s
from graphgen.worker import turn as turn_module
from graphgen.worker.turn import Turn, stand_by
from tests import ROOT
from tests.worker.local_engine import launch_config

PROGRAM = """
import os, sys
from pathlib import Path
from graphgen.worker.turn import Turn, stand_by
imports = stand_by(Path(sys.argv[1]), "worker-3", Turn(0))
said = [Path(f"/proc/self/{name}").read_text().strip() for name in ("comm", "oom_score_adj")]
print(*said, imports.seconds, imports.hidden_s, "torch" in sys.modules)
"""


class Pipe:
    """The scheduler's end and the worker's."""

    def __init__(self) -> None:
        self.worker, self.scheduler = os.pipe()

    def turn(self) -> None:
        os.write(self.scheduler, b"\n")


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.scheduler)
    time.sleep(0.01)
    os.close(pipe.worker)


def comes(turn: Turn, within_s: float) -> bool:
    waiting = threading.Thread(target=turn.wait, daemon=True)
    waiting.start()
    waiting.join(within_s)
    return not waiting.is_alive()


def test_a_worker_that_was_started_for_it_has_its_turn_at_once(pipe: Pipe, tmp_path: Path) -> None:
    pipe.turn()
    turn = Turn(pipe.worker)
    assert comes(turn, 5.0)
    assert turn.age_s == 0.0
    imports = stand_by(tmp_path, "worker-0", turn)  # there is no launch file yet, and nobody waits for it
    assert (imports.name, imports.hidden_s) == ("imports", 0.0)
    assert imports.seconds == pytest.approx(process_age_s(), abs=1.0)


def test_a_turn_comes_when_it_is_given(pipe: Pipe) -> None:
    turn = Turn(pipe.worker)
    assert not turn.has_come
    assert not comes(turn, 0.05)
    pipe.turn()
    assert comes(turn, 5.0)
    assert turn.age_s == pytest.approx(process_age_s(), abs=1.0)


def test_it_never_comes_from_a_scheduler_that_is_gone() -> None:
    """Or workers of a dead engine would take its device."""
    pipe = Pipe()
    turn = Turn(pipe.worker)
    os.close(pipe.scheduler)
    assert not comes(turn, 0.1)
    os.close(pipe.worker)


@pytest.fixture
def standby(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    launch_config(demo.model_folder(), device="cpu").write(tmp_path)
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_standby_is_named_gives_way_and_takes_no_cpu_until_its_turn_comes(
    standby: "subprocess.Popen[bytes]",
) -> None:
    facts = [Path(f"/proc/{standby.pid}/{name}") for name in ("comm", "oom_score_adj")]
    before = [Path(f"/proc/self/{path.name}").read_text().strip() for path in facts]
    deadline_s = time.monotonic() + 20.0
    while [path.read_text().strip() for path in facts] != ["standby-3", "1000"]:
        assert time.monotonic() < deadline_s, [path.read_text() for path in facts]
        time.sleep(0.01)
    stat = Path(f"/proc/{standby.pid}/stat")

    def cpu_ticks() -> int:
        return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))

    ticks = -1
    while ticks != (ticks := cpu_ticks()):
        assert time.monotonic() < deadline_s, f"it takes CPU while it waits: {ticks} ticks so far"
        time.sleep(0.3)
    output, _ = standby.communicate(b"\n", timeout=20.0)
    comm, oom, seconds, hidden_s, imports_torch = output.decode().split()
    assert comm.startswith("python")
    assert oom == before[1]
    assert (float(seconds), float(hidden_s) > 0.0) == (0.0, True), "its imports cost this start nothing"
    assert imports_torch == "False", "that is left to __main__, which begins it earlier"


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_standby_imports_what_its_start_will_need(
    pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: bool, device: str
) -> None:
    asked: list[tuple[bool, bool, str | None]] = []

    def prepare(compiles: bool, on_cuda: bool, kernel_package: str | None) -> None:
        asked.append((compiles, on_cuda, kernel_package))
        pipe.turn()

    monkeypatch.setattr(turn_module, "prepare_first_use", prepare)
    monkeypatch.setattr(turn_module, "_in_reserve", lambda name: contextlib.nullcontext())
    config = launch_config(demo.model_folder(), device="cpu")
    msgspec.structs.replace(config, compile=compiles, device=device).write(tmp_path)
    stand_by(tmp_path, "worker-0", Turn(pipe.worker))
    assert asked == [(compiles, device != "cpu", None)]
