"""Where a server is and how to prove who one is: what a client is made of."""

import contextlib
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, TypedDict

import zmq
import zmq.auth
from msgspec import Struct
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from graphgen.base.addresses import check_connectable
from graphgen.base.keywords import KnownKeywords, type_problem
from graphgen.ipc.errors import ConfigError, ConnectionLostError, GraphgenError

MAX_TIMEOUT_S = 86_400.0
KEY_BYTES = 32
REFUSED_S = 0.5
"""How long a server may refuse connections before there is none: one that is started again is back by then."""


class ClientSettings(TypedDict, total=False):
    """The keyword arguments of Client and AsyncClient."""

    server_key: str | None
    key_file: str | Path | None
    connect_timeout_s: float


class ServerAddress(Struct, frozen=True, kw_only=True, metaclass=KnownKeywords):
    """A server's data socket. With `server_key`, its public CURVE key, `key_file` is one's own secret key file."""

    address: str
    server_key: str | None = None
    key_file: str | Path | None = None
    connect_timeout_s: float = 10.0

    refused_with: ClassVar[type[Exception]] = ConfigError
    called: ClassVar[str] = "Client"

    def __post_init__(self) -> None:
        for name, expected in (("address", str), ("server_key", str | None), ("connect_timeout_s", float)):
            if (problem := type_problem(getattr(self, name), expected)) is not None:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: {problem}")
        if not 0 < self.connect_timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(f"connect_timeout_s is {self.connect_timeout_s}: use seconds up to {MAX_TIMEOUT_S:g}")

    def connect(self, context: "zmq.Context[zmq.Socket[bytes]]") -> "zmq.Socket[bytes]":
        """A DEALER that is connected to the server, or that still tries to after `connect_timeout_s`.

        Raises ConfigError for an address or keys that cannot work, ConnectionLostError where nothing listens.
        """
        socket = self.make_socket(context)
        events = zmq.EVENT_CONNECTED | zmq.EVENT_CONNECT_RETRIED
        with self._closed_on_failure(socket), socket.get_monitor_socket(events) as monitor:
            socket.connect(self.address)
            self._wait_connected(monitor)
            socket.disable_monitor()
        return socket

    def make_socket(self, context: "zmq.Context[zmq.Socket[bytes]]") -> "zmq.Socket[bytes]":
        """A DEALER with the keys, which is not connected yet. Raises ConfigError for an address or keys that cannot
        work."""
        check_connectable(self.address)
        if (self.server_key is None) != (self.key_file is None):
            raise ConfigError("one of server_key and key_file is missing: a server with keys needs both")
        socket = context.socket(zmq.DEALER)
        with self._closed_on_failure(socket):
            socket.set_hwm(0)  # what is sent is bounded by the server's limits
            socket.set(zmq.LINGER, 0)
            if self.server_key is not None and self.key_file is not None:
                public, secret = _read_keys(self.key_file)
                socket.set(zmq.CURVE_SERVERKEY, _check_key(self.server_key))
                socket.set(zmq.CURVE_PUBLICKEY, public)
                socket.set(zmq.CURVE_SECRETKEY, secret)
        return socket

    @contextlib.contextmanager
    def _closed_on_failure(self, socket: "zmq.Socket[bytes]") -> Iterator[None]:
        """What libzmq and the system say becomes a ConfigError."""
        try:
            yield
        except GraphgenError:
            socket.close()
            raise
        except (zmq.ZMQError, OSError, ValueError) as error:
            socket.close()
            raise ConfigError(f"cannot connect to {self.address!r}: {error}") from None

    def _wait_connected(self, monitor: "zmq.Socket[bytes]") -> None:
        """Returns when there is a connection, or when the time is over. libzmq tries again for ever where nothing
        listens; that is told soon, since it is most often a server that was not started."""
        begun_s = time.monotonic()
        is_refused = False
        while (waited_s := time.monotonic() - begun_s) < self.connect_timeout_s:
            if is_refused and waited_s > REFUSED_S:
                break
            if monitor.poll(int((self.connect_timeout_s - waited_s) * 1000) + 1):
                is_refused = recv_monitor_message(monitor)["event"] == zmq.EVENT_CONNECT_RETRIED
                if not is_refused:
                    return
        if is_refused:
            raise ConnectionLostError(
                f"nothing listens at {self.address}: start a server there with `graphgen serve`, or give the address of"
                " one that runs"
            )


def _check_key(server_key: str) -> bytes:
    try:
        if len(z85.decode(server_key)) == KEY_BYTES:
            return server_key.encode()
    except (ValueError, KeyError, struct.error):
        pass
    raise ConfigError(f"server_key is {server_key!r}: give the 40 characters of public-key in the server's server.key")


def _read_keys(key_file: str | Path) -> tuple[bytes, bytes]:
    """(public, secret) of a client's own file."""
    path = Path(key_file).expanduser()
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"key_file {str(path)!r} cannot be read ({error}): give the file NAME.key_secret that"
            " `graphgen keys new NAME` made"
        ) from None
    if secret is None:
        raise ConfigError(f"{path} holds no secret key: give the file NAME.key_secret")
    return public, secret
