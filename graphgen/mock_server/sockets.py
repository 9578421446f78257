"""The two ROUTER sockets of the mock server: bound, bound anew, read and written.

Owns every ZeroMQ call and its traps. Knows frames, not messages. Used by server.py alone.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import zmq

from graphgen.base.addresses import SocketFile, bind
from graphgen.ipc.errors import ConfigError

LINGER_MS = 200
REBIND_S = 5.0
"""A port is free again some time after its socket was closed."""


class Keys(NamedTuple):
    """A CURVE key pair, each key in 40 characters."""

    public: bytes
    secret: bytes


class Sockets:
    """Data and control socket, until `close`."""

    def __init__(self, data: str, control: str, keys: Keys | None, frame_bytes: int) -> None:
        self._keys = keys
        self._frame_bytes = frame_bytes
        self._context = zmq.Context()
        self._bind_both(data, control)

    def bind_anew(self) -> None:
        """Drops every connection, as the end of a process would, once what was sent is out."""
        self._unbind(linger_ms=100)
        self._bind_both(self.address, self.control_address)

    def close(self) -> None:
        self._unbind(linger_ms=LINGER_MS)
        self._context.term()

    def read(self, control: bool) -> Iterator[tuple[bytes, list[bytes]]]:
        """What has come on one of them: the peer and its frames."""
        while True:
            socket = self._control if control else self._data
            try:
                peer, *frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield peer, frames

    def send(self, peer: bytes, frames: list[bytes], control: bool) -> bool:
        """False: the peer is gone."""
        socket = self._control if control else self._data
        try:
            socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Until there is something to read, at most so long."""
        poller = zmq.Poller()
        poller.register(self._data, zmq.POLLIN)
        poller.register(self._control, zmq.POLLIN)
        poller.poll(max(1, round(seconds * 1000)))

    def _unbind(self, linger_ms: int) -> None:
        for socket, file in ((self._data, self._data_file), (self._control, self._control_file)):
            if file is not None:
                file.remove()
            socket.close(linger=linger_ms)

    def _bind_both(self, data: str, control: str) -> None:
        self._data, self.address, self._data_file = self._bind(data)
        self._control, self.control_address, self._control_file = self._bind(control)

    def _bind(self, address: str) -> tuple[zmq.Socket[bytes], str, SocketFile | None]:
        give_up_s = time.monotonic() + REBIND_S
        while True:
            socket = self._context.socket(zmq.ROUTER)
            socket.linger = LINGER_MS
            socket.maxmsgsize = self._frame_bytes
            socket.sndhwm = 0  # the mock keeps what a slow reader has not taken
            socket.router_mandatory = True  # or messages to a peer that is gone would vanish unseen
            if self._keys is not None:
                socket.curve_server = True
                socket.curve_publickey, socket.curve_secretkey = self._keys
            try:
                file = bind(socket, address)
                return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT), file
            except ConfigError:
                socket.close()
                raise
            except zmq.ZMQError as error:
                socket.close()
                if error.errno != zmq.EADDRINUSE or time.monotonic() > give_up_s:
                    raise
                time.sleep(0.01)
