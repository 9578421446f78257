"""The outputs of a request as they come, and their way into a stream of events.

Owns the place in which pieces, ticks and the client's leaving meet, and what ends a stream of events. Every token of
every stream passes here, so that nothing is done for one that could be done for a request. Used by the endpoints, on
the event loop.
"""

import asyncio
import functools
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.calls.prompts import OnePrompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.streams import Mailbox
from graphgen.gateway.errors import ApiError, error_of
from graphgen.gateway.http import GoneError, Receive, Send, begin_events, end_events, send_event, until_gone
from graphgen.gateway.schema import PromptTokensDetails, Usage
from graphgen.remote.core import RemoteCore
from graphgen.remote.requests import Parsing

TICK_S = 10.0
"""A stream that has had nothing to say for so long sends a comment: proxies cut silent ones."""

Batch = Sequence[tuple[int, StreamPiece]]
"""What has come of a request's outputs: the number of the prompt, and a piece."""


class Outputs(Protocol):
    """The outputs of a request, as they come."""

    async def next(self) -> Batch | None:
        """What has come since the last call; empty after a silence, None when all outputs have ended."""


class EventWriter(Protocol):
    """How outputs become events."""

    def news(self, batch: Batch) -> bytes:
        """The events of what has come. Not empty."""

    async def end(self) -> bytes:
        """Those behind the last output."""

    def failed(self, error: ApiError) -> bytes:
        """What ends a stream that cannot go on."""


async def send_outputs(send: Send, outputs: Outputs, writer: EventWriter) -> None:
    """An answer of events. It begins with the first of them: what ends them before that is raised, and may still have a
    status. What ends them later is told by a last event; a client that is gone is told nothing."""
    has_begun = False
    try:
        while (batch := await outputs.next()) is not None:
            data = writer.news(batch)
            if not has_begun:
                has_begun = True
                await begin_events(send)
            await send_event(send, data)
        await send_event(send, await writer.end())
    except Exception as error:
        if isinstance(error, GoneError) or not has_begun:
            raise
        await send_event(send, writer.failed(error_of(error)))
    await end_events(send)


class NoOutputs:
    """The outputs of prompts that are echoed alone: nothing is computed."""

    def __init__(self, prompt_lens: Sequence[int], n: int) -> None:
        self._batch: Batch | None = [
            (number, StreamPiece("", (), "length", cached_tokens=0, sample_index=index, prompt_tokens=length))
            for number, length in enumerate(prompt_lens)
            for index in range(n)
        ]

    async def next(self) -> Batch | None:
        """See Outputs."""
        batch, self._batch = self._batch, None
        return batch


class Tally:
    """Counts the tokens of a request."""

    def __init__(self, num_prompts: int, without_output: bool = False) -> None:
        """without_output: of a request that wants its prompt alone."""
        self._without_output = without_output
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens = [0] * num_prompts
        self._output_tokens = 0

    def add(self, number: int, piece: StreamPiece) -> None:
        """A piece of prompt `number`."""
        self._prompt_tokens[number] = piece.prompt_tokens
        if piece.sample_index == 0:
            self._cached_tokens[number] = piece.cached_tokens
        self._output_tokens += 0 if self._without_output else len(piece.token_ids)

    @property
    def usage(self) -> Usage:
        prompt = sum(self._prompt_tokens)
        details = PromptTokensDetails(sum(self._cached_tokens))
        return Usage(prompt, self._output_tokens, prompt + self._output_tokens, details)


class _Arrivals:
    """What has come for one reader, who takes all of it at once: an asyncio.Queue costs a token three times as much."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Delivery | None]] = []  # None: a tick
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_empty(self) -> bool:
        return not self._items

    def put_nowait(self, item: tuple[int, Delivery | None]) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[tuple[int, Delivery | None]]:
        """Not empty."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items


class Pieces:
    """The pieces of all outputs of a request. Left early, for whatever reason, it ends the request."""

    def __init__(
        self,
        core: RemoteCore,
        mailbox: Mailbox,
        prompts: Sequence[OnePrompt],
        sampling: SamplingParams,
        tenant: str,
        log_id: str,
        receive: Receive,
        parsing: Parsing,
    ) -> None:
        """log_id: what logs call it. receive: of the request, read to its end. Raises GraphgenError with nothing
        sent."""
        self._core = core
        self._receive = receive
        self._arrived = _Arrivals()
        self._failure: Exception | None = None  # behind the pieces that came with it
        sinks = [functools.partial(self._put, mailbox, number) for number in range(len(prompts))]
        self._request_ids = core.open(
            prompts, sampling, streams=True, sinks=sinks, tenant=tenant, parsing=parsing, log_id=log_id
        )
        self._num_open = len(self._request_ids)
        self._beside: list[asyncio.Task[None]] = []

    def _put(self, mailbox: Mailbox, number: int, delivery: Delivery) -> None:
        """The sink of prompt `number`, on the connection's thread."""
        mailbox.put(self._arrived, (number, delivery))

    async def __aenter__(self) -> Self:
        self._beside = [asyncio.create_task(work()) for work in (self._watch, self._tick)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._beside:
            task.cancel()
        if self._num_open:
            self._num_open = 0
            self._core.cancel(self._request_ids)

    async def next(self) -> Batch | None:
        """See Outputs. Raises what ended the request, GoneError when its client left."""
        if self._failure is not None:
            raise self._failure
        if not self._num_open:
            return None
        batch: list[tuple[int, StreamPiece]] = []
        for number, one in await self._arrived.take():
            if isinstance(one, StreamPiece):
                batch.append((number, one))
                self._num_open -= one.finish_reason is not None
            elif isinstance(one, Exception):
                self._failure = self._failure or one
        if self._failure is not None and not batch:
            raise self._failure
        return batch

    async def _watch(self) -> None:
        await until_gone(self._receive)
        self._arrived.put_nowait((0, GoneError()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self._arrived.is_empty:
                self._arrived.put_nowait((0, None))
