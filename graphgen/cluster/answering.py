"""The answering end of a cluster's socket: on a thread of its own, so that whatever the keeper waits for delays nobody.

Owns the socket, the newest status and the number of orders to end. Asks nothing itself, neither Ray nor the frontend:
the keeper publishes what it knows, and says what it is doing. Made by `graphgen.cluster.up`, which closes it last;
told by the keeper.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import zmq

from graphgen.cluster.record import ClusterStatus, Question

LINGER_MS = 1000
"""For the last answer."""


class Answering:
    """From the constructor to `close`. Any thread may call it."""

    def __init__(self, path: Path, status: ClusterStatus) -> None:
        """path: of the socket. status: what is said until another is published; its ages are of this moment."""
        self._begun_s = self._published_s = self._doing_since_s = time.monotonic()
        self._status = status
        self._doing = ""
        self._num_asked_to_end = 0
        self._news = threading.Condition()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.set(zmq.LINGER, LINGER_MS)
        self._socket.bind(f"ipc://{path}")
        self._thread = threading.Thread(target=self._serve, name="graphgen-answering", daemon=True)
        self._thread.start()

    @property
    def num_asked_to_end(self) -> int:
        """How often `graphgen cluster down` has come."""
        return self._num_asked_to_end

    def publish(self, status: ClusterStatus) -> None:
        """This is so now. What it says of up_s, doing and ages is not read: it is known here."""
        with self._news:
            self._status, self._published_s = status, time.monotonic()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says meanwhile that this is being done: it may take long."""
        self._do(what)
        try:
            yield
        finally:
            self._do("")

    def _do(self, what: str) -> None:
        with self._news:
            self._doing, self._doing_since_s = what, time.monotonic()

    def wait(self, seconds: float) -> None:
        """So long, or until somebody asks for the end."""
        with self._news:
            before = self._num_asked_to_end
            self._news.wait_for(lambda: self._num_asked_to_end != before, seconds)

    def _serve(self) -> None:
        with self._socket, contextlib.suppress(zmq.ContextTerminated):
            while True:
                try:
                    question = msgspec.msgpack.decode(self._socket.recv(), type=Question)
                except msgspec.MsgspecError:
                    question = Question("status")  # whoever asks is answered: the socket takes no other question before
                self._socket.send(msgspec.msgpack.encode(self._answer(question)))

    def _answer(self, question: Question) -> ClusterStatus:
        now_s = time.monotonic()
        with self._news:
            if question.action == "down":
                self._num_asked_to_end += 1
                self._news.notify_all()
            return msgspec.structs.replace(
                self._status,
                phase="ending" if self._num_asked_to_end else self._status.phase,
                up_s=now_s - self._begun_s,
                doing=self._doing,
                doing_s=now_s - self._doing_since_s if self._doing else 0.0,
                age_s=now_s - self._published_s,
            )

    def close(self) -> None:
        """Nobody is answered from here on."""
        self._context.term()  # which ends the thread
        self._thread.join()
