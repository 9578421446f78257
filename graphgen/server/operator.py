"""How an operator takes engines of a running server out of service and back, and adds and removes those that are
elsewhere: a socket in the server's folder, which only the user who runs the server can enter.

Owns the socket and its two messages. What is done, the supervisor decides. `graphgen replicas` asks.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import zmq
from msgspec import Struct

from graphgen.ipc.errors import ConfigError, EngineDeadError
from graphgen.server.asking import ask_at

SOCKET = "operator"
ANSWER_S = 5.0
"""The supervisor looks ten times a second."""

EngineState = Literal["serving", "starting", "draining", "drained", "ended", "away", "removed"]
"""ended: its starts led to nothing too often. away: a server elsewhere cannot be reached, and is tried again. removed:
there is no engine of this number any more."""


class Wish(Struct, frozen=True):
    """What an operator asks for."""

    action: Literal["show", "drain", "resume", "add", "remove"]
    engine: int = 0
    grace_s: float = 30.0  # of drain and remove: what is open there may take so long, then it goes on elsewhere
    address: str = ""  # of add and remove, in the place of a number: a server elsewhere


class Told(Struct, frozen=True):
    """The answer: how each engine is once the wish was taken."""

    engines: tuple[EngineState, ...]
    error: str = ""  # why the wish is not fulfilled
    addresses: tuple[str, ...] = ()  # of engines elsewhere
    reasons: tuple[str, ...] = ()  # of these: why it is away; "" if it is not
    engine: int = 0  # which one was meant


class OperatorSocket:
    """The supervisor's end."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", folder: Path) -> None:
        self._socket = context.socket(zmq.REP)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(f"ipc://{folder / SOCKET}")

    def serve(self, answer: Callable[[Wish], Told]) -> None:
        """Answers what has arrived, without waiting. What is no wish is answered with an error."""
        while self._socket.poll(0):
            frame = self._socket.recv()
            try:
                told = answer(msgspec.msgpack.decode(frame, type=Wish))
            except msgspec.MsgspecError as error:
                told = Told((), f"that is no wish: {error}")
            self._socket.send(msgspec.msgpack.encode(told))

    def close(self) -> None:
        self._socket.close()


def ask(folder: Path, wish: Wish) -> Told:
    """What the server of this folder says. Raises EngineDeadError when nobody answers."""
    told = ask_at(folder / SOCKET, wish, Told, ANSWER_S)
    if told is None:
        raise EngineDeadError(f"no server answers in {folder} for {ANSWER_S:g} s: name the folder of one that runs")
    return told


def find_server(folder: str | None) -> Path:
    """The folder of the server that is meant: the only one of this user, unless it is named. Raises ConfigError."""
    if folder is not None:
        if not (Path(folder) / SOCKET).exists():
            raise ConfigError(f"{folder} is no folder of a server: `graphgen serve --replicas` says which it is")
        return Path(folder)
    found = []
    for socket in Path(tempfile.gettempdir()).glob(f"graphgen-*/{SOCKET}"):
        with contextlib.suppress(OSError):
            if socket.stat().st_uid == os.getuid():
                found.append(socket.parent)
    if not found:
        raise ConfigError("no server of this user runs here: start one with `graphgen serve --replicas N`")
    if len(found) > 1:
        raise ConfigError(f"several servers run here: name one with --server {' or '.join(sorted(map(str, found)))}")
    return found[0]
