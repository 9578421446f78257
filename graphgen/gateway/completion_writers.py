"""How outputs become chats and completions of OpenAI's API, whole or as events.

Owns what precedes an output, what is told with which of its pieces, and what follows the last one. Used by
`graphgen.gateway.endpoints`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from graphgen.calls.logprobs import Logprobs
from graphgen.calls.outputs import StreamPiece
from graphgen.gateway import schema
from graphgen.gateway.chat_output import ChatOutput, PlainOutput, join_deltas, joined_text
from graphgen.gateway.errors import ApiError
from graphgen.gateway.http import DONE, KEEP_ALIVE, EventTemplate, error_event, event
from graphgen.gateway.logprobs import Columns, Told, joined, of_chat
from graphgen.gateway.outputs import Batch, Outputs, Tally

ChunkUsage = schema.Usage | UnsetType | None
"""Absent; null where the client asked for one at the end; counts so far where it asked for them always."""


class OutputWriter(ABC):
    """One answer: its id, its model, and how outputs are written down."""

    def __init__(self, answer_id: str, model: str, n: int, request: schema.Generation, tally: Tally) -> None:
        """n: outputs of each prompt."""
        self.streams = bool(request.stream)
        self._id = answer_id
        self._created = int(time.time())
        self._model = model
        self._n = n
        self._tally = tally
        options = request.stream_options or schema.StreamOptions()
        self._has_usage = bool(options.include_usage)
        self._has_usage_always = bool(options.include_usage and options.continuous_usage_stats)
        self._begun: set[int] = set()  # outputs of which events were sent
        self._templates: dict[int, EventTemplate] = {}  # of outputs: an event that has a text and nothing else

    def news(self, batch: Batch) -> bytes:
        """See EventWriter. Pieces of an output that came together are joined."""
        outputs: dict[int, list[StreamPiece]] = {}
        for number, piece in batch:
            self._tally.add(number, piece)
            outputs.setdefault(number * self._n + piece.sample_index, []).append(piece)
        return b"".join([self._news_of(index, pieces) for index, pieces in outputs.items()]) or KEEP_ALIVE

    async def end(self) -> bytes:
        """See EventWriter."""
        return (event(self.last_chunk(self._tally.usage)) if self._has_usage else b"") + DONE

    def failed(self, error: ApiError) -> bytes:
        """See EventWriter."""
        return error_event(error)

    async def whole(self, outputs: Outputs, num_prompts: int) -> Struct:
        """The answer to who does not stream."""
        pieces: list[list[StreamPiece]] = [[] for _ in range(num_prompts * self._n)]
        while (batch := await outputs.next()) is not None:
            for number, piece in batch:
                self._tally.add(number, piece)
                pieces[number * self._n + piece.sample_index].append(piece)
        return self.completion(pieces, self._tally.usage)

    def _news_of(self, index: int, pieces: Sequence[StreamPiece]) -> bytes:
        usage: ChunkUsage = UNSET
        if self._has_usage:
            usage = self._tally.usage if self._has_usage_always else None
        if index in self._begun:
            return self.events(index, pieces, usage)
        self._begun.add(index)
        first = self.first_chunk(index, usage)
        return (b"" if first is None else event(first)) + self.events(index, pieces, usage)

    def _text_event(self, index: int, text: str) -> bytes:
        """One that says nothing but a text: most are."""
        template = self._templates.get(index)
        if template is None:
            usage = None if self._has_usage else UNSET
            template = self._templates[index] = EventTemplate(lambda text: self.text_chunk(index, text, usage))
        return template.event(text)

    def first_chunk(self, index: int, usage: ChunkUsage) -> Struct | None:
        """What precedes the text of an output."""
        return None

    @abstractmethod
    def events(self, index: int, pieces: Sequence[StreamPiece], usage: ChunkUsage) -> bytes:
        """Of new pieces of an output."""

    @abstractmethod
    def text_chunk(self, index: int, text: str, usage: ChunkUsage) -> Struct:
        """A text of an output and nothing else."""

    @abstractmethod
    def last_chunk(self, usage: schema.Usage) -> Struct:
        """What follows all outputs, where the client asks for it."""

    @abstractmethod
    def completion(self, outputs: Sequence[Sequence[StreamPiece]], usage: schema.Usage) -> Struct:
        """The whole answer: all pieces of each output."""


class ChatWriter(OutputWriter):
    def __init__(
        self,
        answer_id: str,
        model: str,
        request: schema.ChatRequest,
        outputs: Sequence[ChatOutput | PlainOutput],
    ) -> None:
        """outputs: one for each sample."""
        super().__init__(answer_id, model, len(outputs), request, Tally(1))
        self._outputs = outputs
        self._told = [Told() for _ in outputs] if request.logprobs else None
        self._unsent: list[list[StreamPiece]] = [[] for _ in outputs]  # pieces that made no chunk yet

    def first_chunk(self, index: int, usage: ChunkUsage) -> Struct:
        return self._chunk(usage, schema.ChatChunkChoice(index=index, delta=schema.ChatDelta("assistant", "")))

    def events(self, index: int, pieces: Sequence[StreamPiece], usage: ChunkUsage) -> bytes:
        """How the output ended is said with its last content, or by itself."""
        deltas, finish = self._outputs[index].take(pieces)
        if finish is None and self._told is None and not self._has_usage_always and len(deltas) == 1:
            text = deltas[0].content
            if text is not UNSET:
                return self._text_event(index, text)
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
        return b"".join(event(self._chunk(usage, choice)) for choice in found)

    def text_chunk(self, index: int, text: str, usage: ChunkUsage) -> Struct:
        return self._chunk(usage, schema.ChatChunkChoice(index=index, delta=schema.ChatDelta(content=text)))

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


class CompletionWriter(OutputWriter):
    def __init__(
        self, answer_id: str, model: str, n: int, request: schema.CompletionRequest, echoed: Sequence[str]
    ) -> None:
        """echoed: what precedes the outputs of each prompt; empty where the request wants no echo."""
        self._has_echo_alone = bool(request.echo) and request.max_tokens == 0
        super().__init__(answer_id, model, n, request, Tally(len(echoed), self._has_echo_alone))
        self._has_text_alone = not (self._has_echo_alone or self._has_usage_always or request.logprobs is not None)
        self._echoed = echoed
        outputs = range(n * len(echoed))
        self._told = None if request.logprobs is None else [Told() for _ in outputs]
        self._columns = [Columns() for _ in outputs]
        self._of_prompts: dict[int, Logprobs] = {}  # by prompt, where it is echoed with log-probabilities

    def first_chunk(self, index: int, usage: ChunkUsage) -> Struct | None:
        """With log-probabilities the echo goes with the first text, whose piece has those of the prompt."""
        echoed = self._echoed[index // self._n]
        return self._made(usage, [schema.TextChoice(index=index, text=echoed)]) if echoed and not self._told else None

    def events(self, index: int, pieces: Sequence[StreamPiece], usage: ChunkUsage) -> bytes:
        if self._has_text_alone and pieces[-1].finish_reason is None:
            text = joined_text(pieces)
            return self._text_event(index, text) if text else b""
        has_prompt = any(piece.prompt_logprobs is not None for piece in pieces)
        choice = self._choice(index, pieces, with_echo=has_prompt)
        is_news = choice.text or choice.finish_reason or (choice.logprobs is not None and choice.logprobs.tokens)
        return event(self._made(usage, [choice])) if is_news else b""

    def text_chunk(self, index: int, text: str, usage: ChunkUsage) -> Struct:
        return self._made(usage, [schema.TextChoice(index=index, text=text)])

    def _choice(self, index: int, pieces: Sequence[StreamPiece], with_echo: bool) -> schema.TextChoice:
        """What these pieces, which are all since the last call, add to an output."""
        number = index // self._n
        for piece in pieces:
            if piece.prompt_logprobs is not None:
                self._of_prompts[number] = piece.prompt_logprobs
        echoed = self._echoed[number] if with_echo else ""
        text = "" if self._has_echo_alone else joined_text(pieces)
        finish = pieces[-1].finish_reason
        if self._has_echo_alone and finish is not None:
            finish = "length"
        logprobs = None
        if self._told is not None:
            of_prompt = self._of_prompts.get(number) if with_echo else None
            before = None if of_prompt is None else self._columns[index].of_prompt(of_prompt, echoed)
            told = self._told[index].take(pieces)
            logprobs = joined(before, self._columns[index].of([] if self._has_echo_alone else told))
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
