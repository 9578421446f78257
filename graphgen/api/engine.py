"""The engine of a Python program, for threads and for the tasks of an event loop.

Owns its start and its end. How a thread or a task waits for outputs is `graphgen.calls.calls`; everything else is
`graphgen.api.core` and `graphgen.requests.core`.
"""

import asyncio
from typing import Self, Unpack

from graphgen.api.core import DRAIN_S, EngineCore
from graphgen.calls.calls import AsyncCalls, Calls
from graphgen.ipc.engine_messages import EngineStats, Ready
from graphgen.launch.config import EngineConfig, EngineSettings, make_config
from graphgen.launch.launch_config import LaunchConfig
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
    """Serves one model in processes of its own.

    `Engine()` serves the embedded demo model; `Engine("folder or hub id", ...)` and `Engine(EngineConfig(...))` any
    other. The constructor returns when the engine serves. Use it in a `with`, or call close(); a program that ends in
    any other way leaves no process behind either. All methods may be called by several threads at once.

    Raises ConfigError, UnsupportedModelError or CheckpointError for what cannot be served, EngineDeadError when a
    process ends during the start.
    """

    def __init__(self, model: str | EngineConfig | None = None, /, **settings: Unpack[EngineSettings]) -> None:
        super().__init__(EngineCore(make_config(model, settings)))

    def stats(self) -> EngineStats:
        """A snapshot of what runs and waits, of pages, steps and step times. With replicas the counts are those of all
        and the step times those of the slowest; `engines` has each one's own, None for one that does not serve now."""
        return self._core.stats()

    def drain(self, replica: int, grace_s: float = DRAIN_S) -> None:
        """Takes one of several replicas out of service, and returns when its processes have ended and its device is
        free. It gets no new requests; what is open there after `grace_s` goes on at the others, so nothing is lost.

        replica: its number, from 0. Raises ConfigError for one that there is not, EngineDeadError where it does not
        serve or no other replica does.
        """
        self._core.drain(replica, grace_s)

    def resume(self, replica: int, timeout_s: float = 600.0) -> None:
        """Starts a replica again that was drained, or that had ended too often, and returns when it serves. Raises
        ConfigError for one that there is not, EngineDeadError when it does not serve in time."""
        self._core.resume(replica, timeout_s)


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

    async def drain(self, replica: int, grace_s: float = DRAIN_S) -> None:
        """As Engine.drain, without holding up the loop."""
        await asyncio.to_thread(self._core.drain, replica, grace_s)

    async def resume(self, replica: int, timeout_s: float = 600.0) -> None:
        """As Engine.resume, without holding up the loop."""
        await asyncio.to_thread(self._core.resume, replica, timeout_s)
