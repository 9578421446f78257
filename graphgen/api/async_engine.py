"""The engine of an asyncio program. Owns how a task waits for tokens; everything else is `graphgen.requests.core`."""

import asyncio
from types import TracebackType
from typing import Self, Unpack

from graphgen.ipc.messages import EngineStats, Ready
from graphgen.launch.config import EngineConfig, EngineSettings, make_config
from graphgen.requests.core import EngineCore, Prompt
from graphgen.requests.sampling_params import SamplingParams
from graphgen.requests.streams import AsyncStream, Mailbox


class AsyncEngine:
    """Serves one model to the tasks of an event loop.

    The constructor takes what Engine's takes and waits for the start, so call it before the loop runs; in a running
    loop use `await AsyncEngine.create(...)`. Close it with `async with` or `await close()`.
    """

    def __init__(self, model: str | EngineConfig | None = None, /, **settings: Unpack[EngineSettings]) -> None:
        self._core = EngineCore(make_config(model, settings))
        self._mailbox: Mailbox | None = None

    @classmethod
    async def create(cls, model: str | EngineConfig | None = None, /, **settings: Unpack[EngineSettings]) -> Self:
        """The constructor, without holding up the loop."""
        return await asyncio.to_thread(lambda: cls(model, **settings))

    def generate(self, prompt: Prompt, sampling: SamplingParams | None = None) -> AsyncStream:
        """`async for piece in engine.generate(...)`: the output of one prompt as it is made.

        Called in a running loop. The prompt is checked and sent by this call; raises as Engine.generate does, refusals
        and missed deadlines from the iterator. With n > 1 the pieces carry their sample_index. Leaving
        the iterator early (break, cancellation of the task, aclose()) ends the request and frees its pages.
        """
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return AsyncStream(self._core, self._mailbox, prompt, sampling)

    async def stats(self) -> EngineStats:
        """A snapshot of what runs and waits, of pages, steps and step times."""
        return await asyncio.to_thread(self._core.stats)

    @property
    def info(self) -> Ready:
        """What the engine decided at its start: device, attention backend, buckets, pages, phases."""
        return self._core.ready

    async def close(self) -> None:
        """Ends the engine's processes and frees the device. Open requests get EngineClosedError. Idempotent."""
        await asyncio.to_thread(self._core.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
