"""What the gateway process is told by its supervisor. A file in the engine's folder."""

import signal
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from graphgen.gateway.output_parsers.formats import OutputFormat

END_SIGNAL = signal.SIGUSR1
"""By which the supervisor ends it. Those of service managers come to every process of a server."""


class ModelFacts(Struct, frozen=True):
    """What is found out about a model and its tokenizer when its server starts."""

    output_format: OutputFormat
    """What the model writes."""
    tokenizer_info: dict[str, str]
    """Special tokens by the names that templates have for them, and `chat_template`; empty without a tokenizer."""


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """Everything that is decided before the gateway starts."""

    descriptor: int
    """Of the listening socket, which the gateway inherits."""
    frontend: str
    """Private address of the frontend that it asks."""
    model_names: tuple[str, ...]
    """What requests may call the model; the first is what answers call it."""
    model: ModelFacts
    keys: str | None
    """Folder of API keys; None: none are asked for."""
    metrics_names: Literal["graphgen", "vllm"]
    """What `/metrics` calls its metrics."""
    rates: str
    """Folder in which gateways count requests of keys together."""
    memory_limit_bytes: int
    """What the process may use beyond what it uses when it begins to serve."""
    open_requests: int | None = None
    """What one client may have open, times samples: the server's `--open-requests`, which a frontend tells its clients
    and not those that ask for others, as a gateway does. None: only the frontend says so."""
    other_frontends: tuple[str, ...] = ()
    """Private addresses of the server's others, whose counts are shown with its own."""
    origins: tuple[str, ...] = ()
    """Whose pages browsers let call this server; `*`: all."""
    certificate: str | None = None
    """PEM file; None: no TLS."""
    private_key: str | None = None
    """PEM file."""
    traces: str | None = None
    """Where spans of requests are sent, by OTLP over HTTP; None: nowhere."""

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.msgpack.encode(self))

    @classmethod
    def read(cls, path: Path) -> "GatewaySettings":
        return msgspec.msgpack.decode(path.read_bytes(), type=cls)


def settings_file(folder: Path, number: int) -> Path:
    """number: of the gateway among those of its server."""
    return folder / f"gateway-{number}.msgpack"
