"""Engines that are servers elsewhere, played by a test over real sockets: what travels, that nothing is lost or comes
twice when one goes away, and which servers are refused."""

import functools
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from graphgen import (
    ConfigError,
    ConnectionLostError,
    EngineDeadError,
    OverloadedError,
    PoisonedRequestError,
    PromptTooLongError,
    SamplingParams,
    ServerError,
)
from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.ggp.framing import make_error, server_framing
from graphgen.ipc.ggp.messages import (
    Cancel,
    ClientMessage,
    Delta,
    Deltas,
    Done,
    Draining,
    Generate,
    Health,
    HealthRequest,
    Hello,
    Ping,
    Pong,
    ServerMessage,
    Stats,
    StatsRequest,
    Timing,
    Usage,
)
from graphgen.ipc.ggp.routing import Capacity, Load
from graphgen.router.links import Links
from graphgen.router.remote_engines import Model, RemoteEngines, model_name
from graphgen.router.remote_link import RemoteLink
from tests.fakes import WELCOME, open_request
from tests.requests.test_link import Letters

Message = TypeVar("Message")

MODEL = Model("fake", 10, frozenset({0}), 100)
SPOKEN = msgspec.structs.replace(
    WELCOME,
    eos_token_ids=[0],
    features=["routed", "tenants"],
    capacity=Capacity(engines=1, slots=4, pages=8, page_size=16, step_rows=16, chunk_rows=12, windows=[None]),
)
IDLE = Load(
    epoch=1,
    serves=True,
    engines=1,
    open=0,
    tenants=0,
    prompt_tokens=0,
    output_tokens=0,
    steps=1,
    pages_free=8,
    prompt_token_s=1e-3,
    output_token_s=2e-3,
    step_s=5e-3,
)


class FakeServer:
    """A server of one frontend, at one address through all its lives."""

    def __init__(self, **said: Any) -> None:  # fields of its welcome
        self._said = said
        self._framing = server_framing()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._life = 0
        self.address = "tcp://127.0.0.1:*"
        self.unread: list[ClientMessage] = []
        self.begin()

    def begin(self) -> None:
        self._life += 1
        self._peer = b""
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(self.address)
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)
        self.unread.clear()

    def end(self) -> None:
        """As a process that is killed: its connections close."""
        self._socket.close()
        time.sleep(0.01)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def read(self) -> None:
        while self._socket.poll(0):
            self._peer, *frames = self._socket.recv_multipart()
            message = self._framing.decode(frames)
            if isinstance(message, Hello):
                assert message.routes
                instance = f"{self.address} {self._life}"
                self.send(msgspec.structs.replace(SPOKEN, **{"instance": instance, **self._said}))
            else:
                self.unread.append(message)

    def send(self, *messages: ServerMessage) -> None:
        for message in messages:
            self._socket.send_multipart([self._peer, *self._framing.encode(message)])

    def find(self, kind: type[Message]) -> Message | None:
        """The first message of this kind that has come; it is taken."""
        self.read()
        for place, message in enumerate(self.unread):
            if isinstance(message, kind):
                return self.unread.pop(place)  # type: ignore[return-value]  # it is of this kind
        return None

    def expect(self, kind: type[Message]) -> Message:
        return until(lambda: self.find(kind), f"a {kind.__name__}, but {self.unread}")


def until(look: Callable[[], Message | None], what: str, timeout_s: float = 10.0) -> Message:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if (found := look()) is not None:
            return found
        time.sleep(0.005)
    raise AssertionError(f"expected {what}")


