"""The engine of an asyncio program. Owns its start and its end; how a task waits is `graphgen.calls.calls`."""

import asyncio
from typing import Self, Unpack

from graphgen.calls.calls import AsyncCalls
from graphgen.ipc.messages import EngineStats, Ready
from graphgen.launch.config import EngineConfig, EngineSettings, make_config
from graphgen.requests.core import EngineCore
from graphgen.requests.tokenizer import Tokenizer


class AsyncEngine(AsyncCalls[EngineCore]):
    """Serves one model to the tasks of an event loop.

    The constructor takes what Engine's takes and waits for the start, so call it before the loop runs; in a running
    loop use `await AsyncEngine.create(...)`. Close it with `async with` or `await close()`.
    """

    def __init__(self, model: str | EngineConfig | None = None, /, **settings: Unpack[EngineSettings]) -> None:
        super().__init__(EngineCore(make_config(model, settings)))

    @classmethod
    async def create(cls, model: str | EngineConfig | None = None, /, **settings: Unpack[EngineSettings]) -> Self:
        """The constructor, without holding up the loop."""
        return await asyncio.to_thread(lambda: cls(model, **settings))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer: encode, decode, render_chat. Raises InvalidRequestError where there is none."""
        return self._core.tokenizer

    async def stats(self) -> EngineStats:
        """A snapshot of what runs and waits, of pages, steps and step times."""
        return await asyncio.to_thread(self._core.stats)

    @property
    def info(self) -> Ready:
        """What the engine decided at its start: device, attention backend, buckets, pages, phases."""
        return self._core.ready
