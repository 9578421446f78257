"""What an engine's actor is told and what it says: the messages that pass through Ray, as msgpack.

No secret is among them: the actor makes its server's keys where it runs, and says the public one.
"""

from typing import Literal

import msgspec
from msgspec import Struct

from graphgen.launch.config import EngineConfig


class EngineOrder(Struct, frozen=True):
    """An engine that is to be started."""

    number: int
    version: str  # of graphgen, which must be the same on every machine
    config: EngineConfig
    host: str | None  # to listen at; None: the address by which Ray knows the machine
    client_key: str  # the public key of the one client that is let in: the frontend
    grace_s: float

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "EngineOrder":
        return msgspec.msgpack.decode(data, type=cls)


class EngineReport(Struct, frozen=True):
    """How an engine is."""

    state: Literal["starting", "serving", "ended"]
    node: str
    data: str = ""
    control: str = ""
    server_key: str = ""
    problem: str = ""  # why it has ended
    pids: tuple[int, ...] = ()  # of the actor and of its server
    num_slots: int = 0  # once it serves: requests that it can run at a time

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "EngineReport":
        return msgspec.msgpack.decode(data, type=cls)
