"""The frontend's loop outlives whatever fails in it."""

import pytest

from graphgen.ipc.engine_messages import StatsRequest as SchedulerStatsRequest
from graphgen.ipc.ggp.messages import Delta, Done, Ping, Pong, Stats, StatsRequest
from tests.fakes import STATS
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend, open_request, wait_until


def test_a_failing_answer_costs_that_answer_alone(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a frontend without descriptors met: the statistics open a file."""
    client = frontend.welcome()
    name = open_request(frontend, client)

    def no_descriptor(_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(frontend.server._monitor, "_describe", no_descriptor)
    client.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    frontend.scheduler.send(STATS)
    frontend.scheduler.send_tokens(name, [5, 6], "length")
    assert client.expect(Delta).ids == [5, 6]
    client.expect(Done)
    monkeypatch.undo()
    client.send(Ping(t=1))
    client.expect(Pong)


@pytest.mark.parametrize("failure", [MemoryError(), OSError(24, "Too many open files"), KeyError("x")])
@pytest.mark.parametrize("part", ["release", "flush", "tick", "receive"])
def test_no_part_of_the_loop_ends_it(
    make_frontend: MakeFrontend, monkeypatch: pytest.MonkeyPatch, part: str, failure: Exception
) -> None:
    frontend = make_frontend()
    server = frontend.server
    owner = {"release": server._desk, "flush": server._outbox, "tick": server._monitor, "receive": server._sockets.data}
    client = frontend.welcome()
    failed = []

    def fail(*_: object) -> None:
        failed.append(part)
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(owner[part], part, fail)
        client.send(Ping(t=1))
        assert wait_until(lambda: bool(failed))
    client.send(Ping(t=2))
    while client.expect(Pong).t != 2:
        pass


def test_statistics_need_no_descriptor(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    client = frontend.welcome()
    client.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    monkeypatch.setattr("os.open", lambda *_: pytest.fail("a file was opened"))
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("a file was opened"))
    frontend.scheduler.send(STATS)
    assert client.expect(Stats).frontend_rss_bytes > 0
