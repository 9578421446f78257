"""How a server is reached and when it gives up: the options of `graphgen serve` beside those of the engine."""

import ipaddress
from pathlib import Path
from typing import Literal

from msgspec import Struct

from graphgen.base.addresses import check_address, check_connectable, control_address, frontend_address
from graphgen.base.logs import LogFormat
from graphgen.gateway import keys as http_keys
from graphgen.gateway.output_parsers.formats import ReasoningParser, ToolParser
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.messages import DEFAULT_ADDRESS
from graphgen.server.frontend.keys import Keys, default_folder
from graphgen.server.http_address import check_http

MAX_HTTP_WORKERS = 64
MAX_FRONTENDS = 16
"""One feeds about ten engines."""
MAX_S = 86_400.0
MAX_MEMORY_MIB = 1 << 20
MAX_OPEN_REQUESTS = 1 << 20


class ServeOptions(Struct, frozen=True, kw_only=True):
    """How a server is reached and when it gives up. Raises ConfigError for what would be open to strangers."""

    data: str = DEFAULT_ADDRESS
    """Address of the data socket: tcp://HOST:PORT or ipc://PATH."""
    control: str | None = None
    """Address of the control socket. None: beside the data socket's, the next port."""
    frontends: int = 1
    """Processes that serve the protocol and share the engines. Each has two ports, for its data socket and its control
    socket, counted on from those of the first."""
    keys: str | None = None
    """Folder of keys, see `graphgen keys`: who has none of them is not let in. None: no keys; on a public address those
    of $GRAPHGEN_KEYS or ~/.config/graphgen/keys."""
    engines: str | None = None
    """Addresses of servers elsewhere, with commas between, whose engines serve: tcp://HOST:PORT,tcp://HOST:PORT. This
    server has none of its own then. None: its own engines serve."""
    engine_keys: str | None = None
    """Folder with frontend.key_secret and the engines' server.key, or HOST_PORT.key where one has another. None: the
    engines want no keys."""
    http: str | None = None
    """Address of OpenAI's API over HTTP, HOST:PORT. None: no HTTP."""
    http_workers: int = 1
    """Processes that serve HTTP, all on its address; each has memory_limit_mib."""
    http_origins: str | None = None
    """Origins whose web pages may call HTTP, with commas between; `*` is all. None: no other page may."""
    http_cert: str | None = None
    """Certificate of HTTP over TLS, a PEM file with its chain. None: no TLS."""
    http_key: str | None = None
    """Private key of the certificate, a PEM file. None: no TLS."""
    http_traces: str | None = None
    """Where a span of each HTTP request is sent, by OpenTelemetry's OTLP over HTTP: http://HOST:4318/v1/traces. None:
    nowhere."""
    served_model_name: str | None = None
    """What HTTP clients call the model. None: as it is called here."""
    metrics_names: Literal["graphgen", "vllm"] = "graphgen"
    """What `/metrics` calls its metrics: graphgen_*, or vLLM's names, for routers and dashboards that read those."""
    tool_parser: ToolParser = "auto"
    """How the model writes its tool calls, for HTTP clients; auto goes by its chat template."""
    reasoning_parser: ReasoningParser = "auto"
    """How the model writes what it thinks, for HTTP clients; auto goes by its chat template and its tokens."""
    insecure_public: bool = False
    """Let everyone in who can reach a public address."""
    grace_s: float = 30.0
    """Seconds that open requests have to finish after SIGTERM."""
    memory_limit_mib: int = 1024
    """Memory of the frontend beyond what it needs when idle, in MiB."""
    slow_consumer_s: float = 60.0
    """Seconds after which a client that reads nothing is cut off."""
    open_requests: int = 256
    """Most open requests of one client."""
    log_format: LogFormat = "text"
    """How every process of the server logs: text, or a JSON object a line."""
    log_requests: bool = True
    """Write a line for each request that ends, to standard error: who asked, tokens, times; never what was said."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("grace_s", 0, MAX_S),
            ("memory_limit_mib", 64, MAX_MEMORY_MIB),
            ("slow_consumer_s", 1, MAX_S),
            ("open_requests", 1, MAX_OPEN_REQUESTS),
            ("http_workers", 1, MAX_HTTP_WORKERS),
            ("frontends", 1, MAX_FRONTENDS),
        ):
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"{name} is {value}, the least is {least}: raise it")
            if value > most:
                raise ConfigError(f"{name} is {value}, the limit is {most:.0f}: lower it")
        check_address(self.data)  # from which the control socket's follows
        check_address(self.control_address)
        for address in self.engine_addresses:
            check_connectable(address)
        self._check_engines()
        self._check_apart()
        if self.http is not None:
            check_http(self.http)
            if is_public(f"tcp://{self.http}") and self.http_key_folder is None and not self.insecure_public:
                raise ConfigError(
                    f"http://{self.http} can be reached by other machines and there are no API keys: make some with"
                    " `graphgen keys http NAME` and name their folder with --keys, or say --insecure-public to let"
                    " everyone in"
                )
        folder = self.key_folder
        if folder is not None:
            Keys(folder).server_secret_key()
            return
        for address in (self.data, self.control_address):
            if is_public(address) and not self.insecure_public:
                raise ConfigError(
                    f"{address} can be reached by other machines and there are no keys: make some with `graphgen keys"
                    " new` and name their folder with --keys, or say --insecure-public to let everyone in"
                )

    @property
    def control_address(self) -> str:
        """Where the control socket is bound."""
        return self.control or control_address(self.data)

    @property
    def addresses(self) -> tuple[tuple[str, str], ...]:
        """Where each frontend's data socket and its control socket are bound."""
        control = self.control_address
        return tuple(
            (frontend_address(self.data, number), frontend_address(control, number)) for number in range(self.frontends)
        )

    def _check_apart(self) -> None:
        """Of several frontends no two sockets may be at one address."""
        bound = [address for both in self.addresses for address in both]
        for place, address in enumerate(bound):
            if self.frontends > 1 and address in bound[:place]:
                raise ConfigError(
                    f"{address} would be bound twice: {self.frontends} frontends have two ports each, counted on from"
                    f" {self.data} and {self.control_address}; leave --control out, or move it"
                )

    def _check_engines(self) -> None:
        if self.engines is not None and not self.engine_addresses:
            raise ConfigError(f"engines is {self.engines!r}: name at least one, tcp://HOST:PORT")
        if self.engine_keys is not None and self.engines is None:
            raise ConfigError(f"engine_keys is {self.engine_keys!r} without engines: name these, or leave it out")
        if self.engines is not None and self.frontends > 1:
            raise ConfigError(
                f"frontends is {self.frontends}, and the engines are elsewhere: start as many servers with engines as"
                " there shall be frontends, each routes alone"
            )
        for place, address in enumerate(self.engine_addresses):
            if address in self.engine_addresses[:place]:
                raise ConfigError(f"engines names {address} twice: name each engine once")

    @property
    def engine_addresses(self) -> tuple[str, ...]:
        """Those of `engines`."""
        return tuple(address.strip() for address in (self.engines or "").split(",") if address.strip())

    @property
    def has_tls(self) -> bool:
        """Whether HTTP is spoken over TLS."""
        return self.http_cert is not None

    @property
    def origins(self) -> tuple[str, ...]:
        """Those of `http_origins`."""
        return tuple(origin.strip() for origin in (self.http_origins or "").split(",") if origin.strip())

    @property
    def http_key_folder(self) -> Path | None:
        """The folder of the API keys that HTTP asks for, absolute; None: it asks for none."""
        if self.http is None or (self.keys is None and not is_public(f"tcp://{self.http}")):
            return None
        folder = (default_folder() if self.keys is None else Path(self.keys).expanduser().absolute()) / http_keys.FOLDER
        return folder if http_keys.has_keys(folder) else None

    @property
    def key_folder(self) -> Path | None:
        """The folder of the keys that are asked for, absolute; None: no keys are."""
        if self.keys is not None:
            return Path(self.keys).expanduser().absolute()
        is_reached = is_public(self.data) or is_public(self.control_address)
        return default_folder() if is_reached and Keys(default_folder()).has_server_key else None


def is_public(address: str) -> bool:
    """Whether other machines can reach a socket bound to it."""
    scheme, _, rest = address.partition("://")
    if scheme != "tcp":
        return scheme != "ipc"
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a wildcard, or the name of an interface
        return True
