"""The outputs of a request as they come, and their way into a stream of events.

Owns the place in which pieces, ticks and the client's leaving meet, and what ends a stream of events. Every token of
every stream passes here, so that nothing is done for one that could be done for a request or a step: what comes in the
middle of a stream is written by one callback for all streams, and a request's task wakes for its beginning, its end
and what is not usual. Used by the endpoints, on the event loop.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, cast

from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.calls.prompts import OnePrompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.streams import Mailbox
from graphgen.gateway.errors import ApiError
from graphgen.gateway.http import (
    BODY_WRITER,
    BodyWriter,
    GoneError,
    Receive,
    Scope,
    Send,
    answer_of,
    begin_events,
    end_events,
    send_event,
    until_gone,
)
from graphgen.gateway.schema import PromptTokensDetails, Usage
from graphgen.remote.core import RemoteCore
from graphgen.remote.requests import Parsing

TICK_S = 10.0
"""A stream that has had nothing to say for so long sends a comment: proxies cut silent ones."""

Batch = Sequence[tuple[int, StreamPiece]]
"""What has come of a request's outputs: the number of the prompt, and a piece."""
Write = Callable[[Batch], bool]
"""Writes what has come without waiting; False, with nothing done, where that cannot be."""


class Outputs(Protocol):
    """The outputs of a request, as they come."""

    async def next(self, write: Write | None = None) -> Batch | None:
        """What has come since the last call; empty after a silence, None when all outputs have ended.

        write: is given what comes meanwhile in the middle of the outputs, and next() returns the first that it does not
        take. What it raises is raised here."""


class EventWriter(Protocol):
    """How outputs become events."""

    def news(self, batch: Batch) -> bytes:
        """The events of what has come. Not empty."""

    async def end(self) -> bytes:
        """Those behind the last output."""

    def failed(self, error: ApiError) -> bytes:
        """What ends a stream that cannot go on."""


async def send_outputs(scope: Scope, send: Send, outputs: Outputs, writer: EventWriter) -> None:
    """An answer of events. It begins with the first of them: what ends them before that is raised, and may still have a
    status. What ends them later is told by a last event; a client that is gone is told nothing."""
    body: BodyWriter | None = scope.get(BODY_WRITER)

    def write(batch: Batch) -> bool:
        if body is None or not body.is_ready:
            return False
        body.write(writer.news(batch))
        return True

    has_begun = False
    try:
        while (batch := await outputs.next(write)) is not None:
            data = writer.news(batch)
            if not has_begun:
                has_begun = True
                await begin_events(send)
            await send_event(send, data)
        await send_event(send, await writer.end())
    except Exception as error:
        if isinstance(error, GoneError) or not has_begun:
            raise
        await send_event(send, writer.failed(answer_of(error, scope)))
    await end_events(send)


class NoOutputs:
    """The outputs of prompts that are echoed alone: nothing is computed."""

    def __init__(self, prompt_lens: Sequence[int], n: int) -> None:
        self._batch: Batch | None = [
            (number, StreamPiece("", (), "length", cached_tokens=0, sample_index=index, prompt_tokens=length))
            for number, length in enumerate(prompt_lens)
            for index in range(n)
        ]

    async def next(self, write: Write | None = None) -> Batch | None:
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


class Turn:
    """Whom something has come for in this turn of the event loop. One callback serves them all."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self._readers: list[_Arrivals] = []

    def add(self, reader: "_Arrivals") -> None:
        if not self._readers:
            self.mailbox.loop.call_soon(self._serve)
        self._readers.append(reader)

    def _serve(self) -> None:
        readers, self._readers = self._readers, []
        for reader in readers:
            reader.serve()


_Item = tuple[int, Delivery | None]
"""The number of a prompt and what has come of it; None: a tick."""


class _Arrivals:
    """What has come for one reader, who takes all of it at once: an asyncio.Queue costs a token three times as much."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._items: list[_Item] = []
        self._waiter: asyncio.Future[None] | None = None
        self._write: Write | None = None

    @property
    def is_empty(self) -> bool:
        return not self._items

    def put_nowait(self, item: _Item) -> None:
        self._items.append(item)
        if len(self._items) == 1:
            self._turn.add(self)

    def serve(self) -> None:
        """Writes what has come if its reader waits and lets it, else wakes the reader."""
        waiter = self._waiter
        if waiter is None or waiter.done() or not self._items:
            return
        try:
            if self._write is not None and _is_middle(self._items) and self._write(cast("Batch", self._items)):
                self._items = []
            else:
                waiter.set_result(None)
        except Exception as error:  # is its reader's, and no other's
            waiter.set_exception(error)

    async def take(self, write: Write | None) -> list[_Item]:
        """Not empty. write: see Outputs."""
        self._write = write
        while not self._items:
            self._waiter = self._turn.mailbox.loop.create_future()
            await self._waiter
        items, self._items = self._items, []
        return items


def _is_middle(items: Sequence[_Item]) -> bool:
    """Whether they are all pieces behind which more comes."""
    for _, one in items:  # noqa: SIM110  # a generator for all() takes as long as an event
        if type(one) is not StreamPiece or one.finish_reason is not None:
            return False
    return True


class Pieces:
    """The pieces of all outputs of a request. Left early, for whatever reason, it ends the request."""

    def __init__(
        self,
        core: RemoteCore,
        turn: Turn,
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
        self._arrived = _Arrivals(turn)
        self._failure: Exception | None = None  # behind the pieces that came with it
        sinks = [functools.partial(self._put, turn.mailbox, number) for number in range(len(prompts))]
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

    async def next(self, write: Write | None = None) -> Batch | None:
        """See Outputs. Raises what ended the request, GoneError when its client left."""
        if self._failure is not None:
            raise self._failure
        if not self._num_open:
            return None
        batch: list[tuple[int, StreamPiece]] = []
        for number, one in await self._arrived.take(write):
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
