"""The link to an engine that is a server elsewhere: a client of it, by the public protocol GGP/1.

Owns what is open at the server, and whether it serves; `graphgen.router.lives` has the connection and its thread,
`graphgen.requests.request_table` the open requests, as for an engine on this machine, `graphgen.router.sent_requests`
what they are called there. Made by `graphgen.router.remote_engines`; any thread may call it.

An engine is lost when its connection breaks, when it says nothing for too long or forgets the session. What was open
there goes on elsewhere, behind the tokens that have come; the link tries to connect until the engine is there again.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial

import msgspec

from graphgen.ipc.engine_messages import EngineStats, Ready
from graphgen.ipc.engine_messages import Notice as OperatorNotice
from graphgen.ipc.errors import (
    ConfigError,
    ConnectionLostError,
    EngineClosedError,
    EngineDeadError,
    GraphgenError,
    ServerError,
)
from graphgen.ipc.ggp.framing import FrameError
from graphgen.ipc.ggp.messages import (
    Delta,
    Deltas,
    Done,
    Draining,
    Error,
    Health,
    HealthRequest,
    Notice,
    Ping,
    Pong,
    ServerMessage,
    Stats,
    StatsRequest,
    Welcome,
)
from graphgen.ipc.ggp.routing import Load
from graphgen.remote.address import ServerAddress
from graphgen.remote.requests import exception_of
from graphgen.requests.open_request import OpenRequest
from graphgen.requests.questions import Questions, fail_all
from graphgen.requests.request_table import RequestTable, deliver
from graphgen.router.engine_link import LinkPlace
from graphgen.router.lives import Lives
from graphgen.router.remote_messages import ready_of, report_of, stats_of
from graphgen.router.sent_requests import SentRequests

logger = logging.getLogger("graphgen")

ELSEWHERE = frozenset(("draining", "engine_lost", "no_session", "slow_consumer", "forbidden"))
"""Codes of errors that are no fault of a request: it goes on at another engine."""


class RemoteLink:
    """Has the calls of an `EngineLink`. Connects at once, and again whenever the connection has broken."""

    def __init__(
        self,
        server: ServerAddress,
        place: LinkPlace,
        admit: Callable[[Welcome], None],
        after_outputs: Callable[[], None] | None = None,
    ) -> None:
        """admit: raises ConfigError for a server that is none of these engines. after_outputs: see `Link`."""
        self.address = server.address
        self._place = place
        self._admit = admit
        self._after_outputs = after_outputs
        self._on_ready: Callable[[Ready], None] | None = None
        self._on_notice = place.on_notice or _log
        self._table = RequestTable(place.lock, place.observer, self._send_cancel)
        self._questions = Questions(place.lock)
        self._fault: GraphgenError | None = None
        self._first_ready: Future[Ready] = Future()
        self._lives = Lives(server, place.lock, self._take, self._end_life)
        # What follows belongs to the thread.
        self._ready: Ready | None = None  # what the engine said when it was admitted; None: it does not serve
        self._load: Load | None = None  # the newest
        self._welcome: Welcome | None = None  # the newest
        self._sent = SentRequests()
        self._probes: deque[int] = deque()
        self._newest_step = 0
        self._told_why = ""  # why it is away
        self._lives.start()

    # --- what callers ask --------------------------------------------------------------------------------------------

    def wait_ready(self, timeout_s: float) -> Ready:
        """Raises ConfigError for a server that cannot be one of the engines, ConnectionLostError after `timeout_s`."""
        try:
            return self._first_ready.result(max(0.0, timeout_s))
        except FutureTimeoutError:
            why = self._lives.why_not or "it does not answer: is it running, and is this frontend's key let in there?"
            raise ConnectionLostError(f"the engine {self.address} cannot be reached: {why}") from None

    def submit(self, requests: Iterable[OpenRequest]) -> None:
        opened = list(requests)
        with self._place.lock:
            self._raise_fault()
            for request in opened:
                self._table.open(request)
                self._lives.call(partial(self._send_request, request))

    def cancel(self, request_ids: Iterable[int]) -> None:
        with self._place.lock:
            for request_id in request_ids:
                self._table.cancel(request_id)

    def ask_stats(self, steps: bool = False) -> "Future[EngineStats]":
        with self._place.lock:
            self._raise_fault()
            answer = self._questions.add_stats()

        def send() -> None:
            self._lives.send(StatsRequest(metrics=True, live_after=self._newest_step if steps else None))

        self._lives.call(send)
        return answer

    def ask_probe(self) -> "Future[None]":
        with self._place.lock:
            self._raise_fault()
            probe, answer = self._questions.add_probe()

        def send() -> None:
            self._probes.append(probe.probe_id)
            self._lives.send(HealthRequest())

        self._lives.call(send)
        return answer

    def ask_report(self) -> None:
        """The engine reports without being asked."""

    def expect(self) -> None:
        self._lives.call(self._serve)

    def when_ready(self, call: Callable[[Ready], None]) -> None:
        self._on_ready = call

    def when_noticed(self, call: "Callable[[OperatorNotice], None]") -> None:
        self._on_notice = call

    def await_another_engine(self) -> list[OpenRequest]:
        error = EngineDeadError(f"the engine {self.address} has ended: try again")
        with self._place.lock:
            requests, unanswered = self._table.take_all(), self._questions.take_all()
        self._probes.clear()
        fail_all(unanswered, error)
        return requests

    def lose(self, take: Callable[[list[OpenRequest]], None]) -> None:
        def give_back() -> None:
            requests = self.await_another_engine()
            for request in requests:
                if (cancel := self._sent.cancel(request.submit.request_id)) is not None:
                    self._lives.send(cancel)
            take(requests)

        self._lives.call(give_back)

    def release(self, request_ids: Collection[int], take: Callable[[list[OpenRequest]], None]) -> None:
        self._lives.call(lambda: take(self._table.release(request_ids)))

    def open_requests(self) -> list[OpenRequest]:
        return self._table.snapshot()

    def begin_close(self) -> None:
        self._fail(EngineClosedError("the server ends: ask another"))

    def close(self) -> None:
        self.begin_close()
        self._lives.close()

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise type(self._fault)(*self._fault.args)

    def _fail(self, error: GraphgenError) -> None:
        """From now on every call raises `error`; the first fault stays."""
        with self._place.lock:
            if self._fault is not None:
                return
            self._fault = error
            requests, unanswered = self._table.take_all(), self._questions.take_all()
        for request in requests:
            deliver(request.sink, type(error)(*error.args))
        fail_all((self._first_ready, *unanswered), error)

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _end_life(self, why: str, error: GraphgenError | None) -> None:
        """The connection has ended, or none came about: what was open goes on elsewhere, once `lose` is called."""
        was_ready, self._ready, self._load = self._ready is not None, None, None
        self._sent.clear()
        if error is not None:
            fail_all((self._first_ready,), error)
        if not self._lives.is_closed and (was_ready or why != self._told_why):
            logger.warning("the engine %s is away: %s", self.address, why)
            self._place.on_away(why, isinstance(error, ConfigError))
        self._told_why = why

    # --- what the server says ----------------------------------------------------------------------------------------

    def _take(self, message: ServerMessage | FrameError) -> str | None:
        """Why the session ends with it, if it does."""
        match message:
            case Delta():
                self._take_deltas([message])
            case Deltas():
                self._take_deltas(message.items)
            case Load():
                self._load = message
                if self._ready is not None:
                    self._place.observer.reported(report_of(message, len(self._sent)))
            case Error():
                return self._take_error(message)
            case Ping():
                self._lives.send(Pong(t=message.t))
            case Stats():
                self._questions.take_stats(self._told(message))
            case Health():
                self._take_health(message)
            case Welcome():
                return self._take_welcome(message)
            case Draining():
                self._on_notice(OperatorNotice(f"{self.address} is about to end, within {message.grace_ms} ms"))
                self._place.observer.leaving()
            case Notice():
                self._on_notice(OperatorNotice(f"{self.address} says to those it serves: {message.text}"))
            case FrameError():
                return f"it sent what is no message ({message})"
            case Done():
                self._sent.end(message.id)
        return None

    def _take_welcome(self, welcome: Welcome) -> str | None:
        self._admit(welcome)
        if welcome.capacity is None:
            return "none of its engines serves at the moment"
        self._welcome = welcome
        self._newest_step = 0
        self._ready = ready_of(welcome.capacity, self.address)
        if not welcome.draining:
            self._serve()
        return None

    def _serve(self) -> None:
        """Its requests may come."""
        if self._ready is None:
            return
        if not self._first_ready.done():
            self._first_ready.set_result(self._ready)
        if self._on_ready is not None:
            self._on_ready(self._ready)

    def _take_deltas(self, deltas: list[Delta]) -> None:
        """What a step gave to some requests."""
        taken = self._sent.take(deltas)
        self._table.deliver_outputs(taken.outputs)
        for request, num_deaths in taken.deaths:
            request.hear_deaths(num_deaths)
        for request, what in taken.broken:  # tokens are missing: no server may do that
            self._send_cancel(request.submit.request_id)
            error = ServerError(f"{self.address} sent {what}: report this", "internal")
            self._table.refuse(request.submit.request_id, error)
        if self._after_outputs is not None:
            self._after_outputs()

    def _take_error(self, error: Error) -> str | None:
        if error.id is None:
            if error.code == "no_session":
                return "it has forgotten the session"
            if self._ready is None:
                raise ConfigError(f"the engine {self.address} refuses this frontend: {error.code}, {error.message}")
            logger.warning("%s: %s: %s", self.address, error.code, error.message)
            return None
        request = self._sent.end(error.id)
        if request is None:
            return None
        request_id = request.submit.request_id
        if error.code in ELSEWHERE:
            self._hold_back(error.code)
            self._place.observer.left(self._table.release([request_id]))
        else:
            self._table.refuse(request_id, exception_of(error))
        return None

    def _hold_back(self, code: str) -> None:
        """What the engine has given up must not come back to it at once."""
        if code == "draining":
            self._place.observer.leaving()
        elif self._load is not None:  # until it reports again
            paused = msgspec.structs.replace(self._load, serves=False)
            self._place.observer.reported(report_of(paused, len(self._sent)))

    def _take_health(self, health: Health) -> None:
        if self._probes:
            probe_id = self._probes.popleft()
            why = None if health.ready else EngineDeadError(f"the engine {self.address} is {health.status}")
            self._questions.end_probe(probe_id, why)

    def _told(self, stats: Stats) -> EngineStats:
        told = stats_of(stats)
        if told.recent_steps:
            self._newest_step = told.recent_steps[-1].step_id
        return told

    # --- what the server is told -------------------------------------------------------------------------------------

    def _send_request(self, request: OpenRequest) -> None:
        """Unless it was cancelled, or given back, before its turn came."""
        if self._ready is None or self._table.find(request.submit.request_id) is not request:
            return
        assert self._welcome is not None, "who is ready was welcomed"
        message = self._sent.open(request, frozenset(self._welcome.eos_token_ids))
        if (error := self._lives.send_request(message, self._welcome.limits)) is not None:
            self._sent.end(message.id)
            self._table.refuse(request.submit.request_id, error)

    def _send_cancel(self, request_id: int) -> None:
        def send() -> None:
            if (cancel := self._sent.cancel(request_id)) is not None:
                self._lives.send(cancel)

        self._lives.call(send)


def _log(notice: OperatorNotice) -> None:
    logger.warning("%s", notice.text)
