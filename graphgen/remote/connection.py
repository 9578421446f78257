"""The connection of a Python client: one thread that owns the socket, and the requests that are open.

Owns the session: its hello, its pings, its loss, and that a request which never reached a session is sent in the next
one. Any thread may call it. Made by `graphgen.remote.core`.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

import zmq

from graphgen.base.inbox import Inbox
from graphgen.base.owner import Owner
from graphgen.base.version import __version__
from graphgen.calls.outputs import Delivery, Sink
from graphgen.ipc.errors import ConnectionLostError, EngineClosedError, GraphgenError
from graphgen.ipc.ggp.framing import FrameError
from graphgen.ipc.ggp.messages import (
    Accepted,
    Bye,
    Cancel,
    ClientMessage,
    Delta,
    Deltas,
    Done,
    Draining,
    Error,
    Health,
    HealthRequest,
    Hello,
    Notice,
    Ping,
    Pong,
    Report,
    ServerMessage,
    Stats,
    StatsRequest,
    Welcome,
)
from graphgen.ipc.ggp.routing import Load
from graphgen.remote.address import ServerAddress
from graphgen.remote.data_socket import DataSocket
from graphgen.remote.requests import PromptRequest, RemoteRequest, exception_of

logger = logging.getLogger("graphgen")

Answer = TypeVar("Answer", Stats, Health)
AnyRequest = RemoteRequest | PromptRequest

HELLO = Hello(client=f"graphgen-python/{__version__}", notices=True, batches=True)
TICK_S = 0.5
SILENT_HEARTBEATS = 3
"""A server that has said nothing for so many heartbeats is asked whether it lives."""
LOST_S = 10.0
"""A server that has said nothing for so long, while requests are open, is given up."""
HELLO_AGAIN_S = 1.0
"""After so long without a welcome a hello is repeated: it may have gone with the connection that it was sent on."""
AWAY_S = 1.0
"""A loop that comes round after more than this was stopped itself: what the server said meanwhile is still unread."""
ANSWER_TIMEOUT_S = 10.0
LINGER_S = 0.2


class Connection:
    """One session with one server. The constructor returns when the server has welcomed it."""

    def __init__(self, server: ServerAddress) -> None:
        self._owner = Owner("the client")
        self._server = server
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        begun_s = time.monotonic()
        try:
            self._data = DataSocket(server.connect(self._context))
        except BaseException:
            self._context.term()
            raise
        self._inbox = Inbox()
        self._lock = threading.Lock()  # guards `_closed` against calls that come while it closes
        self._closed = False
        # What follows belongs to the thread.
        self._requests: dict[int, AnyRequest] = {}
        self._unsent: deque[AnyRequest] = deque()  # beyond the server's limit of open requests
        self._stats: list[tuple[StatsRequest, Future[Stats]]] = []
        self._health: list[Future[Health]] = []
        self._helloing = True  # until the server's welcome: there is no session
        self._hello_s = self._heard_s = time.monotonic()
        self._first_welcome: Future[Welcome] = Future()
        self._welcome: Welcome | None = None
        self._send(HELLO)
        self._thread = threading.Thread(target=self._run, name="graphgen-connection", daemon=True)
        self._thread.start()
        try:
            left_s = server.connect_timeout_s - (time.monotonic() - begun_s)
            self.welcome = self._first_welcome.result(max(0.0, left_s))
        except FutureTimeoutError:
            self.close()
            raise ConnectionLostError(
                f"{server.address} did not answer for {server.connect_timeout_s:g} s: is the server running, and is"
                " this client's key let in?"
            ) from None
        except BaseException:
            self.close()
            raise

    def check_process(self) -> None:
        """Raises EngineDeadError in a fork of the program: the connection's thread is the parent's."""
        self._owner.check()

    def submit(self, requests: Sequence[AnyRequest]) -> None:
        """Sends the requests, as many at a time as the server allows."""
        self._call(lambda: self._submit(requests))

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Ends requests without a word to their sinks. Ids that are not open any more are ignored. Does nothing in a
        fork: the requests are its parent's."""
        if not self._owner.is_this:
            return
        with contextlib.suppress(EngineClosedError):
            self._call(lambda: self._cancel(request_ids))

    def stats(self, question: StatsRequest) -> Stats:
        return self._ask(question, lambda answer: self._stats.append((question, answer)))

    def health(self) -> Health:
        return self._ask(HealthRequest(), self._health.append)

    def report(self, report: Report) -> None:
        """What a gateway has answered: where the server trusts this connection."""
        self._call(lambda: self._send(report))

    def close(self) -> None:
        """Says bye; open requests get EngineClosedError. Idempotent; a fork leaves its parent's connection alone."""
        if not self._owner.is_this:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._inbox.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _call(self, work: Callable[[], None]) -> None:
        """Has the thread do it. Raises EngineClosedError when the connection is closed, EngineDeadError in a fork."""
        self.check_process()
        with self._lock:
            if self._closed:
                raise EngineClosedError("the client was closed: make a new one")
            self._inbox.put(work)
            self._inbox.wake()

    def _ask(self, question: ClientMessage, wait: Callable[[Future[Answer]], None]) -> Answer:
        """wait: keeps what is to be answered, on the thread."""
        answer: Future[Answer] = Future()

        def send() -> None:
            self._begin_to_wait()
            wait(answer)
            if not self._helloing:
                self._send(question)

        self._call(send)
        try:
            return answer.result(ANSWER_TIMEOUT_S)
        except FutureTimeoutError:
            raise ConnectionLostError(
                f"{self._server.address} did not answer for {ANSWER_TIMEOUT_S:g} s: is it running?"
            ) from None

    # --- on the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox.fileno(), zmq.POLLIN)
        poller.register(self._data.socket, zmq.POLLIN)
        looped_s = time.monotonic()
        tick_s = looped_s + TICK_S
        try:
            while not self._closed:
                events = dict(poller.poll(int(TICK_S * 1000)))
                self._inbox.run(readable=self._inbox.fileno() in events)
                if self._data.socket in events:
                    self._receive()
                self._data.flush()
                now_s = time.monotonic()
                if now_s - looped_s > AWAY_S:
                    self._heard_s = now_s
                looped_s = now_s
                if now_s >= tick_s:
                    tick_s = now_s + TICK_S
                    self._watch(now_s)
            self._fail_all(EngineClosedError("the client was closed: make a new one"))
            self._send(Bye())
        except Exception as error:
            logger.exception("graphgen's connection thread failed")
            self._fail_all(ConnectionLostError(f"the connection failed with {type(error).__name__}: {error}"))
        finally:
            with self._lock:
                self._closed = True
            self._data.close(LINGER_S)
            self._inbox.close()
            self._context.term()

    def _receive(self) -> None:
        """All that has arrived."""
        while (message := self._data.receive()) is not None:
            if not self._helloing:  # else a welcome is all that helps
                self._heard_s = time.monotonic()
            if isinstance(message, FrameError):
                self._leave_session(message)
            else:
                self._take(message)

    def _take(self, message: ServerMessage) -> None:
        match message:
            case Delta():
                self._take_delta(message)
            case Deltas():
                for delta in message.items:
                    self._take_delta(delta)
            case Accepted():
                if (request := self._requests.get(message.id)) is not None:
                    request.accept(message)
            case Done():
                if (request := self._requests.pop(message.id, None)) is not None:
                    _deliver_all(request.sink, request.take_done(message))
                self._send_more()
            case Error():
                self._take_error(message)
            case Ping():
                self._send(Pong(t=message.t))
            case Stats():
                self._take_stats(message)
            case Health():
                _answer_all(self._health, message)
            case Welcome():
                self._take_welcome(message)
            case Draining():
                logger.warning("%s is about to end, within %d ms", self._server.address, message.grace_ms)
            case Notice():
                logger.info("%s: %s", self._server.address, message.text)
            case Pong() | Load():
                pass

    def _take_stats(self, stats: Stats) -> None:
        """Answers those who asked for no more than it has."""
        waiting, self._stats = self._stats, []
        for question, answer in waiting:
            lacks_metrics = question.metrics and stats.metrics is None
            if lacks_metrics or (question.live_after is not None and stats.live is None):
                self._stats.append((question, answer))
            else:
                answer.set_result(stats)

    def _take_delta(self, delta: Delta) -> None:
        request = self._requests.get(delta.id)
        if request is None:  # cancelled while it was on its way
            return
        try:
            delivery = request.take_delta(delta)
        except GraphgenError as error:
            self._cancel([delta.id])
            _deliver(request.sink, error)
            return
        if delivery is not None and not _deliver(request.sink, delivery):
            self._cancel([delta.id])

    def _take_error(self, error: Error) -> None:
        if error.code == "no_session":
            if not self._helloing:
                self._renew_session()
            return
        if error.id is None:
            logger.warning("%s: %s: %s", self._server.address, error.code, error.message)
            if self._welcome is None:
                _set_exception(self._first_welcome, exception_of(error))
            return
        request = self._requests.pop(error.id, None)
        if request is not None:
            _deliver_all(request.sink, request.take_failure(exception_of(error)))
        self._send_more()

    def _take_welcome(self, welcome: Welcome) -> None:
        self._helloing = False
        self._heard_s = time.monotonic()
        self._welcome = welcome
        if not self._first_welcome.done():
            self._first_welcome.set_result(welcome)
        for question, _ in self._stats:
            self._send(question)
        if self._health:
            self._send(HealthRequest())
        self._send_more()

    def _renew_session(self) -> None:
        """The server does not know us: it is another, or the connection broke. What it had accepted is lost; what had
        not got so far is sent in the new session, within the limits of its server. Until the welcome, what the server
        refuses is of the old session."""
        self._helloing = True
        self._hello()
        requests, self._requests = self._requests, {}
        self._unsent.extendleft(request for request in reversed(requests.values()) if not request.accepted)
        for request in requests.values():
            if request.accepted:
                lost = ConnectionLostError(f"{self._server.address} lost the session: ask again")
                _deliver_all(request.sink, request.take_failure(lost))

    def _hello(self) -> None:
        self._hello_s = time.monotonic()
        self._send(HELLO)

    def _leave_session(self, error: FrameError) -> None:
        """A message that cannot be read may have held tokens of any request. The next one finds no session, and says
        hello anew."""
        self._send(Bye())
        self._helloing = False
        self._fail_all(ConnectionLostError(f"{self._server.address} sent what is no message ({error}): report this"))

    def _submit(self, requests: Sequence[AnyRequest]) -> None:
        self._begin_to_wait()
        self._unsent.extend(requests)
        self._send_more()

    def _send_more(self) -> None:
        """What the server takes beside what is open. What is too large for it has its error now."""
        if self._helloing or self._welcome is None:
            return
        limits = self._welcome.limits
        while self._unsent and len(self._requests) < limits.open_requests:
            request = self._unsent.popleft()
            error = self._data.send_request(request.message, limits)
            if error is None:
                self._requests[request.message.id] = request
            else:
                _deliver_all(request.sink, request.take_failure(error))

    def _cancel(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self._send(Cancel(id=request_id))
            else:
                self._unsent = deque(one for one in self._unsent if one.message.id != request_id)
        self._send_more()

    def _begin_to_wait(self) -> None:
        """Before anything more is waited for: where nothing was, nobody had a reason to speak."""
        if not self._is_waiting:
            self._heard_s = time.monotonic()

    @property
    def _is_waiting(self) -> bool:
        """For anything that the server would have to say."""
        return bool(self._requests or (self._helloing and (self._unsent or self._stats or self._health)))

    def _watch(self, now_s: float) -> None:
        if self._welcome is None or not self._is_waiting:
            return
        silent_s = now_s - self._heard_s
        if silent_s > LOST_S:
            for request_id in self._requests:
                self._send(Cancel(id=request_id))
            what = "gives no session" if self._helloing else "has said nothing"
            self._fail_all(ConnectionLostError(f"{self._server.address} {what} for {LOST_S:g} s: ask again"))
        elif self._helloing:
            if now_s - self._hello_s > HELLO_AGAIN_S:
                self._hello()
        elif silent_s > SILENT_HEARTBEATS * self._welcome.heartbeat_ms / 1000:
            self._send(Ping())

    def _fail_all(self, error: GraphgenError) -> None:
        requests = [*self._requests.values(), *self._unsent]
        self._requests, self._unsent = {}, deque()
        for request in requests:
            _deliver_all(request.sink, request.take_failure(type(error)(*error.args)))
        futures: tuple[Future[Welcome] | Future[Stats] | Future[Health], ...] = (
            self._first_welcome,
            *(answer for _, answer in self._stats),
            *self._health,
        )
        for future in futures:
            _set_exception(future, type(error)(*error.args))
        self._stats.clear()
        self._health.clear()

    def _send(self, message: ClientMessage) -> None:
        self._data.send(message)


def _deliver(sink: Sink, delivery: Delivery) -> bool:
    """Whether the reader still exists: an event loop may have been closed under a stream."""
    try:
        sink(delivery)
    except RuntimeError:
        return False
    return True


def _deliver_all(sink: Sink, deliveries: Sequence[Delivery]) -> None:
    for delivery in deliveries:
        _deliver(sink, delivery)


def _answer_all(waiting: list[Future[Answer]], answer: Answer) -> None:
    for future in waiting:
        future.set_result(answer)
    waiting.clear()


def _set_exception(future: "Future[Welcome] | Future[Stats] | Future[Health]", error: GraphgenError) -> None:
    with contextlib.suppress(InvalidStateError):  # already answered
        future.set_exception(error)
