"""A server as a child process: where it listens, why it ended, and what is left of it."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from graphgen.cluster.child import ServerChild
from graphgen.cluster.record import LOCK
from graphgen.launch.config import EngineConfig
from graphgen.server.options import ServeOptions
from tests import ROOT
from tests.cluster.waiting import wait_until
from tests.serving import is_alive

START_S = 120.0


def test_a_server_that_cannot_start_says_why() -> None:
    child = ServerChild("engine 3")
    child.start(EngineConfig(device="cpu", model="/nowhere"), ServeOptions(data="tcp://127.0.0.1:*"))
    wait_until(lambda: child.find_end() is not None, "it ends", START_S)
    assert child.place() is None
    assert "engine 3 ended with exit code 2" in (child.find_end() or "")
    assert "'/nowhere' is neither a local folder nor a hub id" in (child.find_end() or "")
    child.stop(0.0)
    assert not child.folder.exists()


def test_what_a_child_left_that_was_killed_with_its_parent_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, foreign = tmp_path / "gg-left", tmp_path / "gg-foreign"
    for folder in (left, foreign):
        (folder / "keys").mkdir(parents=True)
    (left / LOCK).touch()
    first = ServerChild("engine 0")
    second = ServerChild("engine 1")
    assert not left.exists()
    assert foreign.exists(), "it has no lock: it may be anybody's"
    assert first.folder.exists(), "its parent lives"
    first.stop(0.0)
    second.stop(0.0)
    assert list(tmp_path.iterdir()) == [foreign]
    first.stop(0.0)


def test_a_server_serves_and_ends_with_a_parent_that_is_killed() -> None:
    """Nothing is left of it: no process, which would hold a device, and no file."""
    code = """
        import time
        from graphgen.cluster.child import ServerChild
        from graphgen.launch.config import EngineConfig
        from graphgen.server.options import ServeOptions
        child = ServerChild("engine 0")
        child.start(EngineConfig(device="cpu", max_num_seqs=7), ServeOptions(data="tcp://127.0.0.1:*"))
        while (place := child.place()) is None:
            assert child.find_end() is None, child.find_end()
            time.sleep(0.05)
        print(child.pid, child.folder, place.num_slots, *place.data, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:
        assert parent.stdout is not None
        pid, folder, num_slots, address = parent.stdout.readline().split()
        assert address.startswith("tcp://127.0.0.1:")
        below = [int(pid), *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        assert len(below) >= 2
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not any(is_alive(one) for one in below), "all processes have ended", START_S)
        wait_until(lambda: not Path(folder).exists(), "its folder is gone", START_S)
    assert num_slots == "7", "what it can run is told with where it listens"
