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

    The process nearer to the user is the upper side: Engine over scheduler, scheduler over worker. Either side may
    start first. Messages arrive whole and in order. `send` never blocks: what a dead peer does not read is dropped
    when the channel closes.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        folder: Path,
        name: str,
        side: Literal["upper", "lower"],
        receives: object,
    ) -> None:
        self._codec: Codec[Send, Receive] = Codec(receives)
        self._lock = threading.Lock()
        self._sender = context.socket(zmq.PUSH)
        self._receiver = context.socket(zmq.PULL)
        down, up = f"ipc://{folder}/{name}.down", f"ipc://{folder}/{name}.up"
        for socket in (self._sender, self._receiver):
            socket.set_hwm(0)
            socket.set(zmq.LINGER, 0)
        # Receivers bind and senders connect: a connecting socket queues messages before its peer exists.
        self._receiver.bind(up if side == "upper" else down)
        self._socket_file = folder / f"{name}.{'up' if side == 'upper' else 'down'}"
        self._sender.set(zmq.RECONNECT_IVL, 10)
        self._sender.connect(down if side == "upper" else up)

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
        self._socket_file.unlink(missing_ok=True)  # ZeroMQ leaves it
