"""The engine of a Python program, for threads and for the tasks of an event loop.

Owns its start and its end. How a thread or a task waits for outputs is `graphgen.calls.calls`; everything else is
`graphgen.requests.core`.
"""

import asyncio
from typing import Self, Unpack

from graphgen.calls.calls import AsyncCalls, Calls
from graphgen.ipc.messages import EngineStats, Ready
from graphgen.launch.config import EngineConfig, EngineSettings, LaunchConfig, make_config
from graphgen.requests.core import EngineCore
from graphgen.requests.tokenizer import Tokenizer


class _Facts:
    """What both engines tell of themselves without asking a process."""

    _core: EngineCore

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer: encode, decode, render_chat. Raises InvalidRequestError where there is none."""
        return self._core.tokenizer

    @property
    def info(self) -> Ready:
        """What the engine decided at its start: device, attention backend, buckets, pages, phases."""
        return self._core.ready

    @property
    def resolved(self) -> LaunchConfig:
        """The configuration with every choice made that the model or the device decides."""
        return self._core.launch

    @property
    def pids(self) -> dict[str, int]:
        """The engine's processes by name, for those who watch their CPU time or memory."""
        return self._core.pids

    @property
    def start_s(self) -> float:
        """Seconds from the constructor's call until the engine served."""
        return self._core.start_s

    @property
    def config(self) -> EngineConfig:
        """What was asked for."""
        return self._core.config


class Engine(_Facts, Calls[EngineCore]):
    """Serves one model in two processes of its own.

    `Engine()` serves the embedded demo model; `Engine("folder or hub id", ...)` and `Engine(EngineConfig(...))` any
    other. The constructor returns when the engine serves. Use it in a `with`, or call close(); a program that ends in
    any other way leaves no process behind either. All methods may be called by several threads at once.

    Raises ConfigError, UnsupportedModelError or CheckpointError for what cannot be served, EngineDeadError when a
    process ends during the start.
    """

    def __init__(self, model: str | EngineConfig | None = None, /, **settings: Unpack[EngineSettings]) -> None:
        super().__init__(EngineCore(make_config(model, settings)))

    def stats(self) -> EngineStats:
        """A snapshot of what runs and waits, of pages, steps and step times."""
        return self._core.stats()


class AsyncEngine(_Facts, AsyncCalls[EngineCore]):
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

    async def stats(self) -> EngineStats:
        """A snapshot of what runs and waits, of pages, steps and step times."""
        return await asyncio.to_thread(self._core.stats)