class Rig:
    """Links to so many servers."""

    def __init__(self, count: int = 2, context_len: int = 100) -> None:
        self.servers = [FakeServer() for _ in range(count)]
        self.engines = RemoteEngines(
            msgspec.structs.replace(MODEL, context_len=context_len), None, None, takes_any_context=True
        )
        self.links = Links([], lambda _: None, routes=True)
        self.away: queue.SimpleQueue[tuple[int, str, bool]] = queue.SimpleQueue()
        self.served: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.links.when_away(lambda *said: self.away.put(said))
        self.links.when_ready(lambda number, _: self.served.put(number))
        for number, server in enumerate(self.servers):
            self.links.add(number, self.engines.maker(server.address))
        for number in range(count):
            self.until_serves(number)
        self._ids = iter(range(1, 1000))

    def until_serves(self, number: int) -> None:
        def serves() -> bool | None:
            for server in self.servers:
                if not server._socket.closed:
                    server.read()
            return self.links.serves(number) or None

        until(serves, f"engine {number}")

    def is_serving(self, number: int) -> bool | None:
        """By what the router knows."""
        return self.links._places._router.view(str(number)).status == "serving" or None

    def open(self, sampling: SamplingParams | None = None) -> "Opened":
        opened = Opened(next(self._ids), sampling)
        self.links.submit([opened.request])
        opened.find(self)
        return opened

    def open_at(self, number: int) -> "Opened":
        for _ in range(20):
            if (opened := self.open()).at == number:
                return opened
        raise AssertionError(f"nothing goes to engine {number}")

    def close(self) -> None:
        self.links.close()
        for server in self.servers:
            server.close()


class Opened:
    """A request, and what came of it."""

    def __init__(self, request_id: int, sampling: SamplingParams | None = None) -> None:
        self.id = request_id
        self.deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.request = open_request(
            request_id,
            self.deliveries.put,
            Letters(),
            sampling or SamplingParams(max_tokens=50),
            arrived_s=time.monotonic(),
        )
        self.request.submit = msgspec.structs.replace(self.request.submit, log_id=f"request-{request_id}")
        self.at = -1
        self.message = Generate(id=0)

    @property
    def there(self) -> int:
        """Its id at the server that has it."""
        return self.message.id

    def find(self, rig: Rig) -> None:
        """Which engine gets it next."""

        def look() -> int | None:
            for number, server in enumerate(rig.servers):
                if server._socket.closed:
                    continue
                server.read()
                for message in server.unread:
                    if isinstance(message, Generate) and message.log_id == f"request-{self.id}":
                        server.unread.remove(message)
                        self.message = message
                        return number
            return None

        self.at = until(look, f"request {self.id} anywhere")

    def hear(self, *token_ids: int) -> None:
        """They come, each once."""
        found: list[int] = []
        while len(found) < len(token_ids):
            piece = self.deliveries.get(timeout=10)
            assert isinstance(piece, StreamPiece), piece
            found += piece.token_ids
        assert tuple(found) == token_ids

    def fails_with(self, kind: type[Exception]) -> None:
        error = self.deliveries.get(timeout=10)
        assert isinstance(error, kind), error


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def done(request_id: int) -> Done:
    return Done(
        id=request_id,
        finish=["length"],
        usage=Usage(prompt_tokens=3, output_tokens=1),
        timing=Timing(queued_ms=0.0, first_token_ms=0.0, total_ms=0.0),
    )


def test_tokens_come_singly_and_in_batches_and_once(rig: Rig) -> None:
    first, second = rig.open_at(0), rig.open_at(0)
    server = rig.servers[0]
    server.send(Delta(id=first.there, ids=[5], cached_tokens=16, queued_ms=1500.0))
    server.send(Deltas(items=[Delta(id=first.there, seq=1, ids=[6]), Delta(id=second.there, ids=[7, 8])]))
    first.hear(5, 6)
    second.hear(7, 8)
    assert first.request.cached_tokens == 16
    assert first.request.started_s == first.request.submit.arrived_s + 1.5
    server.send(Delta(id=first.there, seq=2, ids=[0], finish="stop"), done(first.there))
    piece = first.deliveries.get(timeout=10)
    assert isinstance(piece, StreamPiece)
    assert (piece.finish_reason, piece.cached_tokens) == ("stop", 16)


