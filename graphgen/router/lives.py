"""The connection to a server elsewhere, life after life: each has a socket of its own, so that nothing of an old one
reaches the server that is there next.

Owns one thread, which owns the socket, and when it tries again. Knows the session's hello, its welcome and its silence;
what else the server says is its user's: `graphgen.router.remote_link`, whose calls it makes on its thread.
"""

import logging
import threading
import time
from collections.abc import Callable

import zmq

from graphgen.base.inbox import Inbox
from graphgen.base.version import __version__
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.ggp.framing import FrameError
from graphgen.ipc.ggp.messages import Bye, ClientMessage, Generate, Hello, ServerLimits, ServerMessage, Welcome
from graphgen.remote.address import ServerAddress
from graphgen.remote.data_socket import DataSocket, Event

logger = logging.getLogger("graphgen")

HELLO = Hello(client=f"graphgen-frontend/{__version__}", notices=True, batches=True, routes=True)
TICK_S = 0.1
RETRY_S = 0.1
"""Between two lives of a connection; of several that come to nothing twice as long each time."""
MOST_RETRY_S = 5.0
WELCOME_S = 5.0
"""A connection that is not welcomed within this is made anew: a key may have been let in meanwhile."""
SILENT_S = 10.0
"""A server reports ten times a second; after so long without a word its connection counts as broken."""
AWAY_S = 1.0
"""A loop that comes round after more than this was stopped itself."""
LINGER_S = 0.2
BROKE = "its connection broke"
CLOSED = (
    "it closes the connection without a word: if it wants keys, name a folder with its server.key and a"
    " frontend.key_secret by --engine-keys"
)
FORBIDDEN = (
    "the handshake fails: let this frontend's key in there with `graphgen keys allow NAME KEY --routes`, and look"
    " whether the server's own key is right"
)

Take = Callable[[ServerMessage | FrameError], str | None]
Ended = Callable[[str, GraphgenError | None], None]


class Lives:
    """From `start` to `close`. Any thread may `call`; all else is of its own thread."""

    def __init__(self, server: ServerAddress, lock: "threading.RLock", take: Take, ended: Ended) -> None:
        """take: gets each message, and says why the session ends with it if it does; what it raises ends it, too.
        ended: a life has ended, why, and the error that did it. lock: reentrant; held where the inbox is used."""
        self._server = server
        self._lock = lock
        self._take = take
        self._ended = ended
        self._inbox = Inbox()
        self._closed = False
        self._socket: DataSocket | None = None  # of the life that is
        self._welcomed = False  # in this life
        self._heard_s = 0.0
        self.why_not = ""
        """Why there is no session at the moment."""
        self._thread = threading.Thread(target=self._run, name="graphgen-remote-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, work: Callable[[], None]) -> None:
        """Has the thread do it, unless all is closed."""
        with self._lock:
            if not self._closed:
                self._inbox.put(work)
                self._inbox.wake()

    def send(self, message: ClientMessage) -> None:
        """Nothing is kept for a later life."""
        if self._socket is not None:
            self._socket.send(message)

    def send_request(self, message: Generate, limits: ServerLimits) -> GraphgenError | None:
        """Why it cannot be sent to this server, if it cannot: see `DataSocket.send_request`."""
        return None if self._socket is None else self._socket.send_request(message, limits)

    def close(self) -> None:
        """Says bye, and ends the thread. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_closed(self) -> bool:
        return self._closed

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        wait_s = RETRY_S
        try:
            while not self._closed:
                error = self._live_once(context)
                self._ended(self.why_not, error)
                wait_s = RETRY_S if self._welcomed else min(MOST_RETRY_S, 2 * wait_s)
                self._pause(wait_s)
        finally:
            context.term()
            self._inbox.run(readable=False)  # what others still wait for
            self._inbox.close()

    def _live_once(self, context: "zmq.Context[zmq.Socket[bytes]]") -> GraphgenError | None:
        """One life, whatever ends it."""
        socket, self._welcomed = None, False
        try:
            socket = self._socket = DataSocket.connecting(self._server, context)
            self.why_not = self._live(socket)
        except GraphgenError as error:  # keys that cannot be read, or a server that is not the one that is wanted
            self.why_not = str(error)
            return error
        except Exception as error:
            logger.exception("the link to %s failed; it begins anew", self._server.address)
            self.why_not = f"the link failed with {type(error).__name__}: {error}"
        finally:
            self._socket = None
            if socket is not None:
                socket.close(LINGER_S if self._closed else 0.0)
        return None

    def _pause(self, wait_s: float) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox.fileno(), zmq.POLLIN)
        until_s = time.monotonic() + wait_s
        while not self._closed and (left_s := until_s - time.monotonic()) > 0:
            self._inbox.run(readable=bool(poller.poll(int(left_s * 1000) + 1)))

    def _live(self, socket: DataSocket) -> str:
        """Why the connection, or the session, has ended."""
        poller = zmq.Poller()
        for one in (self._inbox.fileno(), socket.socket, socket.monitor):
            poller.register(one, zmq.POLLIN)
        self.send(HELLO)
        begun_s = looped_s = self._heard_s = time.monotonic()
        while not self._closed:
            events = dict(poller.poll(int(TICK_S * 1000)))
            self._inbox.run(readable=self._inbox.fileno() in events)
            event = socket.event()  # before the messages: what came before the end of a connection is still taken
            if (ended := self._take_all(socket) or self._judge(event)) is not None:
                return ended
            socket.flush()
            now_s = time.monotonic()
            if now_s - looped_s > AWAY_S:  # what the server said meanwhile is unread
                self._heard_s = now_s
            looped_s = now_s
            if not self._welcomed and now_s - begun_s > WELCOME_S:
                return self.why_not or "it does not answer"
            if self._welcomed and now_s - self._heard_s > SILENT_S:
                return f"it has said nothing for {SILENT_S:g} s"
        self.send(Bye())
        return ""

    def _take_all(self, socket: DataSocket) -> str | None:
        """What has arrived. Why the session has ended with it, if it has."""
        while (message := socket.receive()) is not None:
            self._heard_s = time.monotonic()
            if (ended := self._take(message)) is not None:
                return ended
            if isinstance(message, Welcome):
                self._welcomed, self.why_not = True, ""
        return None

    def _judge(self, event: Event | None) -> str | None:
        """Why the life has ended with it, if it has."""
        match event:
            case Event.BROKEN:
                return BROKE if self._welcomed else CLOSED
            case Event.FORBIDDEN:
                return FORBIDDEN
            case Event.REFUSED:
                self.why_not = "nothing listens there: start a server with `graphgen serve`"
        return None
