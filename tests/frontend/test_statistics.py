"""What a server's own processes are told of it, over the real sockets."""

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from graphgen.ipc.engine_messages import Attach, StepSummary, Submit
from graphgen.ipc.engine_messages import StatsRequest as SchedulerStatsRequest
from graphgen.ipc.ggp.messages import Accepted, Delta, Done, Generate, Hello, Report, Sampling, Stats, StatsRequest
from graphgen.ipc.ggp.messages import Welcome as GgpWelcome
from graphgen.ipc.server_messages import EngineLost
from graphgen.server.frontend import monitor
from tests.fakes import READY, STATS
from tests.frontend.harness import Frontend, RawClient

MakeFrontend = Callable[..., Frontend]
METRICS = StatsRequest(metrics=True)


@pytest.fixture(autouse=True)
def asks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "FRESH_S", 0.0)


@pytest.fixture
def frontend(make_frontend: MakeFrontend, tmp_path: Path) -> Frontend:
    return make_frontend(private=f"ipc://{tmp_path / 'private'}")


def gateway_of(frontend: Frontend) -> RawClient:
    gateway = frontend.connect(address=frontend.settings.private)
    gateway.send(Hello())
    assert "statistics" in gateway.expect(GgpWelcome).features
    return gateway


def ask(frontend: Frontend, client: RawClient, question: StatsRequest, *steps: StepSummary) -> Stats:
    client.send(question)
    assert frontend.scheduler.expect(SchedulerStatsRequest).steps == (question.live_after is not None)
    frontend.scheduler.send(replace(STATS, recent_steps=steps))
    return client.expect(Stats)


def test_counts_are_of_all_clients_and_the_same_at_every_gateway(frontend: Frontend) -> None:
    gateways = [gateway_of(frontend) for _ in range(2)]
    client = frontend.welcome()
    sampling = Sampling(max_tokens=2, ttft_target_ms=60000.0, itl_target_ms=0.0001, tpot_target_ms=0.0001)
    for number, one in enumerate((client, gateways[0])):
        one.send(Generate(id=number, prompt_ids=[5, 6, 7], sampling=sampling))
        one.expect(Accepted)
        internal_id = frontend.scheduler.expect(Submit).request_id
        frontend.scheduler.send_tokens(internal_id, [1])
        one.expect(Delta)
        frontend.scheduler.send_tokens(internal_id, [2], "length")
        one.expect(Delta)
        one.expect(Done)
        gateways[number].send(Report(http_answers={"/v1/models 200": 3}))
    found = [ask(frontend, gateway, METRICS).metrics for gateway in gateways]
    assert found[0] == found[1]
    metrics = found[0]
    assert metrics is not None
    assert (metrics.prompt_tokens, metrics.output_tokens, metrics.requests) == (6, 4, {"length": 2})
    assert metrics.with_target == {"ttft": 2, "itl": 2, "tpot": 2}
    assert metrics.target_misses == {"ttft": 0, "itl": 2, "tpot": 2}
    assert metrics.http_answers == {"/v1/models 200": 6}
    assert {name: sum(one.counts) for name, one in metrics.histograms.items() if name != "step_s"} == {
        **dict.fromkeys(("ttft_s", "queue_s", "prefill_s", "decode_s", "inference_s", "e2e_s"), 2),
        **dict.fromkeys(("itl_s", "tpot_s", "prompt_tokens", "output_tokens"), 2),
    }


def test_live_steps_are_those_after_the_newest_that_one_knows(frontend: Frontend) -> None:
    gateway = gateway_of(frontend)
    steps = [StepSummary(number, 1, 2, 3, 4.5, 10.0 + number) for number in range(1, 7)]
    first = ask(frontend, gateway, StatsRequest(live_after=0), *steps[:4]).live
    second = ask(frontend, gateway, StatsRequest(live_after=2), *steps[4:]).live
    assert first is not None
    assert second is not None
    assert (first.steps.ids, second.steps.ids) == ([1, 2, 3, 4], [3, 4, 5, 6])
    assert (second.steps.chunk_rows[0], second.steps.padding_rows[0], second.steps.ms[0]) == (1, 3, 4.5)
    another_engine = ask(frontend, gateway, StatsRequest(live_after=1000)).live
    assert another_engine is not None
    assert another_engine.steps.ids == [1, 2, 3, 4, 5, 6]


def test_open_requests_are_shown_without_a_word_of_them(frontend: Frontend) -> None:
    gateway = gateway_of(frontend)
    gateway.send(Generate(id=1, prompt_ids=[5, 6, 7], tenant="ann", sampling=Sampling(max_tokens=9, priority=2)))
    gateway.expect(Accepted)
    frontend.scheduler.send_tokens(frontend.scheduler.expect(Submit).request_id, [1])
    gateway.expect(Delta)
    live = ask(frontend, gateway, StatsRequest(live_after=0)).live
    assert live is not None
    (request,) = live.requests
    assert (request.prompt_tokens, request.output_tokens, request.max_tokens) == (3, 1, 9)
    assert (request.priority, request.state) == (2, "running")
    assert "ann" not in repr(live)


def test_strangers_get_neither_counts_nor_steps_and_report_nothing(frontend: Frontend) -> None:
    stranger = frontend.welcome()
    stranger.send(Report(http_answers={"/v1/models 200": 3}))
    stranger.send(StatsRequest(metrics=True, live_after=0))
    assert not frontend.scheduler.expect(SchedulerStatsRequest).steps
    frontend.scheduler.send(STATS)
    stats = stranger.expect(Stats)
    assert (stats.metrics, stats.live) == (None, None)
    metrics = ask(frontend, gateway_of(frontend), METRICS).metrics
    assert metrics is not None
    assert metrics.http_answers == {}


def test_counts_outlive_the_engine_and_questions_that_it_did_not_answer(frontend: Frontend) -> None:
    gateway = gateway_of(frontend)
    gateway.send(METRICS)
    frontend.scheduler.expect(SchedulerStatsRequest)
    frontend.supervisor.send(EngineLost("the engine ended", restarts=True))
    frontend.scheduler.expect(Attach)
    gateway.send(METRICS)
    metrics = gateway.expect(Stats).metrics
    assert metrics is not None
    assert not metrics.engine_serves
    frontend.scheduler.send(READY)
    metrics = None
    while metrics is None or not metrics.engine_serves:
        gateway.send(METRICS)
        message = frontend.scheduler._channel.receive(0.2)
        if isinstance(message, SchedulerStatsRequest):
            frontend.scheduler.send(STATS)
        metrics = gateway.expect(Stats).metrics