def test_what_is_larger_than_a_servers_frames_fails_alone(rig: Rig) -> None:
    """The server would close the connection, and at the next engine the same would happen."""
    beside = rig.open_at(0)
    for server in rig.servers:
        server._said["limits"] = msgspec.structs.replace(SPOKEN.limits, frame_bytes=2000)
        server.end()
        server.begin()
    for number in range(2):
        rig.until_serves(number)
    beside.find(rig)
    large = Opened(999)
    large.request.submit = msgspec.structs.replace(large.request.submit, prompt_token_ids=pack_int32([5] * 1000))
    rig.links.submit([large.request])
    large.fails_with(PromptTooLongError)
    rig.servers[beside.at].send(Delta(id=beside.there, ids=[7]))
    beside.hear(7)
    assert [len(server.unread) for server in rig.servers] == [0, 0]


def test_a_broken_connection_loses_no_token_and_brings_none_twice(rig: Rig) -> None:
    opened = rig.open_at(0)
    rig.servers[0].send(Delta(id=opened.there, ids=[5]), Delta(id=opened.there, seq=1, ids=[6]))
    rig.servers[0].end()  # the second one may be on its way
    opened.hear(5, 6)
    opened.find(rig)
    assert opened.at == 1
    routed = opened.message.routed
    assert routed is not None
    assert (routed.output_u32, routed.moves, routed.deaths) == (pack_int32([5, 6]), 1, 1)
    assert routed.first_token_ms is not None
    rig.servers[1].send(Delta(id=opened.there, ids=[7]))
    opened.hear(7)
    number, reason, is_refused = rig.away.get(timeout=10)
    assert (number, reason, is_refused) == (0, "its connection broke", False)


def test_an_engine_that_is_there_again_serves_as_one_that_keeps_nothing(rig: Rig) -> None:
    rig.servers[0].send(IDLE)
    rig.servers[0].end()
    until(lambda: rig.links.num_serving == 1 or None, "the loss")
    rig.servers[0].begin()
    rig.until_serves(0)
    rig.open_at(0)
    view = rig.links._places._router.view("0")
    assert view.status == "serving"


def test_deaths_that_the_engine_told_go_along(rig: Rig) -> None:
    opened = rig.open_at(0)
    rig.servers[0].send(Delta(id=opened.there, deaths=1))
    until(lambda: opened.request._num_deaths or None, "the death")
    rig.servers[0].end()
    opened.find(rig)
    assert opened.message.routed is not None
    assert opened.message.routed.deaths == 2


def test_a_request_that_ends_three_engines_in_a_row_fails_alone() -> None:
    rig = Rig(3)
    try:
        opened = rig.open()
        for _ in range(2):
            rig.servers[opened.at].end()
            opened.find(rig)
        rig.servers[opened.at].end()
        opened.fails_with(PoisonedRequestError)
    finally:
        rig.close()


@pytest.mark.parametrize("code", ["draining", "engine_lost", "slow_consumer"])
def test_what_an_engine_does_not_go_on_with_goes_elsewhere(rig: Rig, code: Any) -> None:
    opened = rig.open_at(0)
    rig.servers[0].send(Delta(id=opened.there, ids=[5]), make_error(code, "no more", opened.there))
    opened.hear(5)
    opened.find(rig)
    assert opened.message.routed is not None
    assert opened.message.routed.output_u32 == pack_int32([5])


def test_an_engine_without_room_passes_a_request_on(rig: Rig) -> None:
    opened = rig.open_at(0)
    rig.servers[0].send(make_error("overloaded", "full", opened.there, retry_after_ms=100))
    opened.find(rig)
    assert opened.at == 1
    rig.servers[1].send(make_error("overloaded", "full", opened.there, retry_after_ms=100))
    opened.fails_with(OverloadedError)


def test_a_fault_of_the_request_fails_it(rig: Rig) -> None:
    opened = rig.open()
    rig.servers[opened.at].send(make_error("poisoned", "it ended the worker", opened.there))
    opened.fails_with(PoisonedRequestError)


