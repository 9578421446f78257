"""The calls that engines and clients have in common: how a thread and how a task wait for outputs.

Owns the forms in which prompts and chats may be given, and the promise that a call which does not return ends all its
requests. Knows no engine and no server: `Engine` and `Client` are Calls, `AsyncEngine` and `AsyncClient` AsyncCalls,
each with a core of its own.
"""

import asyncio
import functools
import queue
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from graphgen.calls.outputs import Delivery, RequestOutput
from graphgen.calls.prompts import Chats, Described, Prompt, batch_of, chats_of, one_prompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.streams import AsyncStream, Mailbox, RequestCore, Stream
from graphgen.ipc.errors import InvalidRequestError


class OwnCore(RequestCore, Protocol):
    """A core that ends with the engine or the client that made it."""

    def close(self) -> None: ...


Core = TypeVar("Core", bound=OwnCore)
Answer = tuple[int, Delivery]
"""Number of the prompt in its call, and what its sink got."""


class Calls(Generic[Core]):
    """What a thread calls. All methods may be called by several threads at once."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core}>"

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The outputs of all prompts, in their order; a list also for a single prompt.

        prompts: text, a list of token ids, a chat (a Chat or the list of its messages), or a list of these. sampling:
        one for all, or one for each. With n > 1 the n outputs of a prompt follow one another, by sample_index.
        Raises InvalidRequestError before any is sent if one cannot be served; OverloadedError when one is refused,
        DeadlineError when one misses its deadline, and EngineDeadError or EngineClosedError if the engine ends
        meanwhile. The first that fails ends the call, and an exception, Ctrl-C included, all its requests.
        """
        batch = batch_of(prompts)
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        sinks = [functools.partial(_answer, answers, number) for number in range(len(batch))]
        request_ids = self._core.open(batch, sampling, streams=False, sinks=sinks)
        outputs = _Outputs(len(request_ids))
        try:
            while not outputs.are_complete:
                outputs.take(*answers.get())
        except BaseException:
            self._core.cancel(request_ids)
            raise
        return outputs.in_order()

    def chat(
        self,
        chats: Chats,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Described] | None = None,
        documents: Sequence[Described] | None = None,
        chat_template_kwargs: Mapping[str, str | bool | int | float | None] | None = None,
    ) -> list[RequestOutput]:
        """The model's answer to a chat, or to each of several: `generate` of what must be a chat.

        chats: a list of messages, each a dict with `role` and `content` (text, or a list of text parts); a Chat of
        these; or a list of chats. Rendered with the model's own chat template, which is given the other arguments;
        see Chat, which may have them too.
        """
        return self.generate(chats_of(chats, tools, documents, chat_template_kwargs), sampling)

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Stream:
        """An iterator over the output of one prompt or chat as it is made. The request is sent by this call.

        With n > 1 the pieces of its outputs come mixed, each with its sample_index. Raises as `generate` does.
        Leaving the iterator before its end (break, exception, close()) ends the request and frees its pages.
        """
        return Stream(self._core, one_prompt(prompt), sampling)

    def close(self) -> None:
        """Ends it: the processes of an engine, which frees its device, or the session of a client. Open requests get
        EngineClosedError. Idempotent."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncCalls(Generic[Core]):
    """What a task of an event loop calls."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._mailbox: Mailbox | None = None  # of the loop that was last seen

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core}>"

    def generate(self, prompt: Prompt, sampling: SamplingParams | None = None) -> AsyncStream:
        """`async for piece in engine.generate(...)`: the output of one prompt or chat as it is made.

        prompt: text, a list of token ids, or a chat (a Chat or the list of its messages). Called in a running loop.
        The prompt is checked and sent by this call; raises as Engine.generate does, refusals and missed deadlines from
        the iterator. With n > 1 the pieces carry their sample_index. Leaving the iterator early (break, cancellation of
        the task, aclose()) ends the request and frees its pages. For whole outputs see `complete`.
        """
        return AsyncStream(self._core, self._mailbox_of_loop("generate"), one_prompt(prompt), sampling)

    async def complete(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """`await engine.complete(...)`: the whole outputs of all prompts, as Engine.generate returns them.

        Takes and raises what Engine.generate does. The cancellation of the task ends all requests of the call.
        """
        batch, mailbox = batch_of(prompts), self._mailbox_of_loop("complete")
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        sinks = [functools.partial(_answer_by, mailbox, answers, number) for number in range(len(batch))]
        request_ids = self._core.open(batch, sampling, streams=False, sinks=sinks)
        outputs = _Outputs(len(request_ids))
        try:
            while not outputs.are_complete:
                outputs.take(*await answers.get())
        except BaseException:
            self._core.cancel(request_ids)
            raise
        return outputs.in_order()

    async def chat(
        self,
        chats: Chats,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Described] | None = None,
        documents: Sequence[Described] | None = None,
        chat_template_kwargs: Mapping[str, str | bool | int | float | None] | None = None,
    ) -> list[RequestOutput]:
        """`await engine.chat(...)`: the model's whole answer to a chat, or to each of several, as Engine.chat returns
        it. To stream one give it to `generate`."""
        return await self.complete(chats_of(chats, tools, documents, chat_template_kwargs), sampling)

    async def close(self) -> None:
        """Ends it, as Engine.close and Client.close do, without holding up the loop. Idempotent."""
        await asyncio.to_thread(self._core.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _mailbox_of_loop(self, call: str) -> Mailbox:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidRequestError(
                f"{type(self).__name__}.{call} was called outside a running event loop: call it in a coroutine that"
                f" asyncio.run runs, or use {type(self).__name__.removeprefix('Async')}"
            ) from None
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox


class _Outputs:
    """Collects the outputs of a call, whatever their order of arrival."""

    def __init__(self, num_outputs: int) -> None:
        self._num_outputs = num_outputs
        self._found: dict[tuple[int, int], RequestOutput] = {}  # by prompt and sample_index

    @property
    def are_complete(self) -> bool:
        return len(self._found) == self._num_outputs

    def take(self, number: int, delivery: Delivery) -> None:
        """Raises the exception that ended the request."""
        if isinstance(delivery, Exception):
            raise delivery
        assert isinstance(delivery, RequestOutput), "a request that does not stream gets its output"
        self._found[number, delivery.sample_index] = delivery

    def in_order(self) -> list[RequestOutput]:
        return [self._found[place] for place in sorted(self._found)]


def _answer(answers: "queue.SimpleQueue[Answer]", number: int, delivery: Delivery) -> None:
    """The sink of prompt `number` of a call."""
    answers.put((number, delivery))


def _answer_by(mailbox: Mailbox, answers: "asyncio.Queue[Answer]", number: int, delivery: Delivery) -> None:
    """The same for a task."""
    mailbox.put(answers, (number, delivery))
