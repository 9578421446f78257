"""Who may talk, and how sessions begin, are looked after and end.

Owns the sessions' lives: the answer to `hello`, pings, the end of those whose connection or key is gone, or who do not
read. Knows nothing of what their other messages mean. Used on the server's loop.
"""

import logging
import secrets
import time
from typing import Protocol

import msgspec

from graphgen.ipc.ggp.codes import Code
from graphgen.ipc.ggp.framing import CHOSEN_ID, Framing, is_made_by_socket, make_error, unsupported_version
from graphgen.ipc.ggp.messages import (
    MAJOR,
    NAMES,
    ClientMessage,
    Draining,
    Error,
    Generate,
    Hello,
    Ping,
    ServerMessage,
    Welcome,
)
from graphgen.ipc.ggp.routing import Capacity, Load
from graphgen.server.frontend.authentication import Access
from graphgen.server.frontend.desk import Desk
from graphgen.server.frontend.outbox import Outbox
from graphgen.server.frontend.sessions import Session, Sessions
from graphgen.server.frontend.settings import FrontendSettings
from graphgen.server.frontend.sockets import TRUSTED, PublicSocket, Received, Sent

logger = logging.getLogger("graphgen.server.frontend")

AWAY_S = 1.0
"""A loop that comes round after more than this was stopped."""
SWEEP_S = 0.2
"""Between two looks for dead sessions when all are taken."""
RETRY_AFTER_MS = 1000
MAX_TRUSTED_REQUESTS = 1 << 16
"""Of a session that acts on behalf of tenants, whose own limits hold beside it."""
KEY_GONE = "this connection's key is not let in any more: ask the operator of the server"


class Engines(Protocol):
    """What a frontend that routes requests here is told of the engines."""

    def capacity(self) -> Capacity | None:
        """What they hold; None while none serves."""

    def load(self) -> Load | None:
        """What they have to do; None before they have said so."""


