"""A frontend's server in a thread, between a scheduler that says what a test tells it to and clients that a test is.

All of it is the real thing but for the engine: sockets, sessions, tokenizer, loop.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq

from graphgen import demo
from graphgen.base.inbox import Inbox
from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import Attach, Submit
from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import Accepted, ClientMessage, Generate, Hello, Ping, ServerMessage, Welcome
from graphgen.ipc.server_messages import Drain, FrontendToSupervisor, SupervisorToFrontend
from graphgen.launch.config import EngineConfig
from graphgen.requests.chat_template import ChatSource
from graphgen.requests.core import AttachedCore, launch_config
from graphgen.requests.tokenizer import Tokenizer, TokenizerData
from graphgen.requests.tokenizer_files import load_tokenizer
from graphgen.router.engine_link import own_links
from graphgen.router.links import Links
from graphgen.server.frontend.authentication import Authenticator, Everyone
from graphgen.server.frontend.keys import Keys
from graphgen.server.frontend.process import bind, make_gate, make_server
from graphgen.server.frontend.server import PublicSockets
from graphgen.server.frontend.settings import FrontendSettings
from tests.fakes import READY, FakeProcesses, FakeScheduler

Message = TypeVar("Message")

IDS = Generate(id=1, prompt_ids=[5, 6, 7])
"""The request of a test that does not care what it is."""

NUM_PAGES = 32
"""Of 16 positions: half the demo model's context, so that a request can be too large for the pages alone."""


def demo_tokenizer(chat_template: str | None = None) -> Tokenizer:
    tokenizer = load_tokenizer(demo.model_folder())
    assert tokenizer is not None
    source = None if chat_template is None else ChatSource(chat_template, "a test")
    return Tokenizer.of(TokenizerData(tokenizer.data.backend, tokenizer.data.special_tokens, source))


def make_settings(**changes: Any) -> FrontendSettings:  # any field of FrontendSettings
    values: dict[str, Any] = {
        "model": "fake",
        "data": "tcp://127.0.0.1:*",
        "control": "tcp://127.0.0.1:*",
        "keys": None,
        "memory_limit_bytes": 1 << 30,
        "threads": 1,
    }
    return FrontendSettings(**{**values, **changes})


class Frontend:
    """The server under test. `scheduler` is the engine's end, `supervisor` its master's."""

    def __init__(self, tokenizer: Tokenizer | None, engine: EngineConfig | None = None, **settings: Any) -> None:
        self.settings = make_settings(**settings)
        self.processes = FakeProcesses()
        self.scheduler = FakeScheduler(self.processes)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.supervisor: Channel[SupervisorToFrontend, FrontendToSupervisor] = Channel(
            self._context, self.processes.folder, "frontend-0", "upper", FrontendToSupervisor
        )
        lower: Channel[FrontendToSupervisor, SupervisorToFrontend] = Channel(
            self._context, self.processes.folder, "frontend-0", "lower", SupervisorToFrontend
        )
        self._lower = lower
        launch = launch_config(engine or EngineConfig(device="cpu"))
        keys = None if self.settings.keys is None else Keys(Path(self.settings.keys))
        self._authentication = None if keys is None else Authenticator(self._context, keys)
        self.gate = make_gate(self._context, self.settings, launch)
        self.sockets: PublicSockets = bind(self._context, self.gate, self.settings, launch, keys)
        self._inbox = Inbox()
        self._link = Links(own_links([self.processes], attaches=True, after_outputs=self._inbox.wake))
        self.scheduler.expect(Attach)
        self.scheduler.send(
            msgspec.structs.replace(READY, worker=msgspec.structs.replace(READY.worker, num_pages=NUM_PAGES))
        )
        core = AttachedCore(launch, self._link.wait_ready(5), tokenizer, self._link)
        access = self._authentication or Everyone()
        self.server = make_server(self.sockets, lower, self._inbox, self._link, core, self.settings, access)
        self.num_lost: int | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.num_lost = self.server.run()

    def connect(self, control: bool = False, **options: Any) -> "RawClient":
        """options: of the socket, by their names in zmq; `address` is another way to the same socket."""
        own = self.sockets.control.address if control else self.sockets.data.address
        return RawClient(self._context, options.pop("address", own), options)

    def welcome(self, **options: Any) -> "RawClient":
        """A client that has a session."""
        client = self.connect(**options)
        client.send(Hello(client="test"))
        client.session = client.expect(Welcome).session
        return client

    def session_ids(self) -> list[bytes]:
        """Routing ids of the connections that have a session."""
        return [session.routing_id for session in self.server._sessions.all()]

    def hold(self) -> threading.Event:
        """Stops the server's loop until the event is set."""
        go_on = threading.Event()
        stopped = threading.Event()

        def wait() -> None:
            stopped.set()
            go_on.wait(5)

        self._inbox.put(wait)
        self._inbox.wake()
        stopped.wait(5)
        return go_on

    def inproc(self, address: str) -> "zmq.Socket[bytes]":
        """A DEALER within the server's process."""
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.connect(address)
        return socket

    def close(self) -> None:
        if self.thread.is_alive():
            self.supervisor.send(Drain(0.0))
            self.thread.join(5)
        assert not self.thread.is_alive(), "the server did not end"
        self.server.close()
        self._link.close()
        self.scheduler.close()
        for socket in self.sockets:
            socket.close(0.0)
        self.gate.close()
        if self._authentication is not None:
            self._authentication.stop()
        self.supervisor.close()
        self._lower.close()
        self._inbox.close()
        self._context.destroy(linger=0)


class RawClient:
    """A DEALER and the protocol's frames, nothing else."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, options: dict[str, Any] | None = None
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        for name, value in (options or {}).items():
            self.socket.set(getattr(zmq, name), value)
        self.socket.connect(address)
        self.session = ""
        self._framing = client_framing()

    def send(self, message: ClientMessage) -> None:
        self.socket.send_multipart(self._framing.encode(message))

    def send_raw(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, timeout_s: float = 5.0) -> ServerMessage | None:
        """The next message that is no ping."""
        deadline_s = time.monotonic() + timeout_s
        while self.socket.poll(max(0, int((deadline_s - time.monotonic()) * 1000))):
            message = self._framing.decode(self.socket.recv_multipart())
            if not isinstance(message, Ping):
                return message
        return None

    def expect(self, kind: type[Message], timeout_s: float = 5.0) -> Message:
        """The next message, which must be of this kind."""
        message = self.receive(timeout_s)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def close(self) -> None:
        self.socket.close(linger=0)


def wait_until(holds: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether it holds within the time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if holds():
            return True
        time.sleep(0.01)
    return holds()


def open_request(frontend: Frontend, client: RawClient, message: Generate = IDS) -> int:
    """Its name at the scheduler."""
    client.send(message)
    submit = frontend.scheduler.expect(Submit)
    client.expect(Accepted)
    return submit.request_id
