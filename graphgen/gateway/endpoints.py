"""The endpoints of OpenAI's API: chats, completions, models, and whether the server serves.

Owns the ids of answers and how pieces become events and whole answers. How requests are read is
`graphgen.gateway.generation`, how bytes move is `graphgen.gateway.http`.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from msgspec import UNSET, Struct, UnsetType

from graphgen.calls.outputs import StreamPiece
from graphgen.calls.prompts import OnePrompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.gateway import schema
from graphgen.gateway.chat_output import ChatOutput, PlainOutput, join_deltas
from graphgen.gateway.chat_turn import read_chat
from graphgen.gateway.errors import error_of
from graphgen.gateway.generation import (
    COMPLETION_MAX_TOKENS,
    Pieces,
    Tally,
    completion_prompts,
    sampling_of,
)
from graphgen.gateway.http import (
    DONE,
    KEEP_ALIVE,
    GoneError,
    Receive,
    Scope,
    Send,
    error_event,
    event,
    send_events,
    send_json,
)
from graphgen.gateway.ids import new_id
from graphgen.gateway.service import Service
from graphgen.remote.requests import NO_PARSING, Parsing

ChunkUsage = schema.Usage | UnsetType | None
"""Absent; null where the client asked for one at the end; counts so far where it asked for them always."""


class Endpoints:
    """Chats, completions, models and probes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat_completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, schema.ChatRequest)
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        model = self._service.known(request.model)
        turn = await read_chat(self._service, request, limit, scope)
        answer = _Chat(new_id("chatcmpl"), model, request, turn.outputs)
        await self._answer(answer, [turn.prompt], turn.sampling, scope, receive, send, turn.parsing)

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, schema.CompletionRequest)
        prompts = completion_prompts(request)
        sampling = sampling_of(request, COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens)
        echoed = [await self._text_of(prompt, scope) for prompt in prompts] if request.echo else [""] * len(prompts)
        answer = _Completion(new_id("cmpl"), self._service.known(request.model), sampling.n, request, echoed)
        await self._answer(answer, prompts, sampling, scope, receive, send)

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = self._service.model_names
        await send_json(send, schema.ModelList(data=[self._described(name) for name in names]))

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, self._described(self._service.known(scope["path_params"]["name"])))

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether frontend, scheduler and worker live; also while the server drains."""
        health = await asyncio.to_thread(self._service.core.health)
        await send_json(send, {"status": health.status}, 200 if health.ready or health.status == "draining" else 503)

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether new requests are taken."""
        health = await asyncio.to_thread(self._service.core.health)
        await send_json(send, {"status": health.status}, 200 if health.ready else 503)

    async def _answer(
        self,
        answer: "_Answer",
        prompts: Sequence[OnePrompt],
        sampling: SamplingParams,
        scope: Scope,
        receive: Receive,
        send: Send,
        parsing: Parsing = NO_PARSING,
    ) -> None:
        pieces = self._service.pieces(prompts, sampling, scope, receive, parsing)
        tally = Tally(len(prompts))
        async with pieces:
            if answer.request.stream:
                await send_events(send, answer.events(pieces, tally))
            else:
                await send_json(send, await answer.whole(pieces, tally, len(prompts)))

    async def _text_of(self, prompt: OnePrompt, scope: Scope) -> str:
        """What `echo` puts before an output."""
        if isinstance(prompt, str):
            return prompt
        return (await self._service.read_prompt(prompt, scope, with_text=True)).text or ""

    def _described(self, name: str) -> schema.Model:
        return schema.Model(id=name, created=self._service.created, max_model_len=self._service.max_model_len)


