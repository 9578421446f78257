"""The client of an asyncio program: an AsyncEngine that is elsewhere."""

import asyncio
from types import TracebackType
from typing import Self, Unpack

from graphgen.ipc.ggp.messages import Health, Stats, Welcome
from graphgen.remote.address import ClientSettings
from graphgen.remote.core import RemoteCore
from graphgen.remote.requests import RemotePrompt
from graphgen.requests.sampling_params import SamplingParams
from graphgen.requests.streams import AsyncStream, Mailbox


class AsyncClient:
    """Serves what a server serves to the tasks of an event loop.

    The constructor takes what Client's takes and waits for the server, so call it before the loop runs; in a running
    loop use `await AsyncClient.create(...)`. Close it with `async with` or `await close()`.
    """

    def __init__(self, address: str | None = None, /, **settings: Unpack[ClientSettings]) -> None:
        self._core = RemoteCore(address, settings)
        self._mailbox: Mailbox | None = None

    @classmethod
    async def create(cls, address: str | None = None, /, **settings: Unpack[ClientSettings]) -> Self:
        """The constructor, without holding up the loop."""
        return await asyncio.to_thread(lambda: cls(address, **settings))

    def generate(self, prompt: RemotePrompt, sampling: SamplingParams | None = None) -> AsyncStream:
        """`async for piece in client.generate(...)`: the output of one prompt as it is made.

        Called in a running loop. Leaving the iterator early (break, cancellation of the task, aclose()) ends the
        request and frees its pages.
        """
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return AsyncStream(self._core, self._mailbox, prompt, sampling)

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

    async def close(self) -> None:
        """Ends the session; open requests get EngineClosedError. Idempotent."""
        await asyncio.to_thread(self._core.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
