"""The client of an asyncio program: an AsyncEngine that is elsewhere. How a task waits is `graphgen.calls.calls`."""

import asyncio
from typing import Self, Unpack

from graphgen.calls.calls import AsyncCalls
from graphgen.ipc.ggp.messages import Health, Stats, Welcome
from graphgen.remote.address import ClientSettings
from graphgen.remote.core import RemoteCore


class AsyncClient(AsyncCalls[RemoteCore]):
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

    @property
    def info(self) -> Welcome:
        """What the server said of itself: model, limits, features."""
        return self._core.welcome
