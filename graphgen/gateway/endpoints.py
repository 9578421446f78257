"""The endpoints of OpenAI's API: chats, completions, models, and whether the server serves.

Owns the ids of answers and how pieces become events and whole answers. How requests are read is
`graphgen.gateway.generation`, how bytes move is `graphgen.gateway.http`.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from msgspec import UNSET, Struct, UnsetType

from graphgen.calls.logprobs import Logprobs
from graphgen.calls.outputs import StreamPiece
from graphgen.calls.prompts import OnePrompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.gateway import schema
from graphgen.gateway.chat_output import ChatOutput, PlainOutput, join_deltas
from graphgen.gateway.chat_turn import read_chat
from graphgen.gateway.generation import (
    COMPLETION_MAX_TOKENS,
    NoOutputs,
    Outputs,
    Tally,
    completion_prompts,
    sampling_of,
)
from graphgen.gateway.http import (
    DONE,
    KEEP_ALIVE,
    Receive,
    Scope,
    Send,
    event,
    send_events,
    send_json,
)
from graphgen.gateway.ids import new_id
from graphgen.gateway.logprobs import Columns, Told, joined, of_chat
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
        is_echo_alone = bool(request.echo) and request.max_tokens == 0
        limit = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        sampling = sampling_of(request, 1 if is_echo_alone else limit)
        model = self._service.known(request.model)
        is_computed = not is_echo_alone or request.logprobs is not None
        echoed, lengths = [""] * len(prompts), [0] * len(prompts)
        for number, prompt in enumerate(prompts if request.echo else ()):
            echoed[number], lengths[number] = await self._echo_of(prompt, scope, is_counted=not is_computed)
        answer = _Completion(new_id("cmpl"), model, sampling.n, request, echoed)
        if is_computed:
            await self._answer(answer, prompts, sampling, scope, receive, send)
        else:
            await _send(answer, NoOutputs(lengths, sampling.n), len(prompts), send)

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
        async with self._service.pieces(prompts, sampling, scope, receive, parsing) as pieces:
            await _send(answer, pieces, len(prompts), send)

    async def _echo_of(self, prompt: OnePrompt, scope: Scope, is_counted: bool) -> tuple[str, int]:
        """What `echo` puts before an output, and its tokens if they are counted here."""
        if isinstance(prompt, str) and not is_counted:
            return prompt, 0
        found = await self._service.read_prompt(prompt, scope, with_text=not isinstance(prompt, str))
        return prompt if isinstance(prompt, str) else found.text or "", len(found.token_ids)

    def _described(self, name: str) -> schema.Model:
        return schema.Model(id=name, created=self._service.created, max_model_len=self._service.max_model_len)


async def _send(answer: "_Answer", outputs: Outputs, num_prompts: int, send: Send) -> None:
    tally = Tally(num_prompts, answer.has_echo_alone)
    if answer.request.stream:
        await send_events(send, answer.events(outputs, tally))
    else:
        await send_json(send, await answer.whole(outputs, tally, num_prompts))


class _Answer(ABC):
    """One answer: its id, its model, and how outputs are written down."""

    def __init__(self, answer_id: str, model: str, n: int, request: schema.Generation) -> None:
        self.request = request
        self._id = answer_id
        self._created = int(time.time())
        self._model = model
        self._n = n
        options = request.stream_options or schema.StreamOptions()
        self.has_echo_alone = False
        """It has the prompt and nothing of an output."""
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

    async def events(self, pieces: Outputs, tally: Tally) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        begun: set[int] = set()
        async for batch in pieces.batches():
            yield self._events_of(batch, begun, tally) or KEEP_ALIVE
        yield (event(self.last_chunk(tally.usage)) if self._has_usage else b"") + DONE

    async def whole(self, pieces: Outputs, tally: Tally, num_prompts: int) -> Struct:
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
        self._told = [Told() for _ in outputs] if request.logprobs else None
        self._unsent: list[list[StreamPiece]] = [[] for _ in outputs]  # pieces that made no chunk yet

    def first_chunk(self, index: int, usage: ChunkUsage) -> Struct:
        return self._chunk(usage, schema.ChatChunkChoice(index=index, delta=schema.ChatDelta("assistant", "")))

    def chunks(self, index: int, pieces: Sequence[StreamPiece], usage: ChunkUsage) -> list[Struct]:
        """How the output ended is said with its last content, or by itself."""
        deltas, finish = self._outputs[index].take(pieces)
        if finish and (not deltas or deltas[-1].content is UNSET):
            deltas.append(schema.ChatDelta())
        ends = [None] * (len(deltas) - 1) + [finish]
        logprobs = self._logprobs(index, pieces, bool(deltas))
        found = [
            schema.ChatChunkChoice(
                index=index, delta=delta, logprobs=logprobs if number == 0 else None, finish_reason=end
            )
            for number, (delta, end) in enumerate(zip(deltas, ends, strict=False))
        ]
        return [self._chunk(usage, choice) for choice in found]

    def _logprobs(self, index: int, pieces: Sequence[StreamPiece], is_sent: bool) -> schema.ChatLogprobs | None:
        """Those that go with the first chunk of these pieces; is_sent: there is one."""
        if self._told is None:
            return None
        unsent = self._unsent[index]
        unsent += pieces
        if not is_sent:
            return None
        self._unsent[index] = []
        return of_chat(self._told[index].take(unsent))

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
            message, logprobs = join_deltas(deltas), self._logprobs(index, pieces, is_sent=True)
            choice = schema.ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish or "")
            choices.append(choice)
        return schema.ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )


class _Completion(_Answer):
    def __init__(
        self, answer_id: str, model: str, n: int, request: schema.CompletionRequest, echoed: Sequence[str]
    ) -> None:
        """echoed: what precedes the outputs of each prompt; empty where the request wants no echo."""
        super().__init__(answer_id, model, n, request)
        self.has_echo_alone = bool(request.echo) and request.max_tokens == 0
        self._echoed = echoed
        outputs = range(n * len(echoed))
        self._told = None if request.logprobs is None else [Told() for _ in outputs]
        self._columns = [Columns() for _ in outputs]
        self._of_prompts: dict[int, Logprobs] = {}  # by prompt, where it is echoed with log-probabilities

    def first_chunk(self, index: int, usage: ChunkUsage) -> Struct | None:
        """With log-probabilities the echo goes with the first text, whose piece has those of the prompt."""
        echoed = self._echoed[index // self._n]
        return self._made(usage, [schema.TextChoice(index=index, text=echoed)]) if echoed and not self._told else None

    def chunks(self, index: int, pieces: Sequence[StreamPiece], usage: ChunkUsage) -> list[Struct]:
        has_prompt = any(piece.prompt_logprobs is not None for piece in pieces)
        choice = self._choice(index, pieces, with_echo=has_prompt)
        is_news = choice.text or choice.finish_reason or (choice.logprobs is not None and choice.logprobs.tokens)
        return [self._made(usage, [choice])] if is_news else []

    def _choice(self, index: int, pieces: Sequence[StreamPiece], with_echo: bool) -> schema.TextChoice:
        """What these pieces, which are all since the last call, add to an output."""
        number = index // self._n
        for piece in pieces:
            if piece.prompt_logprobs is not None:
                self._of_prompts[number] = piece.prompt_logprobs
        echoed = self._echoed[number] if with_echo else ""
        text = "" if self.has_echo_alone else "".join(piece.text for piece in pieces)
        finish = pieces[-1].finish_reason
        if self.has_echo_alone and finish is not None:
            finish = "length"
        logprobs = None
        if self._told is not None:
            of_prompt = self._of_prompts.get(number) if with_echo else None
            before = None if of_prompt is None else self._columns[index].of_prompt(of_prompt, echoed)
            told = self._told[index].take(pieces)
            logprobs = joined(before, self._columns[index].of([] if self.has_echo_alone else told))
        return schema.TextChoice(index=index, text=echoed + text, logprobs=logprobs, finish_reason=finish)

    def last_chunk(self, usage: schema.Usage) -> Struct:
        return self._made(usage, [])

    def completion(self, outputs: Sequence[Sequence[StreamPiece]], usage: schema.Usage) -> Struct:
        choices = [self._choice(index, pieces, with_echo=True) for index, pieces in enumerate(outputs)]
        return self._made(usage, choices)

    def _made(self, usage: ChunkUsage, choices: list[schema.TextChoice]) -> Struct:
        return schema.TextCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )
