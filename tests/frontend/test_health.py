"""What a client is told of the engine: its health, its statistics, its end and its return."""

import time

import msgspec
import pytest

from graphgen.ipc.engine_messages import Attach, Outputs, Submit
from graphgen.ipc.engine_messages import Notice as EngineNotice
from graphgen.ipc.engine_messages import StatsRequest as SchedulerStatsRequest
from graphgen.ipc.ggp.messages import (
    Accepted,
    Delta,
    Error,
    Health,
    HealthRequest,
    Hello,
    Notice,
    Ping,
    Pong,
    Sampling,
    Stats,
    StatsRequest,
    Welcome,
)
from graphgen.ipc.server_messages import EngineLost, EngineServes
from graphgen.ipc.worker_messages import Probe
from tests.fakes import READY, STATS
from tests.frontend.harness import IDS, Frontend, open_request, wait_until


def test_health_asks_the_worker(frontend: Frontend) -> None:
    control = frontend.connect(control=True)
    control.send(HealthRequest())
    frontend.scheduler.send(frontend.scheduler.expect(Probe))
    health = control.expect(Health)
    assert (health.status, health.ready) == ("ok", True)


def test_health_of_a_worker_that_does_not_answer(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphgen.server.frontend.monitor.TIMEOUT_S", 0.3)
    control = frontend.connect(control=True)
    for _ in range(2):  # the second finds the question on its way
        control.send(HealthRequest())
        health = control.expect(Health)
        assert (health.status, health.ready) == ("stalled", False)
    probe = frontend.scheduler.expect(Probe)
    assert frontend.scheduler._channel.receive(0.1) is None, "a question is not repeated"
    frontend.scheduler.send(probe)
    assert wait_until(lambda: frontend.server._monitor._health.waited_s(time.monotonic()) == 0)


def test_one_question_serves_all_who_ask_for_statistics(frontend: Frontend) -> None:
    clients = [frontend.connect(control=True) for _ in range(5)]
    for client in clients:
        client.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    time.sleep(0.1)
    frontend.scheduler.send(STATS)
    for client in clients:
        stats = client.expect(Stats)
        assert (stats.running, stats.waiting, stats.pages_free) == (STATS.running, STATS.waiting, STATS.pages_free)


def test_statistics_tell_what_went_wrong_in_the_engine(frontend: Frontend) -> None:
    faults = {"worker_restarts": 3, "worker_loss": "the worker hung", "poisoned": 2, "numerical_errors": 5}
    client = frontend.welcome()
    client.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    frontend.scheduler.send(msgspec.structs.replace(STATS, **faults))
    found = msgspec.structs.asdict(client.expect(Stats))
    assert {name: found[name] for name in faults} == faults


def test_who_asks_for_notices_gets_them_and_nobody_else(frontend: Frontend) -> None:
    """Of the worker and of the engine; the operator gets the worker's as well."""
    asks, other = frontend.connect(), frontend.welcome()
    asks.send(Hello(notices=True))
    assert "notices" in asks.expect(Welcome).features
    frontend.scheduler.send(EngineNotice("the worker hung"))
    assert asks.expect(Notice).text == "the worker hung"
    assert frontend.supervisor.receive(5) == EngineNotice("the worker hung")
    frontend.supervisor.send(EngineLost("the engine ended", restarts=True))
    assert asks.expect(Notice).text.startswith("the engine ended; it is started again")
    frontend.scheduler.expect(Attach)
    frontend.scheduler.send(READY)
    assert asks.expect(Notice).text == "the engine serves again"
    other.send(Ping(t=1))
    assert other.expect(Pong).t == 1, "the first that it hears"
    frontend.supervisor.send(EngineLost("the engine ended once more"))
    assert asks.expect(Notice).text == "the engine ended once more; the server ends"


def test_an_engine_that_is_started_again_costs_the_open_requests_and_no_session(frontend: Frontend) -> None:
    client = frontend.welcome()
    open_request(frontend, client)
    frontend.supervisor.send(EngineLost("the engine ended", restarts=True))
    error = client.expect(Error)
    assert (error.code, error.id, error.retryable) == ("engine_lost", 1, True)
    assert frontend.scheduler.expect(Attach), "what still waits for the old engine is void"
    client.send(HealthRequest())
    assert not client.expect(Health).ready, "at once, without asking anybody"
    client.send(msgspec.structs.replace(IDS, id=2))
    refused = client.expect(Error)
    assert (refused.code, refused.id, refused.retryable) == ("engine_lost", 2, True)
    assert refused.retry_after_ms
    frontend.scheduler.send(Outputs(()))  # of the old one, late
    frontend.scheduler.send(READY)
    while not isinstance(frontend.supervisor.receive(5), EngineServes):
        pass
    client.send(msgspec.structs.replace(IDS, id=3, sampling=Sampling(max_tokens=8)))
    assert client.expect(Accepted).id == 3
    submit = frontend.scheduler.expect(Submit)
    frontend.scheduler.send_tokens(submit.request_id, [3])
    assert client.expect(Delta).id == 3


def test_who_waits_for_the_health_of_an_engine_that_ends_is_told_at_once(frontend: Frontend) -> None:
    client = frontend.welcome()
    client.send(HealthRequest())
    frontend.scheduler.expect(Probe)
    frontend.supervisor.send(EngineLost("the engine ended", restarts=True))
    health = client.expect(Health)
    assert (health.status, health.ready) == ("stalled", False)


def test_who_waits_for_statistics_of_an_engine_that_ends_gets_those_of_the_next(frontend: Frontend) -> None:
    client = frontend.welcome()
    client.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    frontend.supervisor.send(EngineLost("the engine ended", restarts=True))
    frontend.scheduler.expect(Attach)
    frontend.scheduler.send(READY)
    frontend.scheduler.expect(SchedulerStatsRequest)
    frontend.scheduler.send(STATS)
    assert client.expect(Stats).running == STATS.running
