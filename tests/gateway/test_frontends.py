"""What all frontends of a server count, as a gateway shows it."""

import pytest
from msgspec.structs import replace

from graphgen import ConnectionLostError
from graphgen.gateway import frontends
from graphgen.gateway.frontends import Frontends, sum_of
from graphgen.ipc.ggp.messages import Stats, StatsRequest
from graphgen.ipc.ggp.statistics import Histogram, Metrics, OpenRequest
from tests.gateway.asgi import LIVE, METRICS, STATS

QUESTION = StatsRequest(metrics=True, live_after=0)
OWN = frozenset(
    {
        *("sessions", "open_requests", "held_requests", "deltas_sent", "deltas_merged", "messages_refused"),
        *("frontend_cpu_s", "frontend_rss_bytes"),
    }
)
"""What each frontend counts for itself."""
OWN_METRICS = frozenset(
    {
        *("prompt_tokens", "cached_tokens", "output_tokens", "requests", "with_target", "target_misses"),
        *("http_answers", "held_by_class", "histograms"),
    }
)


def opened(age_ms: float) -> OpenRequest:
    return OpenRequest(
        age_ms=age_ms,
        priority=0,
        prompt_tokens=1,
        cached_tokens=0,
        output_tokens=0,
        max_tokens=9,
        itl_target_ms=None,
        state="running",
    )


ONE = replace(STATS, metrics=METRICS, live=replace(LIVE, requests=[opened(3.0), opened(1.0)]))
OTHER = replace(
    STATS,
    sessions=10,
    metrics=replace(METRICS, requests={"stop": 1, "length": 5}, output_tokens=7, held_by_class=[0, 5, 1]),
    live=replace(LIVE, requests=[opened(2.0)]),
)


def test_what_a_frontend_counts_is_added_and_what_the_engines_count_is_not() -> None:
    total = sum_of([ONE, OTHER])
    for name in Stats.__struct_fields__:
        value, one, other = getattr(total, name), getattr(ONE, name), getattr(OTHER, name)
        if name not in ("metrics", "live"):
            assert value == (one + other if name in OWN else one), name
    assert total.metrics is not None
    for name in set(Metrics.__struct_fields__) - OWN_METRICS:
        assert getattr(total.metrics, name) == getattr(METRICS, name), name
    assert total.metrics.output_tokens == METRICS.output_tokens + 7
    assert total.metrics.requests == {"stop": 4, "aborted": 1, "overloaded": 2, "length": 5}
    assert total.metrics.held_by_class == [1, 5, 3]
    assert total.metrics.http_answers == {"/v1/models 200": 6}


def test_histograms_are_added_but_for_that_of_the_engines_steps() -> None:
    total = sum_of([ONE, OTHER]).metrics
    assert total is not None
    one = METRICS.histograms["itl_s"]
    doubled = Histogram(bounds=one.bounds, counts=[2 * count for count in one.counts], sum=2 * one.sum)
    assert total.histograms == {name: one if name == "step_s" else doubled for name in METRICS.histograms}


def test_the_open_requests_shown_are_the_oldest_of_all_and_steps_are_shown_once() -> None:
    live = sum_of([ONE, OTHER]).live
    assert live is not None
    assert [request.age_ms for request in live.requests] == [3.0, 2.0, 1.0]
    assert live.steps == LIVE.steps


class Core:
    """A connection to a frontend that answers, or does not."""

    def __init__(self, stats: Stats, fails: bool = False) -> None:
        self.stats_of = stats
        self.fails = fails
        self.closed = False

    def stats(self, question: StatsRequest) -> Stats:
        assert question is QUESTION
        if self.fails:
            raise ConnectionLostError("it is away")
        return self.stats_of

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> dict[str, Core]:
    """By address: those that can be connected to."""
    found: dict[str, Core] = {}

    def connect(address: str, settings: object) -> Core:
        if address not in found:
            raise ConnectionLostError("nothing listens there")
        return found[address]

    monkeypatch.setattr(frontends, "RemoteCore", connect)
    return found


def test_a_frontend_that_is_away_is_left_out_until_it_answers(others: dict[str, Core]) -> None:
    all_of_them = Frontends(Core(ONE), ("ipc://a", "ipc://b"))  # type: ignore[arg-type]  # what it asks of a core
    assert all_of_them.stats(QUESTION) == ONE
    others["ipc://b"] = Core(OTHER)
    assert all_of_them.stats(QUESTION).sessions == ONE.sessions + OTHER.sessions
    others["ipc://b"].fails = True
    assert all_of_them.stats(QUESTION) == ONE
    others["ipc://b"].fails = False
    others["ipc://a"] = Core(OTHER)
    assert all_of_them.stats(QUESTION).sessions == ONE.sessions + 2 * OTHER.sessions
    all_of_them.close()
    assert all(core.closed for core in others.values())


def test_without_its_own_frontend_a_gateway_tells_nothing(others: dict[str, Core]) -> None:
    others["ipc://a"] = Core(OTHER)
    with pytest.raises(ConnectionLostError):
        Frontends(Core(ONE, fails=True), ("ipc://a",)).stats(QUESTION)  # type: ignore[arg-type]  # as above
