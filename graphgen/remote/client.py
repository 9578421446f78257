"""The client of a Python program: an Engine that is elsewhere. How a thread waits is `graphgen.calls.calls`."""

from typing import Unpack

from graphgen.calls.calls import Calls
from graphgen.ipc.ggp.messages import Health, Stats, Welcome
from graphgen.remote.address import ClientSettings
from graphgen.remote.core import RemoteCore


class Client(Calls[RemoteCore]):
    """Serves what the server at `address` serves; the default is what `graphgen serve` binds.

    Call it as you would an Engine. A server with CURVE keys wants its public key as `server_key`, and as `key_file`
    the secret key file that `graphgen keys new NAME` made. Use it in a `with`, or call close(). All methods may be
    called by several threads at once.

    Raises ConnectionLostError at once when nothing listens there, when the server does not answer within
    `connect_timeout_s` (10), and later, for requests that were open, when it is lost; what only the server can refuse
    is raised as an Engine raises it.
    """

    def __init__(self, address: str | None = None, /, **settings: Unpack[ClientSettings]) -> None:
        super().__init__(RemoteCore(address, settings))

    def stats(self) -> Stats:
        """A snapshot of the server: sessions, requests, pages, steps."""
        return self._core.stats()

    def health(self) -> Health:
        """Whether the server takes requests and its worker answers; asks the worker."""
        return self._core.health()

    @property
    def info(self) -> Welcome:
        """What the server said of itself: model, limits, features."""
        return self._core.welcome
