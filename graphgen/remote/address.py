"""Where a server is and how to prove who one is: what a client is made of."""

from pathlib import Path
from typing import TypedDict

import zmq
import zmq.auth
from msgspec import Struct

from graphgen.ipc.errors import ConfigError


class ClientSettings(TypedDict, total=False):
    """The keyword arguments of Client and AsyncClient."""

    server_key: str | None
    key_file: str | Path | None
    connect_timeout_s: float


class ServerAddress(Struct, frozen=True, kw_only=True):
    """A server's data socket. With `server_key`, its public CURVE key, `key_file` is one's own secret key file."""

    address: str
    server_key: str | None = None
    key_file: str | Path | None = None
    connect_timeout_s: float = 10.0

    def connect(self, context: "zmq.Context[zmq.Socket[bytes]]") -> "zmq.Socket[bytes]":
        """A DEALER on its way to the server. Raises ConfigError for an address or keys that cannot work."""
        if (self.server_key is None) != (self.key_file is None):
            raise ConfigError("one of server_key and key_file is missing: a server with keys needs both")
        socket = context.socket(zmq.DEALER)
        try:
            socket.set_hwm(0)  # what is sent is bounded by the server's limits
            socket.set(zmq.LINGER, 0)
            if self.server_key is not None and self.key_file is not None:
                public, secret = zmq.auth.load_certificate(Path(self.key_file).expanduser())
                if secret is None:
                    raise ConfigError(f"{self.key_file} holds no secret key: give the file NAME.key_secret")
                socket.set(zmq.CURVE_SERVERKEY, self.server_key.encode())
                socket.set(zmq.CURVE_PUBLICKEY, public)
                socket.set(zmq.CURVE_SECRETKEY, secret)
            socket.connect(self.address)
        except (zmq.ZMQError, OSError, ValueError) as error:
            socket.close()
            raise ConfigError(f"cannot connect to {self.address!r} with these keys: {error}") from None
        except ConfigError:
            socket.close()
            raise
        return socket
