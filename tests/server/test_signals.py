"""Signals to a server: one wish to end drains, however many signals say it; a second wish ends at once; and whatever
comes while the server leaves, its exit code is its own."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from graphgen import Client, SamplingParams
from tests import ROOT
from tests.serving import free_address, is_alive, serving

LONG = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0)
SPACING = """
import os, signal, sys, time
from graphgen.base.signals import SAME_S, EndSignals
for name in sys.argv[1].split():
    signal.signal(getattr(signal, name), signal.SIG_IGN)
signals, counts = EndSignals(), []
for word in sys.argv[2:]:
    if word == "wait":
        time.sleep(SAME_S + 0.05)
    elif word == "ignore":
        signals.ignore()
    else:
        os.kill(os.getpid(), getattr(signal, word))
    counts.append(signals.num_wishes)
print(*counts)
"""


def wishes(*words: str, ignored: str = "") -> list[int]:
    """What a process that gets these signals counts after each of them; `ignored`: from its start."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SPACING, ignored, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return [int(word) for word in done.stdout.split()]


def test_signals_that_come_together_are_one_wish() -> None:
    assert wishes("SIGTERM", "SIGTERM", "SIGHUP", "SIGINT", "wait", "SIGTERM", "SIGTERM") == [1, 1, 1, 1, 1, 2, 2]


def test_a_signal_that_the_starter_ignores() -> None:
    """`nohup` asks a program to outlive its terminal; a script's background job has SIGINT ignored by no one's wish."""
    assert wishes("SIGHUP", ignored="SIGHUP") == [0]
    assert wishes("SIGINT", ignored="SIGINT SIGHUP") == [1]


def test_a_signal_on_the_way_out_changes_nothing() -> None:
    assert wishes("SIGTERM", "ignore", "SIGTERM", "SIGINT", "SIGHUP") == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_to_all_processes_of_a_server_drain_it(tmp_path: Path, number: signal.Signals) -> None:
    """What a service manager does: every process of the group gets the signal, and the server twice within 0.1 s; and a
    closed terminal takes the server's output with it. Signals go on until the server has ended."""
    with serving(tmp_path) as server, Client(server.address) as client:
        stream = client.stream("ROMEO:", LONG)
        first = next(stream)
        children = [
            server.pid_of(module) for module in ("graphgen.scheduler", "graphgen.worker", "graphgen.server.frontend")
        ]
        for pid in (server.process.pid, *children):
            os.kill(pid, number)
        time.sleep(0.05)
        server.process.send_signal(number)
        assert len(first.token_ids) + sum(len(piece.token_ids) for piece in stream) == 200
        deadline_s = time.monotonic() + 20
        while server.process.poll() is None:
            assert time.monotonic() < deadline_s, server.output
            server.process.send_signal(number)
            time.sleep(0.002)
        assert server.process.returncode == 0, server.output


def test_a_frontend_that_stands_still_does_not_keep_a_server(tmp_path: Path) -> None:
    """Nor a gateway, nor an engine: all processes end."""
    options = ("--bind", free_address(4), "--frontends", "2", "--http", "127.0.0.1:0", "--grace-s", "0.2")
    with serving(tmp_path, *options) as server:
        modules = ("graphgen.server.frontend", "graphgen.gateway", "graphgen.scheduler", "graphgen.worker")
        pids = [pid for module in modules for pid in server.pids_of(module)]
        os.kill(server.pids_of("graphgen.server.frontend")[1], signal.SIGSTOP)
        assert server.end() == 1, "nobody knows what was open there"
        assert "the frontend 1 has not drained" in server.output
        assert [pid for pid in pids if is_alive(pid)] == []


def test_a_server_whose_output_nobody_reads_drains(tmp_path: Path) -> None:
    code = """
        import os, sys
        from graphgen.server.serving import say
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(writer)
        os.close(reader)
        say("draining")
        say("lost")
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, b"")
