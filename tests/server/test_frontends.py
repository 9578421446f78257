"""Several frontends of one server: how they are started again, what is heard from whom, and how all of them end."""

import socket
from collections.abc import Iterator

import pytest
import zmq

from graphgen import ConfigError
from graphgen.base.addresses import check_free
from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import EngineToScheduler, Notice, SchedulerToEngine, SenderEnded
from graphgen.ipc.senders import engine_channel, sender_of
from graphgen.ipc.server_messages import (
    Drain,
    Drained,
    DrainEngine,
    EngineDrained,
    EngineServes,
    ExpectEngine,
    Listening,
)
from graphgen.launch.processes import Exit
from graphgen.server.operator import Wish, ask
from graphgen.server.options import MAX_FRONTENDS, MAX_MEMORY_MIB, MAX_OPEN_REQUESTS, MAX_S, ServeOptions
from graphgen.server.supervisor import Supervisor
from tests.server.test_supervisor import WHERE, Rig
from tests.serving import free_address


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(monkeypatch, num_frontends=2)
    yield rig
    rig.close()


def kill(rig: Rig, number: int) -> None:
    rig.processes.dead[f"frontend-{number}"] = Exit(f"frontend-{number}", -9, "")
    rig.wait_until(lambda: not rig.processes.dead)


# --- addresses ---------------------------------------------------------------------------------------------------


