"""A bare DEALER that speaks GGP/1, for tests that need to see every message, and the servers that tests talk to."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import zmq

from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import ClientMessage, Hello, Ping, Pong, ServerMessage, Welcome
from graphgen.mock_server.script import Script, built_in_script
from graphgen.mock_server.server import MockServer
from tests import ROOT

Message = TypeVar("Message")


class RawClient:
    """Sends what it is told to, and receives one message at a time. Pings are left out."""

    def __init__(self, address: str, timeout_ms: int = 10_000, routing_id: bytes = b"") -> None:
        self._framing = client_framing()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.rcvtimeo = timeout_ms
        if routing_id:
            self._socket.routing_id = routing_id
        self._socket.connect(address)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def hello(self) -> Welcome:
        self.send(Hello())
        return self.receive(Welcome)

    def send(self, *messages: ClientMessage) -> None:
        for message in messages:
            self.send_frames(self._framing.encode(message))

    def send_frames(self, frames: Sequence[bytes]) -> None:
        self._socket.send_multipart(frames)

    def receive(self, kind: type[Message]) -> Message:
        """The next message, which must be of this kind."""
        message = self.receive_any()
        assert isinstance(message, kind), message
        return message

    def receive_any(self) -> ServerMessage:
        while True:
            message = self._framing.decode(self._socket.recv_multipart())
            if not isinstance(message, Ping):
                return message

    def receive_frames(self) -> list[bytes]:
        return self._socket.recv_multipart()

    def ends_with_pong(self, t: int) -> list[ServerMessage]:
        """What comes before the pong to a ping that is sent now: the server lives, and has said so much."""
        self.send(Ping(t=t))
        found: list[ServerMessage] = []
        while not isinstance(message := self.receive_any(), Pong):
            found.append(message)
        assert message.t == t
        return found


@contextlib.contextmanager
def running_mock(script: Script | None = None) -> Iterator[MockServer]:
    """A mock server in a thread, on free ports."""
    server = MockServer(script or built_in_script(), "tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


class Served(NamedTuple):
    """A server process that is ready."""

    process: "subprocess.Popen[str]"
    address: str
    public_key: str


@contextlib.contextmanager
def running_command(*arguments: str) -> Iterator[Served]:
    """`python -m ARGUMENTS --bind` a free port, from its ready line to its end."""
    command = [sys.executable, "-P", "-m", *arguments, "--bind", "tcp://127.0.0.1:*"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield _read_until_ready(process)
        finally:
            if process.poll() is None:
                process.kill()


def _read_until_ready(process: "subprocess.Popen[str]") -> Served:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.rstrip())
        if said[-1] == "ready":
            address = next(words.split()[2] for words in said if words.endswith("(data)"))
            keys = [words.split()[2] for words in said if words.startswith("public key ")]
            return Served(process, address, keys[0] if keys else "")
    raise AssertionError(f"the server ended before it was ready: exit {process.wait()}, said {said}")
