"""`graphgen health` and `graphgen stats`: one question to a running server, answered within seconds.

Owns their options, what they print and their exit codes, which probes of an orchestrator use: 0 it serves, 1 it does
not, 2 the command is wrong. Asks at the control socket, which takes no session and answers when all are taken.
"""

import sys
import time
from typing import Annotated, TypeVar

import msgspec
import typer
import zmq
from msgspec import Struct

from graphgen.base.addresses import check_connectable, control_address
from graphgen.commands.fields import options_of
from graphgen.commands.options import takes_fields
from graphgen.ipc.errors import ConnectionLostError, ServerError
from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import DEFAULT_ADDRESS, Error, Health, HealthRequest, Stats, StatsRequest
from graphgen.ipc.ggp.statistics import EngineCount
from graphgen.remote.address import ServerAddress

NOT_SERVING_EXIT = 1

Answer = TypeVar("Answer", Health, Stats)
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print the answer as JSON.")]


class AskedServer(Struct, frozen=True, kw_only=True):
    """The server that is asked."""

    address: str = DEFAULT_ADDRESS
    """Address of the data socket, as `graphgen serve --bind` was given it."""
    control: str | None = None
    """Address of the control socket. None: beside the data socket's."""
    server_key: str | None = None
    """The server's public key. None: it asks for no keys."""
    key_file: str | None = None
    """The secret key file of a key that is let in. None: it asks for no keys."""
    timeout_s: float = 7.0
    """Seconds to wait for the answer."""

    @property
    def control_socket(self) -> ServerAddress:
        """Raises ConfigError for what is no address."""
        check_connectable(self.address)
        return ServerAddress(
            address=self.control or control_address(self.address),
            server_key=self.server_key,
            key_file=self.key_file,
            connect_timeout_s=self.timeout_s,
        )


_takes_server = takes_fields("server", AskedServer, options_of(AskedServer), panel="Server")


@_takes_server
def health(server: AskedServer, json: Json = False) -> None:
    """Ask a server whether it takes requests and its worker answers.

    Exit code 0: it does. 1: it does not, or there is no server. 2: the command is wrong.
    """
    found = _ask(server.control_socket, HealthRequest(), Health)
    _show(found, json, f"{found.status}: {_of_worker(found)}")
    if not found.ready:
        raise typer.Exit(NOT_SERVING_EXIT)


def _of_worker(found: Health) -> str:
    """Its answer, or how long there was none; 0: it was not asked."""
    if not found.worker_ms:
        return "no engine serves"
    did = "did not answer for" if found.status == "stalled" else "answered in"
    return f"the worker {did} {found.worker_ms:.1f} ms"


@_takes_server
def stats(server: AskedServer, json: Json = False) -> None:
    """Print the statistics of a server: sessions, requests, pages, steps.

    Exit code 0: they are printed. 1: there is no server, or its engine does not answer. 2: the command is wrong.
    """
    found = _ask(server.control_socket, StatsRequest(), Stats)
    _show(found, json, written(found))


def written(stats: Stats) -> str:
    """A line for each number, and for each of several engines."""
    values = msgspec.structs.asdict(stats)
    engines = {f"engine {number}": _of_engine(one) for number, one in enumerate(values.pop("engines"))}
    lines = {
        name: f"{value:.6g}" if isinstance(value, float) else str(value) or "-"
        for name, value in values.items()
        if value is not None  # what only a monitoring system asks for
    } | engines
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _of_engine(engine: EngineCount) -> str:
    values = msgspec.structs.asdict(engine)
    state = "serves" if values.pop("serves") else "away"
    return f"{state}: {', '.join(f'{name} {value}' for name, value in values.items())}"


def _ask(server: ServerAddress, question: HealthRequest | StatsRequest, kind: type[Answer]) -> Answer:
    """The answer. Ends the command with code 1, and says why, when there is none in time."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    deadline_s = time.monotonic() + server.connect_timeout_s
    framing = client_framing()
    try:
        with server.connect(context) as socket:
            socket.send_multipart(framing.encode(question), zmq.NOBLOCK)
            while socket.poll(max(0, int((deadline_s - time.monotonic()) * 1000))):
                message = framing.decode(socket.recv_multipart())
                if isinstance(message, kind):
                    return message
                if isinstance(message, Error):
                    raise ServerError(message.message, message.code, message.retryable)
        raise ConnectionLostError(
            f"{server.address} did not answer for {server.connect_timeout_s:g} s: is it a control socket, and is this"
            " client's key let in?"
        )
    except (ServerError, zmq.Again) as error:
        sys.stderr.write(f"not serving: {error}\n")
        raise typer.Exit(NOT_SERVING_EXIT) from None
    finally:
        context.term()


def _show(answer: Health | Stats, json: bool, text: str) -> None:
    if json:
        text = msgspec.json.format(msgspec.json.encode(msgspec.structs.asdict(answer)), indent=1).decode()
    sys.stdout.write(text + "\n")