def test_each_frontend_has_two_ports_of_its_own_counted_on_from_the_first() -> None:
    options = ServeOptions(data="tcp://127.0.0.1:7000", frontends=3)
    assert options.addresses == (
        ("tcp://127.0.0.1:7000", "tcp://127.0.0.1:7001"),
        ("tcp://127.0.0.1:7002", "tcp://127.0.0.1:7003"),
        ("tcp://127.0.0.1:7004", "tcp://127.0.0.1:7005"),
    )
    apart = ServeOptions(data="tcp://127.0.0.1:7000", control="tcp://127.0.0.1:8000", frontends=2)
    assert apart.addresses[1] == ("tcp://127.0.0.1:7002", "tcp://127.0.0.1:8002")
    last = ServeOptions(data="tcp://[::1]:65532", frontends=2)
    assert last.addresses[1] == ("tcp://[::1]:65534", "tcp://[::1]:65535")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"frontends": 0}, "frontends is 0, the least is 1"),
        ({"frontends": -1}, "frontends is -1, the least is 1"),
        ({"frontends": MAX_FRONTENDS + 1}, f"frontends is {MAX_FRONTENDS + 1}, the limit is {MAX_FRONTENDS}: lower it"),
        ({"grace_s": float("inf")}, "grace_s is inf, the limit is 86400: lower it"),
        ({"grace_s": float("nan")}, "grace_s is nan, the least is 0"),
        ({"slow_consumer_s": 86400.5}, "slow_consumer_s is 86400.5, the limit is 86400"),
        ({"memory_limit_mib": MAX_MEMORY_MIB + 1}, f"memory_limit_mib is {MAX_MEMORY_MIB + 1}, the limit is"),
        ({"open_requests": MAX_OPEN_REQUESTS + 1}, f"open_requests is {MAX_OPEN_REQUESTS + 1}, the limit is"),
        ({"data": "tcp://127.0.0.1:²"}, "tcp://127.0.0.1:² has no port"),
        ({"frontends": 2, "data": "ipc:///tmp/server"}, "ipc:///tmp/server has no port to count on from"),
        ({"frontends": 2, "data": "tcp://127.0.0.1:*"}, "has no port to count on from"),
        ({"frontends": 2, "data": "tcp://127.0.0.1:0"}, "has no port to count on from"),
        ({"frontends": 2, "data": "tcp://127.0.0.1:65534"}, "frontend 1 would have port 65536"),
        ({"frontends": 2, "control": "ipc:///tmp/control"}, "ipc:///tmp/control has no port to count on from"),
        (
            {"frontends": 2, "data": "tcp://127.0.0.1:7000", "control": "tcp://127.0.0.1:7002"},
            "tcp://127.0.0.1:7002 would be bound twice",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServeOptions(**given)  # type: ignore[arg-type]  # what an operator may say
    assert said in str(refused.value)


def test_the_most_of_everything_is_taken() -> None:
    ServeOptions(grace_s=MAX_S, slow_consumer_s=MAX_S, memory_limit_mib=MAX_MEMORY_MIB, open_requests=MAX_OPEN_REQUESTS)


def test_a_port_in_use_is_found_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphgen import EngineConfig
    from graphgen.server import supervisor

    def start(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(supervisor, "EngineProcesses", start)
    monkeypatch.setattr(supervisor, "EndSignals", lambda: None)
    data = free_address(4)
    taken = int(data.rpartition(":")[2]) + 3
    options = ServeOptions(data=data, frontends=2)
    with socket.create_server(("127.0.0.1", taken)), pytest.raises(ConfigError) as refused:
        Supervisor(EngineConfig(device="cpu"), options, print).run()
    assert f"tcp://127.0.0.1:{taken} cannot be bound" in str(refused.value)
    assert "--bind" in str(refused.value)
    check_free(address for both in options.addresses for address in both)  # what was tried is free again


# --- what is heard -----------------------------------------------------------------------------------------------


def test_ready_waits_for_all_and_lists_every_address(rig: Rig) -> None:
    second = Listening("tcp://127.0.0.1:41003", "tcp://127.0.0.1:41004")
    from tests.fakes import READY

    rig.frontends[0].send(READY)
    rig.frontends[0].send(WHERE)
    assert rig.frontends[0].receive(0.3) is None
    assert "ready" not in rig.said
    rig.frontends[1].send(second)
    rig.wait_until(lambda: "ready" in rig.said)
    for where in (WHERE, second):
        assert f"listening on {where.data} (data)\nlistening on {where.control} (control)" in rig.said


def test_what_all_say_of_an_engine_is_said_once(rig: Rig) -> None:
    rig.listen()
    for frontend in rig.frontends:
        frontend.send(Notice("a worker died"))
    rig.wait_until(lambda: "a worker died" in rig.said)
    kill(rig, 0)
    rig.frontends[1].send(Notice("another one died"))
    rig.wait_until(lambda: "another one died" in rig.said)
    assert rig.said.count("a worker died") == 1


def test_an_engine_that_serves_again_is_told_of_once(rig: Rig) -> None:
    rig.listen()
    assert rig.lose_engine().restarts
    rig.wait_until(lambda: not rig.processes.dead)
    for frontend in rig.frontends:
        frontend.send(EngineServes(0))
        frontend.send(Notice("a mark"))
    rig.wait_until(lambda: "a mark" in rig.said)
    assert rig.said.count("the engine serves again") == 1


# --- lives -------------------------------------------------------------------------------------------------------


def test_one_that_dies_is_started_again_where_it_was_and_the_other_stays(rig: Rig) -> None:
    rig.listen()
    kill(rig, 1)
    rig.wait_until(lambda: len(rig.processes.starts) == 3)
    again = rig.processes.starts[-1]
    assert (again.data, again.num_frontends, again.awaits_all) == (WHERE.data, 2, False)
    assert any("the frontend 1 ended and is started again" in line for line in rig.said)
    rig.frontends[1].send(WHERE)
    rig.wait_until(lambda: "the frontend 1 serves again" in rig.said)
    assert rig.said.count("ready") == 1


def test_the_requests_of_one_that_died_end_at_the_engine_at_once(rig: Rig) -> None:
    """Its successor takes seconds to start, and later ones wait longer."""
    rig.listen()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channels: list[Channel[SchedulerToEngine, EngineToScheduler]] = [
        Channel(context, rig.processes.folder, engine_channel(sender), "lower", EngineToScheduler) for sender in (0, 1)
    ]
    kill(rig, 1)
    ended = channels[1].receive(5)
    assert isinstance(ended, SenderEnded)
    assert sender_of(ended.below, 2) == 1
    assert ended.below > 0
    assert channels[0].receive(0.2) is None, "the other lives"
    assert channels[1].receive(0.2) is None, "once"
    for channel in channels:
        channel.close()
    context.term()


def test_all_drain_and_what_each_lost_counts(rig: Rig) -> None:
    rig.listen()
    rig.wishes.num_wishes = 1
    for frontend in rig.frontends:
        assert frontend.receive(5) == Drain(7.0)
    rig.frontends[0].send(Drained(0))
    rig.processes.dead["frontend-0"] = Exit("frontend-0", 0, "")  # as one that has drained does
    assert rig.frontends[0].receive(0.3) is None
    assert rig.thread.is_alive(), "the other one still drains"
    rig.frontends[1].send(Drained(2))
    assert rig.ended() == 1
    assert len(rig.processes.starts) == 2, "nobody needs another"


def test_one_that_dies_while_all_drain_ends_nobody_elses_requests(rig: Rig) -> None:
    rig.listen()
    rig.wishes.num_wishes = 1
    for frontend in rig.frontends:
        assert frontend.receive(5) == Drain(7.0)
    rig.processes.dead["frontend-0"] = Exit("frontend-0", -9, "")
    assert rig.frontends[1].receive(0.3) is None
    assert rig.thread.is_alive()
    rig.frontends[1].send(Drained(0))
    assert rig.ended() == 1, "those of the dead one were lost"


# --- an engine drains ----------------------------------------------------------------------------------------------


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Two frontends that share two engines, which a test is both."""
    rig = Rig(monkeypatch, num_frontends=2, replicas=2)
    rig.listen()
    yield rig
    rig.close()


def states(rig: Rig) -> tuple[str, ...]:
    return ask(rig.processes.folder, Wish("show")).engines


def test_an_engine_has_drained_when_all_frontends_say_so(replicas: Rig) -> None:
    assert not ask(replicas.processes.folder, Wish("drain", 1, 5.0)).error
    for frontend in replicas.frontends:
        assert frontend.receive(5) == DrainEngine(1, 5.0)
    replicas.frontends[0].send(EngineDrained(1))
    assert replicas.frontends[0].receive(0.3) is None
    assert states(replicas) == ("serving", "draining"), "the other one may still send requests there"
    replicas.frontends[1].send(EngineDrained(1))
    replicas.wait_until(lambda: "engine 1 has drained, and ends" in replicas.said)


def test_a_frontend_that_comes_back_while_an_engine_drains_is_told_and_waited_for(replicas: Rig) -> None:
    ask(replicas.processes.folder, Wish("drain", 1, 60.0))
    for frontend in replicas.frontends:
        assert isinstance(frontend.receive(5), DrainEngine)
        frontend.send(EngineDrained(1)) if frontend is replicas.frontends[1] else None
    kill(replicas, 1)
    replicas.frontends[1].send(WHERE)
    told = replicas.frontends[1].receive(5)
    assert isinstance(told, DrainEngine)
    assert told.engine == 1
    assert 50.0 < told.grace_s <= 60.0, "what is left of it"
    replicas.frontends[0].send(EngineDrained(1))
    assert replicas.frontends[0].receive(0.3) is None
    assert states(replicas)[1] == "draining"
    replicas.frontends[1].send(EngineDrained(1))
    replicas.wait_until(lambda: "engine 1 has drained, and ends" in replicas.said)


def test_an_engine_that_one_frontend_cannot_drain_is_kept_by_all(replicas: Rig) -> None:
    ask(replicas.processes.folder, Wish("drain", 0, 5.0))
    for frontend in replicas.frontends:
        assert isinstance(frontend.receive(5), DrainEngine)
    replicas.frontends[0].send(EngineDrained(0, "it is the only one that serves"))
    for frontend in replicas.frontends:
        assert frontend.receive(5) == ExpectEngine(0)
    assert states(replicas) == ("serving", "serving")
    replicas.frontends[1].send(EngineDrained(0))  # it was quicker than the order to keep it
    assert replicas.frontends[1].receive(5) == ExpectEngine(0)
