"""The address of the HTTP gateway, and the socket that listens there.

The supervisor owns the socket and hands it to each gateway that it starts: an address in use is found before the engine
starts, and clients that connect while a gateway is started again wait.
"""

import importlib.util
import socket
import ssl

from graphgen.base.version import how_to_install
from graphgen.ipc.errors import ConfigError

BACKLOG = 2048
PACKAGES = ("starlette", "uvicorn", "httptools", "prometheus_client")


def check_http(address: str) -> None:
    """Raises ConfigError for what is no address of an HTTP server, and where its packages are not installed."""
    _split(address)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"HTTP needs {', '.join(missing)}: {how_to_install('http')}")


def listen(address: str, num_sockets: int = 1) -> list[socket.socket]:
    """Sockets that listen there, among which the kernel divides the connections. Raises ConfigError where that cannot
    be, also where another server listens that would share the address."""
    host, port = _split(address)
    sockets: list[socket.socket] = []
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        host = str(where[0])
        if num_sockets > 1:
            with socket.create_server((host, port), family=family) as alone:
                port = alone.getsockname()[1]
        for _ in range(num_sockets):
            shared = num_sockets > 1
            sockets.append(socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=shared))
    except OSError as error:
        for one in sockets:
            one.close()
        raise ConfigError(f"http://{address} cannot be bound ({error.strerror}): choose another with --http") from None
    return sockets


def url_of(listener: socket.socket, has_tls: bool = False) -> str:
    host, port = listener.getsockname()[:2]
    return f"http{'s' if has_tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def check_tls(certificate: str | None, private_key: str | None) -> None:
    """Raises ConfigError for files by which no TLS can be spoken."""
    if certificate is None and private_key is None:
        return
    if certificate is None or private_key is None:
        raise ConfigError("TLS needs a certificate and its key: give both --http-cert and --http-key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key)
    except OSError as error:  # an SSLError is one
        raise ConfigError(
            f"{certificate} and {private_key} are no certificate and its key ({error}): give PEM files without a"
            " password"
        ) from None


def _split(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) >= 2**16:
        raise ConfigError(f"http is {address!r}: give HOST:PORT, as 127.0.0.1:8000 or [::1]:8000; port 0 is a free one")
    return host, int(port)


def check_traces(url: str | None) -> None:
    """Where spans are to be sent. Raises ConfigError."""
    if url is None:
        return
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"http_traces is {url}: give a URL, as http://127.0.0.1:4318/v1/traces")
    if importlib.util.find_spec("opentelemetry") is None:
        raise ConfigError(f"http_traces needs OpenTelemetry: {how_to_install('otel')}")
