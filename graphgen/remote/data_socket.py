"""A client's end of a data connection: messages out, in order and without waiting, and messages in.

Owns the socket. Knows nothing of sessions: `graphgen.remote.connection` and `graphgen.router.remote_link` use one, each
on its own thread.
"""

import enum
import logging
from collections import deque

import zmq
from zmq.utils.monitor import recv_monitor_message

from graphgen.ipc.errors import ConfigError, GraphgenError
from graphgen.ipc.ggp.framing import FrameError, client_framing
from graphgen.ipc.ggp.messages import ClientMessage, Generate, ServerLimits, ServerMessage
from graphgen.remote.address import ServerAddress
from graphgen.remote.frame_limit import refusal

logger = logging.getLogger("graphgen")


class Event(enum.Enum):
    """What has become of a connection."""

    BROKEN = enum.auto()  # it was there, and is not any more
    REFUSED = enum.auto()  # nothing listens at the address; libzmq tries again by itself
    FORBIDDEN = enum.auto()  # the handshake failed, as with a key that is not let in; libzmq does not try again


_EVENTS = {
    zmq.EVENT_DISCONNECTED: Event.BROKEN,
    zmq.EVENT_CONNECT_RETRIED: Event.REFUSED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: Event.FORBIDDEN,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Event.FORBIDDEN,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: Event.FORBIDDEN,
}


class DataSocket:
    """One connection."""

    def __init__(self, socket: "zmq.Socket[bytes]", monitor: "zmq.Socket[bytes] | None" = None) -> None:
        """socket: a DEALER that is connected, or connects. monitor: of its events."""
        self.socket = socket
        self.monitor = monitor
        self._framing = client_framing()
        self._outgoing: deque[tuple[bytes, bytes]] = deque()  # while there is no connection that could take them

    @classmethod
    def connecting(cls, server: ServerAddress, context: "zmq.Context[zmq.Socket[bytes]]") -> "DataSocket":
        """Begins to connect; `event` tells what comes of it. Raises ConfigError for an address or keys that cannot
        work."""
        made = cls(server.make_socket(context))
        try:
            made.monitor = made.socket.get_monitor_socket(sum(_EVENTS))
            made.socket.connect(server.address)
        except BaseException as error:
            made.close()  # a socket that stays open keeps the context's end waiting for ever
            if isinstance(error, zmq.ZMQError):
                raise ConfigError(f"cannot connect to {server.address!r}: {error}") from None
            raise
        return made

    def send(self, message: ClientMessage) -> None:
        self._outgoing.append(self._framing.encode(message))
        self.flush()

    def send_request(self, message: Generate, limits: ServerLimits) -> GraphgenError | None:
        """Sends it, unless it is larger than the server takes: such a frame would end the connection, and with it all
        that is open. Then why it was not sent."""
        frames = self._framing.encode(message)
        error = refusal(message, len(frames[1]), limits)
        if error is None:
            self._outgoing.append(frames)
            self.flush()
        return error

    def flush(self) -> None:
        """Sends what waits. A socket whose handshake failed has nowhere to put a message, and would wait for ever."""
        while self._outgoing:
            try:
                self.socket.send_multipart(self._outgoing[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._outgoing.popleft()

    def receive(self) -> ServerMessage | FrameError | None:
        """The next message that has arrived, None where there is none; a FrameError for one that cannot be read. What
        is of a kind that only a later server knows is read over."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                self._framing.kind_of(frames)
            except FrameError as error:
                logger.debug("a message was ignored: %s", error)
                continue
            try:
                return self._framing.decode(frames)
            except FrameError as error:
                return error

    def event(self) -> Event | None:
        """What has become of the connection since the last look: the worst of it."""
        found = set()
        while self.monitor is not None and self.monitor.poll(0):
            found.add(_EVENTS[zmq.Event(recv_monitor_message(self.monitor)["event"])])
        return next((event for event in (Event.FORBIDDEN, Event.BROKEN, Event.REFUSED) if event in found), None)

    def close(self, linger_s: float = 0.0) -> None:
        if self.monitor is not None:
            self.socket.disable_monitor()
            self.monitor.close(linger=0)
        self.socket.close(linger=int(linger_s * 1000))