class Reception:
    """The sessions of the data socket."""

    def __init__(
        self,
        data: PublicSocket,
        framing: Framing[ServerMessage, ClientMessage],
        sessions: Sessions,
        desk: Desk,
        outbox: Outbox,
        settings: FrontendSettings,
        welcome: Welcome,
        access: Access,
        engines: Engines,
    ) -> None:
        """welcome: what every client is told, but for the name of its session. access: whether the CURVE key of a
        connection is still let in; asked for each message. engines: what frontends are told of them."""
        self._data = data
        self._framing = framing
        self._sessions = sessions
        self._desk = desk
        self._outbox = outbox
        self._settings = settings
        self._welcome = welcome
        self._access = access
        self._engines = engines
        self._swept_s = 0.0
        self._looped_s = time.monotonic()

    def refuse(self, received: Received) -> Error | None:
        """An error for a connection that may not say anything, whatever it says. Raises FrameError."""
        code: Code
        if not is_made_by_socket(received.routing_id):
            code, why = "bad_request", CHOSEN_ID
        elif not self._lets_in(received.key):
            code, why = "forbidden", KEY_GONE
        else:
            return None
        kind = self._framing.kind_of(received.frames)
        request_id = self._framing.find_brief(received.frames[1]).id if kind is Generate else None
        return make_error(code, why, request_id, NAMES[kind])

    def find(self, received: Received, now_s: float) -> Session | None:
        """The session of the message's connection, which was heard; unless the message has come by the routing id of a
        connection that is gone."""
        session = self._sessions.find(received.routing_id)
        if session is None:
            return None
        if session.key != received.key or session.is_gone:
            self.end(session)
            return None
        session.heard_s = now_s
        return session

    def open(self, received: Received, hello: Hello, grace_ms: int | None, now_s: float) -> Error | None:
        """A new session for the connection, in the place of its old one; an error if it gets none.

        grace_ms: how long the server still drains, None if it does not.
        """
        if not hello.versions[0] <= MAJOR <= hello.versions[1]:
            low, high = hello.versions
            return unsupported_version(f"the client speaks versions {low} to {high}", about="hello")
        old = self._sessions.find(received.routing_id)
        if old is not None:
            self.end(old)
        connection = self._data.connection_of(received)
        address = "" if connection is None else connection.address
        if self._sessions.refusal(received.key, address) is not None:
            self._make_room(now_s)
        if (why := self._sessions.refusal(received.key, address)) is not None:
            return make_error("overloaded", why, about="hello", retry_after_ms=RETRY_AFTER_MS)
        name = secrets.token_hex(16)
        is_trusted = self._data.is_trusted(received)
        may_route = is_trusted or self._access.may_route(received.key)
        routes = hello.routes and may_route and self._settings.elsewhere is None  # requests would go round
        session = Session(received.routing_id, name, received.key, now_s, connection, hello, is_trusted, routes)
        self._sessions.add(session)
        logger.info("session with %r; there are %d", hello.client, len(self._sessions))
        welcome = msgspec.structs.replace(self._welcome, session=session.name, draining=grace_ms is not None)
        if session.is_trusted:
            welcome = _for_trusted(welcome)
        if routes:
            features = [*welcome.features, "routed"]
            welcome = msgspec.structs.replace(welcome, features=features, capacity=self._engines.capacity())
        self._outbox.post(session, welcome)
        if grace_ms is not None:
            self._outbox.post(session, Draining(grace_ms=grace_ms))
        return None

    def end(self, session: Session) -> None:
        """Its requests end; their pages are free in the next step."""
        self._desk.end_session(session)
        self._outbox.forget(session)
        self._sessions.remove(session)

    def tick(self, now_s: float) -> None:
        """Looks after all sessions."""
        for session in self._sessions.all():
            if session.is_gone:
                self.end(session)
            elif not self._lets_in(session.key):
                self._cut_off(session, make_error("forbidden", KEY_GONE))
            elif session.requests:
                self._look_after(session, now_s)
        self._report_load()

    def _report_load(self) -> None:
        """To the frontends that route here. One that does not read is told when it does."""
        frontends = [one for one in self._sessions.all() if one.routes and not one.has_unsent]
        if frontends and (load := self._engines.load()) is not None:
            for session in frontends:
                self._outbox.post(session, load)

    def forgive_silence(self, now_s: float) -> None:
        """A loop that was stopped itself has not read what its clients said meanwhile. Called in each round."""
        if now_s - self._looped_s > AWAY_S:
            for session in self._sessions.all():
                session.heard_s = now_s
        self._looped_s = now_s

    def _look_after(self, session: Session, now_s: float) -> None:
        """One with open requests."""
        slow_s = self._settings.slow_consumer_s
        if session.blocked_s is not None and now_s - session.blocked_s > slow_s:
            text = f"no output was taken for {slow_s:g} s: read more often"
            self._cut_off(session, make_error("slow_consumer", text))
        elif now_s - session.heard_s > slow_s:
            text = f"nothing was heard from this client for {slow_s:g} s: answer pings"
            self._cut_off(session, make_error("slow_consumer", text))
        elif session.blocked_s is None and now_s - session.pinged_s >= self._settings.heartbeat_s:
            session.pinged_s = now_s
            self._outbox.post(session, Ping(instance=self._welcome.instance))

    def _lets_in(self, key: str) -> bool:
        return key == TRUSTED or self._access.admits(key)

    def _make_room(self, now_s: float) -> None:
        """Before a session is refused, those are ended whose connections are gone: first those that are known to be,
        then, now and then, all are asked. One without requests is not asked before that: it owes nobody anything, and
        pings would fill the queue of a client that does not read."""
        for session in self._sessions.all():
            if session.is_gone:
                self.end(session)
        if now_s - self._swept_s < SWEEP_S:
            return
        self._swept_s = now_s
        ping = self._framing.encode(Ping(instance=self._welcome.instance))
        for session in self._sessions.all():
            if not session.requests and self._data.send(session.routing_id, *ping) is Sent.GONE:
                self.end(session)

    def _cut_off(self, session: Session, error: Error) -> None:
        """A reader that is gone for all we know, or may not read any more. What it has not taken is given up, so that
        its memory is free; a reader that does not read its errors does not get them."""
        logger.warning("session cut off with %d requests: %s", len(session.requests), error.message)
        request_ids = list(session.requests)
        self.end(session)
        for request_id in request_ids:
            ended = self._framing.encode(msgspec.structs.replace(error, id=request_id))
            self._data.send(session.routing_id, *ended)


def _for_trusted(welcome: Welcome) -> Welcome:
    """Each tenant has the share of a client, and there may be many."""
    limits = msgspec.structs.replace(welcome.limits, open_requests=MAX_TRUSTED_REQUESTS)
    return msgspec.structs.replace(welcome, limits=limits, features=[*welcome.features, "tenants", "statistics"])
