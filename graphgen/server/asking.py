"""A question to a process of this machine, over a socket in a folder that only its user can enter.

Owns the asking end, which has its answer or none within a time. Called by operator.py and graphgen.cluster.record,
whose processes answer.
"""

from pathlib import Path
from typing import TypeVar

import msgspec
import zmq
from msgspec import Struct

Answer = TypeVar("Answer", bound=Struct)


def ask_at(path: Path, question: Struct, kind: type[Answer], wait_s: float) -> Answer | None:
    """The answer, which is of this kind; None where none has come in that time."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        with context.socket(zmq.REQ) as socket:
            socket.set(zmq.LINGER, 0)
            socket.connect(f"ipc://{path}")
            socket.send(msgspec.msgpack.encode(question))
            return msgspec.msgpack.decode(socket.recv(), type=kind) if socket.poll(int(wait_s * 1000)) else None
    finally:
        context.term()
