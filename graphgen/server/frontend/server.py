"""The server's loop: what clients send in, what their requests give out.

Owns the public sockets and the decision whose message is next; one thread. It never waits for a client, nor for a
tokenizer: what takes long is done by other threads, which leave their results in its inbox. Made by
`graphgen.server.frontend.process`.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import zmq

from graphgen.base.inbox import Inbox
from graphgen.ipc.channel import Channel
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.ggp.framing import (
    FrameError,
    Framing,
    make_error,
)
from graphgen.ipc.ggp.messages import (
    CLIENT_KINDS,
    NAMES,
    Bye,
    Cancel,
    ClientMessage,
    Draining,
    Error,
    Generate,
    HealthRequest,
    Hello,
    Notice,
    Ping,
    Pong,
    Report,
    ServerMessage,
    StatsRequest,
)
from graphgen.ipc.server_messages import (
    AddEngine,
    Drain,
    DrainEngine,
    EngineAway,
    EngineDrained,
    EngineLost,
    EngineServes,
    ExpectEngine,
    FrontendToSupervisor,
    RemoveEngine,
    SupervisorToFrontend,
)
from graphgen.server.frontend.desk import Desk
from graphgen.server.frontend.elsewhere import Elsewhere
from graphgen.server.frontend.monitor import Monitor
from graphgen.server.frontend.outbox import Outbox
from graphgen.server.frontend.reception import Reception
from graphgen.server.frontend.sessions import Session, Sessions
from graphgen.server.frontend.sockets import PublicSocket, Received
from graphgen.server.frontend.turns import RateLimit

logger = logging.getLogger("graphgen.server.frontend")

TICK_S = 0.1
"""How often sessions are looked after: pings, slow readers, deadlines."""
MESSAGES_AT_ONCE = 16
"""Received before the tokens that came meanwhile are sent."""
MESSAGES_PER_S = 4000.0
"""Received from all clients together, after a burst. A flood waits in its own connection and leaves the processor to
others' tokens: a message costs some 20 us, so that all of them together cost a tenth of a core."""
MESSAGES_BURST = 1000
PERMIT_BYTES = 16 << 10
"""A message of so many bytes counts as two, one of twice as many as three."""
HELLO_PERMITS = 9
"""A hello counts as so many messages more: it ends a session and makes one."""
_HELLO = next(letter for letter, kind in CLIENT_KINDS.items() if kind is Hello)
SMALL_BYTES = 64 << 10
"""What is decoded in the loop at once, in a tenth of a millisecond."""
FLUSH_S = 1.0
"""For last messages to leave when the frontend ends."""

RESTART_MS = 5000
"""When to try again after the engine has ended: about as long as a start with warm caches takes."""

NO_SESSION = "this connection has no session: say hello first, also after a reconnection"


SupervisorChannel = Channel[FrontendToSupervisor, SupervisorToFrontend]


class PublicSockets(NamedTuple):
    data: PublicSocket
    control: PublicSocket


class _Ending(NamedTuple):
    """The server drains: what is open when the time comes ends with the error."""

    deadline_s: float
    error: Error


@contextlib.contextmanager
def _survived(what: str) -> Iterator[None]:
    """What fails for one message, request or session, for want of memory or descriptors too, never ends the loop."""
    try:
        yield
    except Exception:
        logger.exception("handling %s failed; the server goes on", what)