class _Answer(ABC):
    """One answer: its id, its model, and how outputs are written down."""

    def __init__(self, answer_id: str, model: str, n: int, request: schema.Generation) -> None:
        self.request = request
        self._id = answer_id
        self._created = int(time.time())
        self._model = model
        self._n = n
        options = request.stream_options or schema.StreamOptions()
        self._has_usage = bool(options.include_usage)
        self._has_usage_always = bool(options.include_usage and options.continuous_usage_stats)

    def first_chunk(self, index: int, usage: ChunkUsage) -> Struct | None:
        """What precedes the text of an output."""
        return None

    @abstractmethod
    def chunks(self, index: int, pieces: Sequence[StreamPiece], usage: ChunkUsage) -> list[Struct]:
        """New pieces of an output."""

    @abstractmethod
    def last_chunk(self, usage: schema.Usage) -> Struct:
        """What follows all outputs, where the client asks for it."""

    @abstractmethod
    def completion(self, outputs: Sequence[Sequence[StreamPiece]], usage: schema.Usage) -> Struct:
        """The whole answer: all pieces of each output."""

    async def events(self, pieces: Pieces, tally: Tally) -> AsyncIterator[bytes]:
        """The answer as server-sent events. What ends the request before the first of them is raised; later it is one
        of them."""
        begun: set[int] = set()
        said = False
        try:
            async for batch in pieces.batches():
                said = True
                yield self._events_of(batch, begun, tally) or KEEP_ALIVE
        except Exception as error:
            if isinstance(error, GoneError) or not said:
                raise
            yield error_event(error_of(error))
            return
        yield (event(self.last_chunk(tally.usage)) if self._has_usage else b"") + DONE

    async def whole(self, pieces: Pieces, tally: Tally, num_prompts: int) -> Struct:
        """The answer to who does not stream."""
        outputs: list[list[StreamPiece]] = [[] for _ in range(num_prompts * self._n)]
        async for batch in pieces.batches():
            for number, piece in batch:
                tally.add(number, piece)
                outputs[number * self._n + piece.sample_index].append(piece)
        return self.completion(outputs, tally.usage)

    def _events_of(self, batch: Sequence[tuple[int, StreamPiece]], begun: set[int], tally: Tally) -> bytes:
        """The news of each output: pieces that came together are joined."""
        news: dict[int, list[StreamPiece]] = {}
        for number, piece in batch:
            tally.add(number, piece)
            news.setdefault(number * self._n + piece.sample_index, []).append(piece)
        usage = (tally.usage if self._has_usage_always else None) if self._has_usage else UNSET
        events = []
        for index, pieces in news.items():
            if index not in begun:
                begun.add(index)
                first = self.first_chunk(index, usage)
                events += [] if first is None else [event(first)]
            events += [event(chunk) for chunk in self.chunks(index, pieces, usage)]
        return b"".join(events)


class _Chat(_Answer):
    def __init__(
        self,
        answer_id: str,
        model: str,
        request: schema.ChatRequest,
        outputs: Sequence[ChatOutput | PlainOutput],
    ) -> None:
        """outputs: one for each sample."""
        super().__init__(answer_id, model, len(outputs), request)
        self._outputs = outputs

    def first_chunk(self, index: int, usage: ChunkUsage) -> Struct:
        return self._chunk(usage, schema.ChatChunkChoice(index=index, delta=schema.ChatDelta("assistant", "")))

    def chunks(self, index: int, pieces: Sequence[StreamPiece], usage: ChunkUsage) -> list[Struct]:
        """How the output ended is said with its last content, or by itself."""
        deltas, finish = self._outputs[index].take(pieces)
        if finish and (not deltas or deltas[-1].content is UNSET):
            deltas.append(schema.ChatDelta())
        ends = [None] * (len(deltas) - 1) + [finish]
        return [
            self._chunk(usage, schema.ChatChunkChoice(index=index, delta=delta, finish_reason=end))
            for delta, end in zip(deltas, ends, strict=False)
        ]

    def last_chunk(self, usage: schema.Usage) -> Struct:
        return self._chunk(usage)

    def _chunk(self, usage: ChunkUsage, *choices: schema.ChatChunkChoice) -> Struct:
        return schema.ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=list(choices), usage=usage
        )

    def completion(self, outputs: Sequence[Sequence[StreamPiece]], usage: schema.Usage) -> Struct:
        choices = []
        for index, pieces in enumerate(outputs):
            deltas, finish = self._outputs[index].take(pieces)
            choices.append(schema.ChatChoice(index=index, message=join_deltas(deltas), finish_reason=finish or ""))
        return schema.ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )


class _Completion(_Answer):
    """echoed: what precedes the outputs of each prompt; empty where the request wants no echo."""

    def __init__(self, answer_id: str, model: str, n: int, request: schema.Generation, echoed: Sequence[str]) -> None:
        super().__init__(answer_id, model, n, request)
        self._echoed = echoed

    def first_chunk(self, index: int, usage: ChunkUsage) -> Struct | None:
        echoed = self._echoed[index // self._n]
        return self._made(usage, [schema.TextChoice(index=index, text=echoed)]) if echoed else None

    def chunks(self, index: int, pieces: Sequence[StreamPiece], usage: ChunkUsage) -> list[Struct]:
        choice = _text_choice(index, pieces)
        return [self._made(usage, [choice])] if choice.text or choice.finish_reason else []

    def last_chunk(self, usage: schema.Usage) -> Struct:
        return self._made(usage, [])

    def completion(self, outputs: Sequence[Sequence[StreamPiece]], usage: schema.Usage) -> Struct:
        choices = [_text_choice(index, pieces, self._echoed[index // self._n]) for index, pieces in enumerate(outputs)]
        return self._made(usage, choices)

    def _made(self, usage: ChunkUsage, choices: list[schema.TextChoice]) -> Struct:
        return schema.TextCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )


def _text_choice(index: int, pieces: Sequence[StreamPiece], echoed: str = "") -> schema.TextChoice:
    text = echoed + "".join(piece.text for piece in pieces)
    return schema.TextChoice(index=index, text=text, finish_reason=pieces[-1].finish_reason)
