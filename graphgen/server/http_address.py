"""The address of the HTTP gateway, and the socket that listens there.

The supervisor owns the socket and hands it to each gateway that it starts: an address in use is found before the engine
starts, and clients that connect while a gateway is started again wait.
"""

import importlib.util
import socket

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


def listen(address: str) -> socket.socket:
    """A socket that listens there. Raises ConfigError where that cannot be."""
    host, port = _split(address)
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(where[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"http://{address} cannot be bound ({error.strerror}): choose another with --http") from None


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _split(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) >= 2**16:
        raise ConfigError(f"http is {address!r}: give HOST:PORT, as 127.0.0.1:8000 or [::1]:8000; port 0 is a free one")
    return host, int(port)
