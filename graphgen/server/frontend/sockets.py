"""A public ROUTER socket: how messages come in, how they go out, and what happens when a peer does not read.

Owns the socket's options and its three answers to a send. Used on the server's thread alone.
"""

import contextlib
import ctypes
import enum
import os
import secrets
import socket as sockets
from typing import NamedTuple

import zmq

from graphgen.base.addresses import bind
from graphgen.ipc.ggp.framing import NUM_FRAMES
from graphgen.server.frontend.gate import Connection, Gate
from graphgen.server.frontend.memory import RECEIVE_QUEUE_MESSAGES, SOCKET_BUFFER_BYTES

SEND_QUEUE_MESSAGES = 500
"""Of one peer, beyond what the kernel holds; after that its tokens are joined here. Bytes have a limit beside it."""
SKIPPED_AT_ONCE = 1024
"""Frames of a message that is none, thrown away before others' tokens are sent."""
CURVE_BYTES = 33
"""What CURVE adds to a frame: the name of the command, a nonce, flags and a code of 16 bytes."""
HANDSHAKE_MS = 5000
ZAP_DOMAIN = "graphgen"
"""What sockets with keys are called where ZeroMQ asks whether a key may connect."""

TRUSTED = "trusted"
"""In the place of a key, of connections to the private address of a socket with keys."""

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
    key: str  # the peer's CURVE key, "" without keys, TRUSTED
    descriptor: int  # of its connection; another may have it later


def _make_ids_unguessable() -> None:
    """A peer may choose an id that looks as if the socket had made it: it would have to know which.

    libzmq counts connections from a number of the C library's `rand`, which is the same in every process that does
    not seed it. Who knows the next one can also end the process: libzmq aborts when the id that it makes is taken."""
    ctypes.CDLL(None).srand(ctypes.c_uint(secrets.randbits(32)))


class PublicSocket:
    """One address. Peers' routing ids are for the socket to make: who chose one is refused by the server."""

    def __init__(
        self,
        context: Context,
        gate: Gate,
        name: str,
        address: str,
        frame_bytes: int,
        dead_peer_s: float,
        server_key: bytes | None,
        private_address: str | None = None,
    ) -> None:
        """dead_peer_s: how long a peer may not answer ZeroMQ's own heartbeats. private_address: another one, in a
        folder that nobody else may enter: who comes by it is trusted, and needs no key. Raises ConfigError,
        zmq.ZMQError."""
        self._secure = server_key is not None
        _make_ids_unguessable()
        self._gate = gate
        self._skipping = False
        socket = context.socket(zmq.ROUTER)
        # Without it a ROUTER drops what a slow peer has no room for, and says that it was sent.
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.SNDTIMEO, 0)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        socket.set(zmq.RCVHWM, RECEIVE_QUEUE_MESSAGES)
        socket.set(zmq.RCVBUF, SOCKET_BUFFER_BYTES)
        socket.set(zmq.MAXMSGSIZE, frame_bytes + (CURVE_BYTES if self._secure else 0))
        socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        # A machine that vanished without closing its connections; a stopped process that may go on is left its time.
        socket.set(zmq.HEARTBEAT_IVL, int(dead_peer_s * 1000 / 4))
        socket.set(zmq.HEARTBEAT_TIMEOUT, int(dead_peer_s * 1000))
        socket.set(zmq.IPV6, "[" in address)
        gate.watch(socket, name)
        self._private_path = None if private_address is None else private_address.removeprefix("ipc://")
        try:
            self._files = [] if private_address is None else [bind(socket, private_address)]
            if server_key is not None:  # an option holds for the addresses that are bound after it
                socket.set(zmq.CURVE_SERVER, 1)
                socket.set(zmq.CURVE_SECRETKEY, server_key)
                socket.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN.encode())
            self._files.append(bind(socket, address))
        except BaseException:
            socket.close()
            raise
        self.socket = socket
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def receive(self) -> Received | None:
        """The next message that has arrived. What it has beyond three frames is thrown away, a part at a time: a
        message may have a million. Raises MemoryError when there was no room for one: its connection is closed, so that
        its client knows."""
        if self._skipping:
            self._skip()
            return None
        try:
            frame = self.socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        routing_id = frame.bytes
        frames: list[bytes] = []
        num_bytes = 0
        self._skipping = frame.more  # until its last frame has come, whatever happens to those before
        while self._skipping and len(frames) <= NUM_FRAMES:
            frame = self.socket.recv(copy=False)
            self._skipping = frame.more
            num_bytes += self._wire_bytes(len(frame))
            try:
                frames.append(frame.bytes)
            except MemoryError:
                self._cut(frame)
                raise
        self._count(frame, num_bytes)
        return Received(routing_id, frames, self._key_of(frame), descriptor_of(frame))

    def _key_of(self, frame: zmq.Frame) -> str:
        if not self._secure:
            return ""
        try:
            return str(frame.get("User-Id"))
        except zmq.ZMQError:  # a connection without CURVE: it has come by the private address
            return TRUSTED

    def _skip(self) -> None:
        num_bytes = 0
        for _ in range(SKIPPED_AT_ONCE):
            frame = self.socket.recv(copy=False)
            num_bytes += self._wire_bytes(len(frame))
            self._skipping = frame.more
            if not self._skipping:
                break
        self._count(frame, num_bytes)

    def _count(self, frame: zmq.Frame, num_bytes: int) -> None:
        connection = self._gate.find(descriptor_of(frame))
        if connection is not None:
            connection.took(num_bytes)

    def _cut(self, frame: zmq.Frame) -> None:
        connection = self._gate.find(descriptor_of(frame))
        if connection is not None:
            connection.cut()

    def is_trusted(self, received: Received) -> bool:
        """Whether the connection of a message that has just come is one to the private address."""
        if self._private_path is None or received.descriptor < 0:
            return False
        with contextlib.suppress(OSError), sockets.socket(fileno=os.dup(received.descriptor)) as own:
            return own.family == sockets.AF_UNIX and own.getsockname() == self._private_path
        return False

    @property
    def most_connections(self) -> int:
        """Of this and the other socket together."""
        return self._gate.limits.connections

    def connection_of(self, received: Received) -> Connection | None:
        """The connection of a message that has just come."""
        return self._gate.find_new(received.descriptor)

    def send(self, routing_id: bytes, header: bytes, body: bytes, connection: Connection | None = None) -> Sent:
        """Never waits. A connection that has enough to read already counts as blocked."""
        if connection is not None and connection.is_gone:
            return Sent.GONE
        if connection is not None and connection.is_full:
            return Sent.BLOCKED
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
        if connection is not None:
            connection.sent(self._wire_bytes(len(header)) + self._wire_bytes(len(body)))
        return Sent.SENT

    def close(self, linger_s: float) -> None:
        for file in self._files:
            if file is not None:
                file.remove()
        self.socket.close(linger=int(linger_s * 1000))

    def _wire_bytes(self, num_bytes: int) -> int:
        """Of a frame as ZMTP sends it, encrypted or not."""
        sent = num_bytes + CURVE_BYTES if self._secure else num_bytes
        return sent + (2 if sent < 256 else 9)


def descriptor_of(frame: zmq.Frame) -> int:
    """Of the connection that a frame came over; -1 where ZeroMQ does not say."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return -1
