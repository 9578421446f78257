"""A start is seen: bars on a terminal, one log line a phase elsewhere, nothing twice."""

import logging
import os
import pty
import re
import subprocess
import sys

import msgspec
import pytest

from graphgen import Engine
from graphgen.base.progress import FIRST_PHASE, StartProgress
from graphgen.ipc.worker_messages import Phase, Progress
from graphgen.requests.core import describe_start
from tests.fakes import READY

START = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from graphgen.base.progress import StartProgress
from graphgen.ipc.worker_messages import Progress
with StartProgress({shows_bars}) as progress:
    for message in (Progress("load", 0, 0), Progress("load", 1, 2), Progress("capture", 0, 0)):
        progress.show(message)
print("rich" in sys.modules)
"""


def stderr_of(shows_bars: bool | None, terminal: bool) -> tuple[str, bool]:
    """What a start writes, and whether rich was imported for it."""
    command = [sys.executable, "-P", "-c", START.format(shows_bars=shows_bars)]
    if not terminal:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stderr, done.stdout.strip() == "True"
    ours, theirs = pty.openpty()
    try:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
        shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60, env=environment)
        return os.read(ours, 1 << 16).decode(), shown.stdout.strip() == b"True"
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("shows_bars", "terminal", "bars"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_bars_are_for_terminals_unless_told_otherwise(shows_bars: bool | None, terminal: bool, bars: bool) -> None:
    text, imports_rich = stderr_of(shows_bars, terminal)
    assert imports_rich == bars
    assert ("INFO:graphgen:starting: load" in text) != bars
    if terminal and bars:
        for words in (f"starting: {FIRST_PHASE}", "starting: load", "starting: capture"):
            assert words in text


def test_a_phase_is_logged_once_however_often_it_reports(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "graphgen")
    with StartProgress(False) as progress:
        for done in range(5):
            progress.show(Progress("load", done, 5))
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["starting: processes", "starting: load"]


def test_an_engine_says_what_its_start_is_at(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "graphgen")
    with Engine(device="cpu", token_budget=8, num_pages=64) as engine:
        phases = [phase.name for phase in engine.info.worker.phases]
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("starting: ")]
    names = [line.removeprefix("starting: ").split(",")[0] for line in told]
    assert names[:3] == ["processes", "device", "attention"]
    assert {"load", "kernels", "profile", "capture"} <= set(names) <= {*phases, "processes"}
    assert len(names) == len(set(names))
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    for phase in phases:
        assert sum(bool(re.match(rf"(starting: | +){re.escape(phase)}\b", line)) for line in lines) <= 1, lines


@pytest.mark.parametrize("with_phases", [True, False])
def test_a_start_whose_phases_were_logged_is_told_in_one_line(with_phases: bool) -> None:
    ready = msgspec.structs.replace(READY, worker=msgspec.structs.replace(READY.worker, phases=(Phase("load", 1.5),)))
    first, *others = describe_start(ready, 2.0, with_phases).splitlines()
    assert first == "graphgen serves on fake with none attention after 2.00 s"
    assert [line.split() for line in others] == ([["load", "1.50", "s"]] if with_phases else [])
