"""A typed two-way channel between two processes, over a pair of one-way ZeroMQ sockets.

Owns its sockets, never a policy. A ZeroMQ socket belongs to one thread at a time, so sending has a socket and a
lock of its own: any thread may send, one thread receives.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, Literal

import zmq

from graphgen.ipc.codec import Codec, Receive, Send


class Channel(Generic[Send, Receive]):
    """One end of a channel named `name` in `folder` (mode 0700; the sockets are files in it).

    One process calls it with side "bind", the other with side "connect", in any order. Messages arrive whole
    and in order. `send` never blocks: what a dead peer does not read is dropped when the channel closes.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        folder: Path,
        name: str,
        side: Literal["bind", "connect"],
        receives: object,
    ) -> None:
        self._codec: Codec[Send, Receive] = Codec(receives)
        self._lock = threading.Lock()
        self._sender = context.socket(zmq.PUSH)
        self._receiver = context.socket(zmq.PULL)
        for socket, bound_end_sends in ((self._sender, side == "bind"), (self._receiver, side == "connect")):
            socket.set_hwm(0)
            socket.set(zmq.LINGER, 0)
            address = f"ipc://{folder}/{name}.{'down' if bound_end_sends else 'up'}"
            if side == "bind":
                socket.bind(address)
            else:
                socket.connect(address)

    @property
    def receiver(self) -> "zmq.Socket[bytes]":
        """For a poller over several channels; only the receiving thread may touch it."""
        return self._receiver

    def send(self, message: Send) -> None:
        frame = self._codec.encode(message)
        with self._lock:
            self._sender.send(frame)

    def receive(self, timeout_s: float | None = None) -> Receive | None:
        """The next message, or None after `timeout_s` (None waits for ever)."""
        if timeout_s is not None and not self._receiver.poll(int(timeout_s * 1000)):
            return None
        return self._codec.decode(self._receiver.recv())

    def drain(self) -> Iterator[Receive]:
        """What has already arrived, without waiting."""
        while True:
            try:
                frame = self._receiver.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield self._codec.decode(frame)

    def close(self, linger_s: float = 0.0) -> None:
        """Closes both sockets; unsent messages get `linger_s` to leave."""
        with self._lock:
            self._sender.close(linger=int(linger_s * 1000))
        self._receiver.close(linger=0)
