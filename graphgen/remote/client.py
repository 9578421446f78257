"""The client of a Python program, for threads and for the tasks of an event loop: an engine that is elsewhere.

Owns no thread and no socket, which are the connection's. How a thread or a task waits for outputs is
`graphgen.calls.calls`.
"""

import asyncio
from typing import Self, Unpack

from graphgen.calls.calls import AsyncCalls, Calls
from graphgen.ipc.ggp.messages import Health, Stats, Welcome
from graphgen.remote.address import ClientSettings
from graphgen.remote.core import RemoteCore


class _Facts:
    """What both clients tell of their server without asking it."""

    _core: RemoteCore

    @property
    def info(self) -> Welcome:
        """What the server said of itself: model, limits, features."""
        return self._core.welcome


class Client(_Facts, Calls[RemoteCore]):
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


class AsyncClient(_Facts, AsyncCalls[RemoteCore]):
    """Serves what a server serves to the tasks of an event loop.

    The constructor takes what Client's takes and waits for the server, so call it before the loop runs; in a running
    loop use `await AsyncClient.create(...)`. Close it with `async with` or `await close()`.
    """

    def __init__(self, address: str | None = None, /, **settings: Unpack[ClientSettings]) -> None:
        super().__init__(RemoteCore(address, settings))

    @classmethod
    async def create(cls, address: str | None = None, /, **settings: Unpack[ClientSettings]) -> Self:
        """The constructor, without holding up the loop."""
        return await asyncio.to_thread(lambda: cls(address, **settings))

    async def stats(self) -> Stats:
        """A snapshot of the server: sessions, requests, pages, steps."""
        return await asyncio.to_thread(self._core.stats)

    async def health(self) -> Health:
        """Whether the server takes requests and its worker answers; asks the worker."""
        return await asyncio.to_thread(self._core.health)
