"""What the gateway process is told by its supervisor. A file in the engine's folder."""

import signal
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

FILE = "gateway.msgpack"
END_SIGNAL = signal.SIGUSR1
"""By which the supervisor ends it. Those of service managers come to every process of a server."""


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """Everything that is decided before the gateway starts."""

    descriptor: int
    """Of the listening socket, which the gateway inherits."""
    frontend: str
    """The frontend's private address."""
    model_names: tuple[str, ...]
    """What requests may call the model; the first is what answers call it."""
    keys: str | None
    """Folder of API keys; None: none are asked for."""
    metrics_names: Literal["graphgen", "vllm"]
    """What `/metrics` calls its metrics."""
    memory_limit_bytes: int
    """What the process may use beyond what it uses when it begins to serve."""

    def write(self, folder: Path) -> None:
        (folder / FILE).write_bytes(msgspec.msgpack.encode(self))

    @classmethod
    def read(cls, folder: Path) -> "GatewaySettings":
        return msgspec.msgpack.decode((folder / FILE).read_bytes(), type=cls)
