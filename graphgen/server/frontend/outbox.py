"""What leaves on the data socket: the order of a session's messages, and readers that do not read.

Owns the only sends to sessions. Nothing is lost and nobody is waited for: what a reader has no room for stays in its
session, where a request's tokens join, until the reader takes messages again. Used on the server's loop.
"""

from graphgen.ipc.ggp.framing import Framing
from graphgen.ipc.ggp.messages import Accepted, ClientMessage, Delta, Deltas, ServerMessage
from graphgen.server.frontend.requests import PublicRequest
from graphgen.server.frontend.sessions import Session
from graphgen.server.frontend.sockets import PublicSocket, Sent

RETRY_S = 0.02
"""How often a reader that takes nothing is tried again."""
BATCH_TOKENS = 4096
"""A batch ends with the delta that makes it so many: a reader that falls behind gets no message without end."""


class Outbox:
    """Sends what sessions have to say."""

    def __init__(self, data: PublicSocket, framing: Framing[ServerMessage, ClientMessage]) -> None:
        self._data = data
        self._framing = framing
        self._waiting: dict[Session, None] = {}  # those with something to send, in this order
        self._gone: list[Session] = []
        self.deltas_sent = 0
        self.deltas_merged = 0

    @property
    def has_unsent(self) -> bool:
        return bool(self._waiting)

    def post(self, session: Session, message: ServerMessage) -> None:
        """Queues a message that is about no request of the session's."""
        session.backlog.append(message)
        self._waiting[session] = None

    def add_news(self, request: PublicRequest) -> None:
        """The request may have something to say."""
        request.session.news[request] = None
        self._waiting[request.session] = None

    def forget(self, session: Session) -> None:
        """The session has ended."""
        self._waiting.pop(session, None)

    def flush(self, now_s: float) -> list[Session]:
        """Sends what can be sent; returns the sessions whose connection turned out to be gone."""
        for session in list(self._waiting):
            if session.blocked_s is None or now_s >= session.retry_s:
                self._flush(session, now_s)
        gone, self._gone = self._gone, []
        return gone

    def _flush(self, session: Session, now_s: float) -> None:
        while session.backlog:
            if not self._send(session, session.backlog[0], now_s):
                return
            session.backlog.popleft()
        if session.takes_batches and not self._send_batches(session, now_s):
            return
        for request in list(session.news):
            while (message := request.peek()) is not None:
                if not self._send(session, message, now_s):
                    return
                request.sent(message)
                self.deltas_sent += isinstance(message, Delta)
            del session.news[request]
            if request.ended:
                self.deltas_merged += request.num_merged
                del session.requests[request.id]
        del self._waiting[session]

    def _send_batches(self, session: Session, now_s: float) -> bool:
        """All that its requests have but their ends, in few messages; False when its reader takes no more."""
        batch: list[tuple[PublicRequest, Delta]] = []
        num_tokens = 0
        for request in session.news:
            if isinstance(accepted := request.peek(), Accepted):
                if not self._send(session, accepted, now_s):
                    return False
                request.sent(accepted)
            for delta in request.deltas():
                batch.append((request, delta))
                num_tokens += len(delta.ids)
            if num_tokens >= BATCH_TOKENS:
                if not self._send_batch(session, batch, now_s):
                    return False
                batch, num_tokens = [], 0
        return self._send_batch(session, batch, now_s)

    def _send_batch(self, session: Session, batch: list[tuple[PublicRequest, Delta]], now_s: float) -> bool:
        if len(batch) < 2:  # is sent as what it is
            return True
        if not self._send(session, Deltas(items=[delta for _, delta in batch]), now_s):
            return False
        for request, delta in batch:
            request.sent(delta)
        self.deltas_sent += len(batch)
        return True

    def _send(self, session: Session, message: ServerMessage, now_s: float) -> bool:
        match self._data.send(session.routing_id, *self._framing.encode(message), session.connection):
            case Sent.SENT:
                session.blocked_s = None
                return True
            case Sent.BLOCKED:
                if session.blocked_s is None:
                    session.blocked_s = now_s
                session.retry_s = now_s + RETRY_S
            case Sent.GONE:
                self._gone.append(session)
        return False