class Server:
    """Serves clients until it has drained."""

    def __init__(
        self,
        sockets: PublicSockets,
        supervisor: SupervisorChannel,
        framing: Framing[ServerMessage, ClientMessage],
        inbox: Inbox,
        sessions: Sessions,
        desk: Desk,
        outbox: Outbox,
        monitor: Monitor,
        reception: Reception,
        instance: str,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """instance: the name of this run of the frontend. elsewhere: the engines, if they are."""
        self._sockets = sockets
        self._supervisor = supervisor
        self._framing = framing
        self._inbox = inbox
        self._sessions = sessions
        self._desk = desk
        self._outbox = outbox
        self._monitor = monitor
        self._reception = reception
        self._instance = instance
        self._elsewhere = elsewhere
        self._rate = RateLimit(MESSAGES_PER_S, MESSAGES_BURST, time.monotonic())
        self._ending: _Ending | None = None
        self._num_lost = 0

    def run(self, orders: Iterable[SupervisorToFrontend] = ()) -> int:
        """Returns when the server has drained: how many requests it did not finish. orders: which the supervisor gave
        before."""
        for order in orders:
            self._obey(order, time.monotonic())
        inner = zmq.Poller()  # without the public sockets: while too many messages come
        inner.register(self._inbox.fileno(), zmq.POLLIN)
        inner.register(self._supervisor.receiver, zmq.POLLIN)
        poller = zmq.Poller()
        for socket in (self._inbox.fileno(), self._supervisor.receiver, *(public.socket for public in self._sockets)):
            poller.register(socket, zmq.POLLIN)
        tick_s = 0.0
        permits = 0
        while not self._has_drained():
            events = dict((poller if permits else inner).poll(self._timeout_ms(permits)))
            with _survived("calls of other threads"):
                self._run_inbox(readable=self._inbox.fileno() in events)
            now_s = time.monotonic()
            self._reception.forgive_silence(now_s)
            for order in self._supervisor.drain():
                self._obey(order, now_s)
            with _survived("messages"):
                permits = self._receive(now_s)
            with _survived("held requests"):
                self._desk.release()
            with _survived("unsent messages"):
                for session in self._outbox.flush(now_s):
                    self._reception.end(session)
            if now_s >= tick_s:
                tick_s = now_s + TICK_S
                with _survived("sessions"):
                    self._desk.tick(now_s)
                    self._monitor.tick(now_s)
                    self._reception.tick(now_s)
        return self._num_lost

    def _run_inbox(self, readable: bool) -> None:
        """What a call that failed left behind is made in the next round, at once."""
        try:
            self._inbox.run(readable)
        except BaseException:
            self._inbox.wake()
            raise

    def close(self) -> None:
        """Ends the threads that prepare requests. The sockets are their maker's."""
        self._desk.close()

    def _timeout_ms(self, permits: int) -> int:
        if not permits:
            return 1
        return 20 if self._outbox.has_unsent else int(TICK_S * 1000)

    def _has_drained(self) -> bool:
        if self._ending is None:
            return False
        now_s = time.monotonic()
        if now_s >= self._ending.deadline_s and self._desk.num_open:
            self._num_lost += self._desk.fail_all(self._ending.error)
        flushed = not self._outbox.has_unsent or now_s >= self._ending.deadline_s + FLUSH_S
        return not self._desk.num_open and flushed

    def _obey(self, order: SupervisorToFrontend, now_s: float) -> None:
        match order:
            case Drain():
                self._monitor.draining = True
                error = make_error("draining", "the server ends before the output was complete: ask another")
                self._ending = _Ending(now_s + order.grace_s, error)
                for session in self._sessions.all():
                    self._outbox.post(session, Draining(grace_ms=round(order.grace_s * 1000)))
            case EngineLost(restarts=False, is_last=True):
                self.notify(f"{order.message}; the server ends")
                self._monitor.draining = True
                self._ending = _Ending(now_s, make_error("engine_lost", order.message))
            case EngineLost():
                self._lose_engine(order)
            case DrainEngine():
                self._drain_engine(order)
            case ExpectEngine():
                self._desk.links.expect(order.engine)
            case AddEngine():
                if self._elsewhere is not None:
                    self._elsewhere.add(order.engine, order.address)
            case RemoveEngine():
                if self._elsewhere is not None:
                    self._elsewhere.remove(order.engine)

    def _lose_engine(self, lost: EngineLost) -> None:
        num_open = self._desk.num_open
        error = make_error("engine_lost", lost.message, retry_after_ms=RESTART_MS)
        go_on = self._desk.lose_engine(lost.engine, None if lost.restarts else lost.message, error)
        logger.error("%s; %d requests were open", lost.message, num_open)
        self._monitor.engine_is_lost = not self._desk.links.num_serving
        then = "it is started again" if lost.restarts else "it stays so"
        self.notify(f"{lost.message}; {then}, and open requests {'go on' if go_on else 'ended with engine_lost'}")

    def _drain_engine(self, order: DrainEngine) -> None:
        """Of an order that comes twice the first one is answered."""
        if self._desk.links.is_draining(order.engine):
            return
        try:
            self._desk.links.drain(
                order.engine, order.grace_s, lambda number: self._supervisor.send(EngineDrained(number))
            )
        except GraphgenError as error:  # another one ended at this moment
            self._supervisor.send(EngineDrained(order.engine, str(error)))

    def engine_serves(self, number: int) -> None:
        """An engine has taken the place of one that ended. On the loop."""
        self._monitor.engine_is_lost = False
        self._supervisor.send(EngineServes(number))
        self.notify("the engine serves again")

    def engine_is_away(self, number: int, reason: str, is_refused: bool) -> None:
        """An engine elsewhere has ended, or cannot be reached; it is tried again. On the loop."""
        self._supervisor.send(EngineAway(number, reason, is_refused))
        self._monitor.engine_is_lost = not self._desk.links.num_serving
        self.notify(f"engine {number} is away: {reason}")

    def notify(self, text: str) -> None:
        """Tells the sessions that asked for it. On the loop."""
        for session in self._sessions.all():
            if session.wants_notices:
                self._outbox.post(session, Notice(text=text))

    # --- messages in -------------------------------------------------------------------------------------------

    def _receive(self, now_s: float) -> int:
        """Takes some messages that have arrived; 0 when no more may be taken now."""
        permits = self._rate.take(MESSAGES_AT_ONCE, now_s)
        left = permits
        for public in self._sockets:
            while left > 0 and (received := public.receive()) is not None:
                left -= 1 + sum(map(len, received.frames)) // PERMIT_BYTES
                if received.frames and received.frames[0][3:] == _HELLO:
                    left -= HELLO_PERMITS
                self._take(public, received, now_s)
        self._rate.spend(-left)
        return permits

    def _take(self, public: PublicSocket, received: Received, now_s: float) -> None:
        try:
            refusal = self._reception.refuse(received)
            if refusal is None:
                session = self._reception.find(received, now_s) if public is self._sockets.data else None
                refusal = self._take_from(public, session, received, now_s)
        except FrameError as error:
            refusal = error.error
        except Exception as error:  # whatever one message does to us, the next one finds us here
            logger.exception("a message could not be handled")
            refusal = make_error("internal", f"the server failed with {type(error).__name__}")
        if refusal is not None:
            self._monitor.messages_refused += 1
            self._answer(public, received.routing_id, refusal)

    def _take_from(
        self, public: PublicSocket, session: Session | None, received: Received, now_s: float
    ) -> Error | None:
        if self._framing.kind_of(received.frames) is Generate:
            return self._take_generate(public, session, received, now_s)
        message = self._framing.decode(received.frames)
        if public is self._sockets.control:
            return self._take_control(received, message, now_s)
        if session is None or isinstance(message, Hello):
            return self._take_stranger(received, message, now_s)
        return self._take_message(session, message, now_s)

    def _take_generate(
        self, public: PublicSocket, session: Session | None, received: Received, now_s: float
    ) -> Error | None:
        """A request is decoded by the threads that tokenize; only its id is read here."""
        header, body = received.frames
        brief = self._framing.find_brief(body)
        request_id = brief.id
        if public is self._sockets.control:
            return make_error("bad_request", "generate belongs on the data socket: send it there", about="generate")
        if session is None:
            return make_error("no_session", NO_SESSION, request_id, "generate")
        if request_id is None:
            if len(body) <= SMALL_BYTES:
                self._framing.decode(received.frames)  # says what is wrong
            return make_error("bad_request", "id is missing or no int of 0 to 2^53-1: give one", about="generate")
        if brief.tenant and not session.is_trusted:
            text = "this connection acts for itself alone: leave tenant out"
            return make_error("forbidden", text, request_id, "generate")
        if self._ending is not None:
            return make_error("draining", "the server is about to end: ask another", request_id, "generate")
        if self._monitor.engine_is_lost:
            text = "the engine ended and is being started again: try again soon"
            return make_error("engine_lost", text, request_id, "generate", RESTART_MS)
        return self._desk.open(session, brief, (header, body), now_s)

    def _take_stranger(self, received: Received, message: ClientMessage, now_s: float) -> Error | None:
        """A message of a connection without a session, or one that wants a new one."""
        if not isinstance(message, Hello):
            return make_error("no_session", NO_SESSION, about=NAMES[type(message)])
        ending = self._ending
        grace_ms = None if ending is None else round(max(0.0, ending.deadline_s - now_s) * 1000)
        return self._reception.open(received, message, grace_ms, now_s)

    def _take_message(self, session: Session, message: ClientMessage, now_s: float) -> Error | None:
        match message:
            case Cancel():
                if message.session not in ("", session.name):
                    return make_error("forbidden", "the session is not this connection's", about="cancel")
                self._desk.cancel(session, message.id)
            case Ping():
                self._outbox.post(session, self._pong(message))
            case StatsRequest():
                question = message if session.is_trusted else StatsRequest()
                self._monitor.stats(question, lambda stats: self._reply(session, stats), now_s)
            case Report():
                if session.is_trusted:
                    self._desk.tallies.answered(message.http_answers)
            case HealthRequest():
                self._monitor.health(lambda health: self._reply(session, health), now_s)
            case Bye():
                self._reception.end(session)
            case _:  # a pong: it was heard
                pass
        return None

    def _take_control(self, received: Received, message: ClientMessage, now_s: float) -> Error | None:
        peer = received.routing_id
        match message:
            case Cancel():
                session = self._sessions.find_by_name(message.session)
                if session is None:
                    return make_error("no_session", "there is no such session", about="cancel")
                if session.key != received.key:
                    return make_error("forbidden", "the session is another client's", about="cancel")
                self._desk.cancel(session, message.id)
            case Ping():
                self._answer(self._sockets.control, peer, self._pong(message))
            case StatsRequest():
                answer = partial(self._answer, self._sockets.control, peer)
                self._monitor.stats(StatsRequest(), answer, now_s)
            case HealthRequest():
                self._monitor.health(lambda health: self._answer(self._sockets.control, peer, health), now_s)
            case Pong() | Bye():
                pass
            case _:
                name = NAMES[type(message)]
                return make_error("bad_request", f"{name} belongs on the data socket: send it there", about=name)
        return None

    # --- answers -----------------------------------------------------------------------------------------------

    def _pong(self, ping: Ping) -> Pong:
        return Pong(t=ping.t, instance=self._instance)

    def _reply(self, session: Session, message: ServerMessage) -> None:
        if self._sessions.find(session.routing_id) is session:  # it may have ended before the answer came
            self._outbox.post(session, message)

    def _answer(self, public: PublicSocket, routing_id: bytes, message: ServerMessage) -> None:
        """To a peer without a session: one that does not read its answers does not get them."""
        session = self._sessions.find(routing_id) if public is self._sockets.data else None
        if session is not None:
            self._outbox.post(session, message)
        else:
            public.send(routing_id, *self._framing.encode(message))