def test_an_engine_that_drains_gets_nothing_new(rig: Rig) -> None:
    rig.servers[0].send(Draining(grace_ms=1000))
    until(lambda: rig.links._places._router.view("0").is_draining or None, "the drain")
    assert {rig.open().at for _ in range(4)} == {1}


def test_a_cancelled_request_is_cancelled_there(rig: Rig) -> None:
    opened = rig.open()
    rig.links.cancel([opened.id])
    assert rig.servers[opened.at].expect(Cancel).id == opened.there
    rig.servers[opened.at].send(Delta(id=opened.there, ids=[5]), Ping())
    rig.servers[opened.at].expect(Pong)
    assert opened.deliveries.empty()


def test_tokens_that_are_missing_fail_their_request_alone(rig: Rig) -> None:
    opened, other = rig.open_at(0), rig.open_at(0)
    rig.servers[0].send(
        Delta(id=opened.there, ids=[5]), Delta(id=opened.there, seq=2, ids=[7]), Delta(id=other.there, ids=[8])
    )
    opened.hear(5)
    opened.fails_with(ServerError)
    other.hear(8)
    assert rig.servers[0].expect(Cancel).id == opened.there


def test_what_was_on_its_way_when_a_request_came_back_is_not_its_own(rig: Rig) -> None:
    for server in rig.servers:
        server.send(IDLE)
    until(lambda: ((one := rig.links.report()) and one.is_serving) or None, "reports")
    opened = rig.open_at(0)
    before = opened.there
    for _ in range(2):
        at = opened.at
        rig.servers[at].send(make_error("engine_lost", "no more", opened.there))
        opened.find(rig)
        assert opened.at == 1 - at, "not at once to the one that gave it up"
        rig.servers[at].send(IDLE)
        until(lambda: ((one := rig.links.report()) and one.num_steps == 2) or None, "its return")
        until(functools.partial(rig.is_serving, at), "its return")
    rig.servers[0].send(Delta(id=before, ids=[4]), Delta(id=opened.there, ids=[5]))
    opened.hear(5)
    assert opened.deliveries.empty()


def test_a_drained_engine_goes_on_running_and_serves_again_when_it_is_expected(rig: Rig) -> None:
    drained: queue.SimpleQueue[int] = queue.SimpleQueue()
    opened = rig.open_at(0)
    rig.links.drain(0, 0.0, drained.put)
    rig.links.tick()
    assert rig.servers[0].expect(Cancel).id == opened.there
    opened.find(rig)
    assert opened.at == 1
    assert drained.get(timeout=10) == 0
    assert not rig.links.serves(0)
    rig.links.expect(0)
    rig.until_serves(0)
    rig.open_at(0)


def test_an_engine_is_removed_when_it_has_drained_and_another_added(rig: Rig) -> None:
    drained: queue.SimpleQueue[int] = queue.SimpleQueue()
    with pytest.raises(EngineDeadError, match="serves: drain it first"):
        rig.links.remove(0)
    rig.links.drain(0, 0.0, drained.put)
    rig.links.tick()
    drained.get(timeout=10)
    rig.links.remove(0)
    assert 0 not in rig.links
    rig.servers.append(FakeServer())
    rig.links.add(0, rig.engines.maker(rig.servers[2].address))
    rig.until_serves(0)
    opened = until(lambda: ((one := rig.open()).at == 2 and one) or None, "a request at the new one")
    assert opened.at == 2


def test_reports_are_those_of_the_engine(rig: Rig) -> None:
    for server in rig.servers:
        server.send(msgspec.structs.replace(IDLE, open=3, tenants=2, prompt_tokens=500))
    report = until(lambda: ((one := rig.links.report()) and one.num_open == 6 and one) or None, "both reports")
    assert report.prompt_tokens == 1000
    assert report.prompt_token_s == pytest.approx(0.5e-3), "two engines compute a token in half the time"


