"""`graphgen health` and `graphgen stats` as probes use them: what they print and their exit codes."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from graphgen.commands import cli
from graphgen.commands.probe import written
from graphgen.ipc.engine_messages import Attach, StatsRequest, Submit
from graphgen.ipc.ggp.messages import Accepted, Draining
from graphgen.ipc.server_messages import Drain, EngineLost
from graphgen.ipc.worker_messages import Probe
from graphgen.server.frontend import monitor
from tests.cluster.stats import engine, stats_of
from tests.fakes import STATS
from tests.frontend.harness import IDS, Frontend, demo_tokenizer


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Frontend]:
    """Its answers stay fresh however long a busy machine takes to ask again."""
    monkeypatch.setattr(monitor, "FRESH_S", 60.0)
    frontend = Frontend(demo_tokenizer())
    yield frontend
    frontend.close()


def ask(frontend: Frontend, command: str, *options: str) -> Result:
    addresses = ("--address", frontend.sockets.data.address, "--control", frontend.sockets.control.address)
    return CliRunner().invoke(cli.app, [command, *addresses, *options])


def answer_probes(frontend: Frontend, num: int) -> threading.Thread:
    """As the worker does."""

    def answer() -> None:
        for _ in range(num):
            frontend.scheduler.send(frontend.scheduler.expect(Probe))

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_health_of_a_server_that_serves(frontend: Frontend) -> None:
    thread = answer_probes(frontend, 1)
    done = ask(frontend, "health")
    thread.join()
    assert done.exit_code == 0
    assert done.stdout.startswith("ok: the worker answered in ")
    told = json.loads(ask(frontend, "health", "--json").stdout)  # the answer is a moment old and serves again
    assert (told["status"], told["ready"]) == ("ok", True)


def test_health_of_a_server_that_drains(frontend: Frontend) -> None:
    client = frontend.welcome()
    client.send(IDS)  # an open request keeps it from ending
    frontend.scheduler.expect(Submit)
    frontend.supervisor.send(Drain(5.0))
    client.expect(Accepted)
    client.expect(Draining)
    thread = answer_probes(frontend, 1)
    done = ask(frontend, "health")
    thread.join()
    assert (done.exit_code, done.stdout.split(":")[0]) == (1, "draining")


def test_health_of_a_server_without_an_engine_names_no_worker(frontend: Frontend) -> None:
    frontend.supervisor.send(EngineLost("the engine ended", restarts=True, engine=0))
    frontend.scheduler.expect(Attach)
    done = ask(frontend, "health")
    assert (done.exit_code, done.stdout) == (1, "stalled: no engine serves\n")


def test_health_of_a_worker_that_says_nothing_tells_how_long(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "TIMEOUT_S", 0.1)
    done = ask(frontend, "health")
    assert done.exit_code == 1
    assert done.stdout.startswith("stalled: the worker did not answer for ")


def test_stats_are_lines_or_json(frontend: Frontend) -> None:
    def answer() -> None:
        frontend.scheduler.expect(StatsRequest)
        frontend.scheduler.send(STATS)

    thread = threading.Thread(target=answer)
    thread.start()
    done = ask(frontend, "stats")
    thread.join()
    lines = dict(line.split() for line in done.stdout.splitlines())
    assert (done.exit_code, lines["pages_total"], lines["sessions"]) == (0, str(STATS.pages_total), "0")
    assert (lines["worker_restarts"], lines["worker_loss"], lines["numerical_errors"]) == ("0", "-", "0")


def test_stats_of_several_engines_have_a_line_for_each() -> None:
    counts = msgspec.structs.replace(engine(3, 2, 5), pages_total=7, steps=11, finished=13, worker_restarts=1)
    lines = written(stats_of([counts, msgspec.structs.replace(counts, serves=False)])).splitlines()
    assert lines[-2].split(maxsplit=2) == [
        "engine",
        "0",
        "serves: running 3, waiting 2, pages_free 5, pages_total 7, steps 11, finished 13, preemptions 0,"
        " worker_restarts 1",
    ]
    assert lines[-1].split(maxsplit=2)[2].startswith("away: running 3")
    assert not any("None" in line or "EngineCount" in line for line in lines)


def test_a_probe_takes_no_session_and_is_answered_when_all_are_taken() -> None:
    frontend = Frontend(demo_tokenizer(), max_sessions=1)
    client = frontend.welcome()
    try:
        thread = answer_probes(frontend, 1)
        assert ask(frontend, "health").exit_code == 0
        thread.join()
    finally:
        client.close()
        frontend.close()


@pytest.mark.parametrize("command", ["health", "stats"])
def test_no_server_is_code_1_and_a_wrong_command_is_code_2(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, [command, "--address", f"ipc://{tmp_path / 'none'}"])
    assert done.exit_code == 1
    assert "nothing listens at" in done.stderr
    assert done.stdout == ""
    assert CliRunner().invoke(cli.app, [command, "--adress", "x"]).exit_code == 2


@pytest.mark.parametrize("command", ["health", "stats"])
def test_a_server_that_says_nothing_is_code_1(command: str, frontend: Frontend) -> None:
    done = ask(frontend, command, "--timeout-s", "0.3")
    assert done.exit_code == 1
    assert "did not answer for 0.3 s" in done.stderr
