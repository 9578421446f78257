"""A public ROUTER socket: how messages come in, how they go out, and what happens when a peer does not read.

Owns the socket's options and its three answers to a send. Used on the server's thread alone.
"""

import ctypes
import enum
import secrets
from typing import NamedTuple

import zmq

from graphgen.base.addresses import bind
from graphgen.ipc.ggp.framing import NUM_FRAMES

SEND_QUEUE_MESSAGES = 1000
"""Of one peer, beyond what the kernel holds; after that its tokens are joined here."""
RECEIVE_QUEUE_MESSAGES = 32
"""Of one peer. Each may have the size of the largest frame; the rest waits at the peer."""
HANDSHAKE_MS = 5000
ZAP_DOMAIN = "graphgen"
"""What sockets with keys are called where ZeroMQ asks whether a key may connect."""

Context = zmq.Context[zmq.Socket[bytes]]


class Sent(enum.Enum):
    """What became of a message."""

    SENT = enum.auto()
    BLOCKED = enum.auto()  # the peer does not read: nothing was taken
    GONE = enum.auto()  # the connection is closed


class Received(NamedTuple):
    """A message as it came; `frames` are at most three, however many there were."""

    routing_id: bytes
    frames: list[bytes]
    key: str  # the peer's CURVE key, "" without keys


def _make_ids_unguessable() -> None:
    """A peer may choose an id that looks as if the socket had made it: it would have to know which.

    libzmq counts connections from a number of the C library's `rand`, which is the same in every process that does
    not seed it. Who knows the next one can also end the process: libzmq aborts when the id that it makes is taken."""
    ctypes.CDLL(None).srand(ctypes.c_uint(secrets.randbits(32)))


class PublicSocket:
    """One address. Peers' routing ids are for the socket to make: who chose one is refused by the server."""

    def __init__(
        self, context: Context, address: str, frame_bytes: int, dead_peer_s: float, server_key: bytes | None
    ) -> None:
        """dead_peer_s: how long a peer may not answer ZeroMQ's own heartbeats. Raises ConfigError, zmq.ZMQError."""
        self._secure = server_key is not None
        _make_ids_unguessable()
        socket = context.socket(zmq.ROUTER)
        # Without it a ROUTER drops what a slow peer has no room for, and says that it was sent.
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.SNDTIMEO, 0)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        socket.set(zmq.RCVHWM, RECEIVE_QUEUE_MESSAGES)
        socket.set(zmq.MAXMSGSIZE, frame_bytes)
        socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        # A machine that vanished without closing its connections; a stopped process that may go on is left its time.
        socket.set(zmq.HEARTBEAT_IVL, int(dead_peer_s * 1000 / 4))
        socket.set(zmq.HEARTBEAT_TIMEOUT, int(dead_peer_s * 1000))
        socket.set(zmq.IPV6, "[" in address)
        if server_key is not None:
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.CURVE_SECRETKEY, server_key)
            socket.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN.encode())
        try:
            self._file = bind(socket, address)
        except BaseException:
            socket.close()
            raise
        self.socket = socket
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def receive(self) -> Received | None:
        """The next message that has arrived. What it has beyond three frames is thrown away as it comes."""
        try:
            frame = self.socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        routing_id = frame.bytes
        frames: list[bytes] = []
        while frame.more:
            frame = self.socket.recv(copy=False)
            if len(frames) <= NUM_FRAMES:
                frames.append(frame.bytes)
        return Received(routing_id, frames, str(frame.get("User-Id")) if self._secure else "")

    def send(self, routing_id: bytes, header: bytes, body: bytes) -> Sent:
        """Never waits."""
        try:
            # Only the first frame can fail: with it the socket has chosen the peer and has room for the message.
            self.socket.send(routing_id, zmq.SNDMORE)
        except zmq.Again:
            return Sent.BLOCKED
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        self.socket.send(header, zmq.SNDMORE)
        self.socket.send(body)
        return Sent.SENT

    def close(self, linger_s: float) -> None:
        if self._file is not None:
            self._file.remove()
        self.socket.close(linger=int(linger_s * 1000))