def test_statistics_and_health_are_asked_for(rig: Rig) -> None:
    asked, probe = rig.links.ask_stats(), rig.links.ask_probe()
    for number, server in enumerate(rig.servers):
        assert server.expect(StatsRequest).metrics
        server.expect(HealthRequest)
        counts = {field.name: 1 for field in msgspec.structs.fields(Stats) if field.required}
        server.send(msgspec.convert(counts, Stats), Health(status="ok", ready=number == 1, worker_ms=1.0))
    stats = asked.result(10)
    assert [one and one.running for one in stats.engines] == [1, 1]
    assert stats.waiting == 4, "what a frontend holds waits as well"
    assert probe.result(10) is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"model": "another"}, "the model there is 'another', here 'fake'"),
        ({"vocab_size": 11}, "the size of the vocabulary there is 11, here 10"),
        ({"eos_token_ids": [2]}, r"the end-of-sequence tokens there is \[2\], here \[0\]"),
        ({"version": 2}, "the version of the protocol there is 2, here 1"),
        ({"features": []}, "does not let this frontend route requests of others"),
    ],
)
def test_a_server_that_is_no_engine_of_this_frontend_is_refused_by_name(said: dict[str, Any], told: str) -> None:
    server = FakeServer(**said)
    links = Links([], lambda _: None, routes=True)
    away: queue.SimpleQueue[tuple[int, str, bool]] = queue.SimpleQueue()
    links.when_away(lambda *said: away.put(said))

    def refused(server: FakeServer) -> bool | None:
        server.read()
        return None if away.empty() else True

    try:
        links.add(0, RemoteEngines(MODEL, None, None, takes_any_context=True).maker(server.address))
        until(lambda: refused(server), "its refusal")
        with pytest.raises(ConfigError, match=told) as caught:
            links.wait_ready(1.0)
        assert server.address in str(caught.value)
        assert away.get()[2]
    finally:
        links.close()
        server.close()


def test_a_server_that_is_not_there_is_told_by_name() -> None:
    links = Links([], lambda _: None, routes=True)
    try:
        links.add(0, RemoteEngines(MODEL, None, None, takes_any_context=True).maker("tcp://127.0.0.1:9"))
        with pytest.raises(ConnectionLostError, match=r"the engine tcp://127\.0\.0\.1:9 cannot be reached: nothing"):
            links.wait_ready(1.0)
    finally:
        links.close()


def test_one_server_by_two_names_and_a_shorter_context_are_refused() -> None:
    engines = RemoteEngines(msgspec.structs.replace(MODEL, context_len=200), None, None, takes_any_context=True)
    engines.admit("tcp://a:1", SPOKEN)
    with pytest.raises(ConfigError, match="tcp://b:1 and tcp://a:1 are one server"):
        engines.admit("tcp://b:1", SPOKEN)
    assert engines.settle() == 100
    shorter = msgspec.structs.replace(
        SPOKEN, instance="another", limits=msgspec.structs.replace(SPOKEN.limits, prompt_tokens=99)
    )
    with pytest.raises(ConfigError, match="has a context of 99 tokens, this frontend serves 100"):
        engines.admit("tcp://c:1", shorter)
    engines.forget("tcp://a:1")
    engines.admit("tcp://b:1", SPOKEN)


def test_a_model_is_called_the_same_wherever_it_lies() -> None:
    assert model_name("/models/Llama-3/") == model_name("meta/Llama-3") == "Llama-3"


def test_a_link_that_is_closed_leaves_no_thread_and_fails_what_is_open(rig: Rig) -> None:
    opened = rig.open()
    link = rig.links._links[opened.at]
    assert isinstance(link, RemoteLink)
    rig.links.close()
    assert isinstance(opened.deliveries.get(timeout=10), Exception)
    assert not link._lives._thread.is_alive()
    rig.links.close()
