"""The iterators that `stream` and `AsyncEngine.generate` return.

Own the way of pieces from the receiving thread to one reader, and the promise that a reader who leaves early ends the
request: by close, by `with`, by an exception, by cancellation, or by dropping the iterator.
"""

import asyncio
import queue
from collections import deque
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeVar

from graphgen.calls.outputs import Delivery, Sink, StreamPiece
from graphgen.calls.sampling_params import SamplingParams
from graphgen.ipc.errors import InvalidRequestError

Item = TypeVar("Item")
Taken = TypeVar("Taken", contravariant=True)


class RequestCore(Protocol):
    """Where streams send their requests: an engine's core, or a server's."""

    def open(
        self,
        prompts: Sequence[Any],  # what a prompt may be is the core's own business
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        streams: bool,
        sinks: Sequence[Sink],
    ) -> list[int]: ...

    def cancel(self, request_ids: Sequence[int]) -> None: ...

    def check_process(self) -> None: ...


class Stream:
    """Iterator over the pieces of one prompt's output, or of its n outputs."""

    def __init__(self, core: RequestCore, prompt: object, sampling: SamplingParams | None) -> None:
        self._num_open = 0  # first, so that __del__ works if the request is refused
        self._core = core
        self._pieces: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.request_ids = core.open([prompt], sampling, streams=True, sinks=[self._pieces.put])
        self._num_open = len(self.request_ids)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamPiece:
        if not self._num_open:
            raise StopIteration
        self._core.check_process()
        try:
            piece = _piece_or_raise(self._pieces.get())
        except BaseException:
            self.close()
            raise
        self._num_open -= piece.finish_reason is not None
        return piece

    def close(self) -> None:
        """Ends the request if it has not ended; its pages are free in the next step."""
        if self._num_open:
            self._num_open = 0
            self._core.cancel(self.request_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncStream:
    """Asynchronous iterator over the pieces of one prompt's outputs, for one task of the loop that made it."""

    def __init__(self, core: RequestCore, mailbox: "Mailbox", prompt: object, sampling: SamplingParams | None) -> None:
        self._num_open = 0
        self._core = core
        pieces: asyncio.Queue[Delivery] = asyncio.Queue()
        self._pieces = pieces
        self.request_ids = core.open(
            [prompt], sampling, streams=True, sinks=[lambda delivery: mailbox.put(pieces, delivery)]
        )
        self._num_open = len(self.request_ids)

    def __aiter__(self) -> Self:
        return self

    def __await__(self) -> Generator[Any, None, NoReturn]:
        raise InvalidRequestError(
            "a stream is not awaited: read it with `async for piece in ...`, or await the whole outputs of complete()"
        )

    async def __anext__(self) -> StreamPiece:
        if not self._num_open:
            raise StopAsyncIteration
        self._core.check_process()
        try:
            piece = _piece_or_raise(await self._pieces.get())
        except BaseException:
            self._cancel()
            raise
        self._num_open -= piece.finish_reason is not None
        return piece

    async def aclose(self) -> None:
        """Ends the request if it has not ended; its pages are free in the next step."""
        self._cancel()

    def _cancel(self) -> None:
        if self._num_open:
            self._num_open = 0
            self._core.cancel(self.request_ids)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    def __del__(self) -> None:
        self._cancel()


class Place(Protocol[Taken]):
    """Where a mailbox puts what came for one reader, on the reader's loop: an asyncio.Queue, for one."""

    def put_nowait(self, item: Taken, /) -> None: ...


class Mailbox:
    """Brings deliveries from the receiving thread into one event loop, with one wake-up for all that wait.

    A step has a token for every running request: a wake-up each would cost more than the tokens.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[tuple[Place[Any], Any]] = deque()  # each place has items of its own kind
        self._is_scheduled = False

    def put(self, place: Place[Item], item: Item) -> None:
        """Called on the receiving thread. Raises RuntimeError when the loop is closed."""
        self._waiting.append((place, item))
        if not self._is_scheduled:
            self._is_scheduled = True
            self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        # The flag falls first: what is put after this line schedules a call of its own.
        self._is_scheduled = False
        while self._waiting:
            place, item = self._waiting.popleft()
            place.put_nowait(item)


def _piece_or_raise(delivery: Delivery) -> StreamPiece:
    if isinstance(delivery, Exception):
        raise delivery
    assert isinstance(delivery, StreamPiece), "a streaming request gets pieces"
    return delivery
