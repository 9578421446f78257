"""The sessions of a frontend: one for each data connection that said hello.

Owns what is known of a connection: who it is, when it was heard, what waits to be sent to it. Never touches a socket.
"""

from collections import Counter, deque
from typing import NamedTuple

from graphgen.ipc.ggp.messages import Hello, ServerMessage
from graphgen.server.frontend.gate import Connection
from graphgen.server.frontend.requests import PublicRequest

HELLO = Hello()
MAX_BACKLOG = 256
"""Messages about no request that wait for a reader; of a reader that is so far behind, more are dropped."""


class Session:
    """One data connection after its hello."""

    def __init__(
        self,
        routing_id: bytes,
        name: str,
        key: str,
        now_s: float,
        connection: Connection | None = None,
        hello: Hello = HELLO,
        is_trusted: bool = False,
        routes: bool = False,
    ) -> None:
        """key: the CURVE key that its connection authenticated with; "" without keys. is_trusted: it may act on behalf
        of tenants that it names. routes: it is of a frontend that routes requests of others here."""
        self.wants_notices = hello.notices
        self.takes_batches = hello.batches
        self.is_trusted = is_trusted or routes
        self.routes = routes
        self.routing_id = routing_id
        self.connection = connection
        self.name = name  # secret: who knows it may cancel its requests
        self.key = key
        self.address = "" if connection is None else connection.address
        self.client = key or f"session {name}"  # whose share its requests count to
        self.heard_s = now_s
        self.pinged_s = now_s
        self.blocked_s: float | None = None  # since when it takes nothing
        self.retry_s = now_s  # when it is tried again, while it takes nothing
        self.requests: dict[int, PublicRequest] = {}
        self.backlog: deque[ServerMessage] = deque(maxlen=MAX_BACKLOG)
        self.news: dict[PublicRequest, None] = {}  # requests that may have something to say, in this order

    @property
    def cache_key(self) -> str:
        """What its prompts share cached pages within. Who is trusted keeps its tenants apart by salts of its own."""
        return "" if self.is_trusted else self.key

    @property
    def is_gone(self) -> bool:
        """Whether its connection is closed, as far as that is known. Who has its routing id now is somebody else."""
        return self.connection is not None and self.connection.is_gone

    @property
    def has_unsent(self) -> bool:
        return bool(self.backlog or self.news)


class SessionLimits(NamedTuple):
    """How many there may be: of all, of one CURVE key, of one address."""

    total: int
    per_key: int
    per_address: int


def session_limits(most_sessions: int, most_connections: int) -> SessionLimits:
    """No key may take more than half of what there is, no address more than three quarters."""
    total = min(most_sessions, most_connections)
    return SessionLimits(total, per_key=total - total // 2, per_address=total - total // 4)


class Sessions:
    """All of them, by connection and by name."""

    def __init__(self, limits: SessionLimits) -> None:
        self._limits = limits
        self._of_key: Counter[str] = Counter()
        self._of_address: Counter[str] = Counter()
        self._by_routing_id: dict[bytes, Session] = {}
        self._by_name: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._by_routing_id)

    def add(self, session: Session) -> None:
        self._by_routing_id[session.routing_id] = session
        self._by_name[session.name] = session
        self._of_key[session.key] += 1
        self._of_address[session.address] += 1

    def remove(self, session: Session) -> None:
        for counts, name in ((self._of_key, session.key), (self._of_address, session.address)):
            counts[name] -= 1
            if not counts[name]:
                del counts[name]
        del self._by_routing_id[session.routing_id]
        del self._by_name[session.name]

    def refusal(self, key: str, address: str) -> str | None:
        """Why there is no room for another one of this key ("" without keys) and this address ("" of the ipc kind)."""
        total, per_key, per_address = self._limits
        if len(self) >= total:
            return f"there are {len(self)} sessions, the limit is {total}: try later"
        if key and self._of_key[key] >= per_key:
            return f"your key has {self._of_key[key]} sessions, the limit is {per_key}: end some, or try later"
        if address and self._of_address[address] >= per_address:
            num = self._of_address[address]
            return f"your address has {num} sessions, the limit is {per_address}: end some, or try later"
        return None

    def find(self, routing_id: bytes) -> Session | None:
        return self._by_routing_id.get(routing_id)

    def find_by_name(self, name: str) -> Session | None:
        return self._by_name.get(name)

    def all(self) -> list[Session]:
        return list(self._by_routing_id.values())
