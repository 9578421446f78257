"""How an output becomes a response of OpenAI's Responses API, whole or as events in OpenAI's order.

Owns the items of a response: reasoning, text and calls, each begun when its first piece comes and ended when another
begins. Used by `graphgen.gateway.responses`.
"""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, Struct, structs

from graphgen.calls.logprobs import Logprob
from graphgen.calls.outputs import StreamPiece
from graphgen.gateway.chat_output import ChatOutput, PlainOutput
from graphgen.gateway.errors import ApiError
from graphgen.gateway.http import KEEP_ALIVE, named_event
from graphgen.gateway.ids import new_id
from graphgen.gateway.logprobs import Told, of_chat
from graphgen.gateway.outputs import Batch, Outputs, Tally
from graphgen.gateway.responses_schema import (
    ArgumentsDelta,
    ArgumentsDone,
    FunctionCall,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    ItemChanged,
    Message,
    OutputText,
    PartChanged,
    Reasoning,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseChanged,
    ResponseError,
    ResponsesRequest,
    ResponsesUsage,
    TextDelta,
    TextDone,
    TextFormat,
)
from graphgen.gateway.schema import ChatDelta, ChatLogprob

_DELTAS: dict[type[Struct] | None, type[Struct]] = {
    OutputText: TextDelta,
    ReasoningText: ReasoningDelta,
    None: ArgumentsDelta,
}


class _Item:
    """An item while it grows: a part of a message, of reasoning, or a call when it has a name."""

    def __init__(self, kind: type[OutputText] | type[ReasoningText] | None, call_id: str = "", name: str = "") -> None:
        """kind: of its part; None: a call."""
        self.kind = kind
        self.id = new_id({OutputText: "msg", ReasoningText: "rs", None: "fc"}[kind])
        self.call_id = call_id
        self.name = name
        self.texts: list[str] = []
        self.logprobs: list[ChatLogprob] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def as_item(self, status: str, is_begun: bool = True) -> Item:
        """is_begun: with what it has so far, as it is when it ends."""
        text = self.text if is_begun else ""
        if self.kind is None:
            return FunctionCall(id=self.id, call_id=self.call_id, name=self.name, arguments=text, status=status)
        if self.kind is ReasoningText:
            return ReasoningItem(id=self.id, content=[ReasoningText(text=text)] if is_begun else [], status=status)
        return Message(id=self.id, content=[self._said()] if is_begun else [], status=status)

    def part(self, kind: type[OutputText] | type[ReasoningText]) -> OutputText | ReasoningText:
        """With what it has so far. kind: its own."""
        return self._said() if kind is OutputText else kind(text=self.text)

    def _said(self) -> OutputText:
        return OutputText(text=self.text, logprobs=self.logprobs)


class ResponseWriter:
    """One response as it grows."""

    def __init__(self, request: ResponsesRequest, model: str, output: ChatOutput | PlainOutput) -> None:
        self._response = Response(
            id=new_id("resp"),
            created_at=int(time.time()),
            status="in_progress",
            model=model,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            reasoning=request.reasoning or Reasoning(),
            text=request.text or TextFormat(format={"type": "text"}),
            tools=request.tools or [],
            tool_choice=request.tool_choice or "auto",
            parallel_tool_calls=request.parallel_tool_calls is not False,
            metadata=request.metadata or {},
            user=request.user,
            top_logprobs=request.top_logprobs or 0,
        )
        self._told = Told() if request.asks_for_logprobs else None
        self._unsent: list[StreamPiece] = []  # pieces of which nothing was sent yet
        self._output = output
        self._numbers = itertools.count()
        self._items: list[_Item] = []
        self._finish = ""
        self._tally = Tally(1)
        self._has_begun = False

    async def whole(self, outputs: Outputs) -> Response:
        """The answer to who does not stream."""
        while (batch := await outputs.next()) is not None:
            self._take(batch)
        self._end_items()
        return self._ended()

    def news(self, batch: Batch) -> bytes:
        """See EventWriter."""
        head = b"" if self._has_begun else self._begin()
        return head + self._take(batch) or KEEP_ALIVE

    async def end(self) -> bytes:
        """See EventWriter."""
        last = self._end_items()
        response = self._ended()
        return last + self._written(ResponseChanged, f"response.{response.status}", response=response)

    def failed(self, error: ApiError) -> bytes:
        """See EventWriter."""
        failure = ResponseError(code=error.body.code or error.body.type, message=error.body.message)
        response = structs.replace(self._response, status="failed", error=failure)
        return self._written(ResponseChanged, "response.failed", response=response)

    def _begin(self) -> bytes:
        self._has_begun = True
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._written(ResponseChanged, kind, response=self._response) for kind in kinds)

    def _take(self, batch: Batch) -> bytes:
        """The events of what is new."""
        for number, piece in batch:
            self._tally.add(number, piece)
            self._finish = piece.finish_reason or self._finish
        if not batch:
            return b""
        pieces = [piece for _, piece in batch]
        if self._told is None:
            return self._take_pieces(pieces)
        return b"".join(self._take_pieces([piece]) for piece in pieces)  # of each token one knows what became of it

    def _take_pieces(self, pieces: Sequence[StreamPiece]) -> bytes:
        deltas, _ = self._output.take(pieces)
        logprobs = self._logprobs(pieces, deltas)
        return b"".join(self._take_delta(delta, logprobs) for delta in deltas)

    def _logprobs(self, pieces: Sequence[StreamPiece], deltas: Sequence[ChatDelta]) -> list[ChatLogprob]:
        """Those of the text among these deltas. Of reasoning, calls and markers none are told."""
        if self._told is None:
            return []
        self._unsent += pieces
        if not deltas:
            return []
        told, self._unsent = self._told.take(self._unsent), []
        num_bytes = sum(len(delta.content.encode()) for delta in deltas if delta.content is not UNSET)
        of_text: list[Logprob] = []
        while told and num_bytes > 0:
            of_text.append(told.pop())
            num_bytes -= len(of_text[-1].token)
        return of_chat(reversed(of_text)).content

    def _take_delta(self, delta: ChatDelta, logprobs: list[ChatLogprob]) -> bytes:
        if delta.tool_calls is not UNSET:
            return b"".join(
                (b"" if call.id is UNSET else self._begin_item(_Item(None, call.id, call.function.name or "")))
                + self._grow(call.function.arguments)
                for call in delta.tool_calls
            )
        for kind, text in ((ReasoningText, delta.reasoning), (OutputText, delta.content)):
            if text is not UNSET:
                is_open = bool(self._items) and self._items[-1].kind is kind
                begun = b"" if is_open else self._begin_item(_Item(kind))
                return begun + self._grow(text, logprobs if kind is OutputText else [])
        return b""

    def _grow(self, text: str, logprobs: Sequence[ChatLogprob] = ()) -> bytes:
        item = self._items[-1]
        if not text:
            return b""
        item.texts.append(text)
        item.logprobs += logprobs
        told = {"logprobs": logprobs} if logprobs else {}
        return self._written(_DELTAS[item.kind], delta=text, **told, **self._place)

    def _begin_item(self, item: _Item) -> bytes:
        before = self._end_item("completed") if self._items else b""
        self._items.append(item)
        added = self._written(
            ItemChanged,
            "response.output_item.added",
            output_index=len(self._items) - 1,
            item=item.as_item("in_progress", is_begun=item.kind is None),
        )
        if item.kind is None:
            return before + added
        part = item.kind(text="")
        return before + added + self._written(PartChanged, "response.content_part.added", part=part, **self._place)

    def _end_item(self, status: str) -> bytes:
        item = self._items[-1]
        if item.kind is None:
            text = self._written(ArgumentsDone, name=item.name, arguments=item.text, **self._place)
        else:
            told = {"logprobs": item.logprobs} if item.kind is OutputText else {}
            done = TextDone if item.kind is OutputText else ReasoningDone
            text = self._written(done, text=item.text, **told, **self._place)
            part = item.part(item.kind)
            text += self._written(PartChanged, "response.content_part.done", part=part, **self._place)
        index = len(self._items) - 1
        return text + self._written(
            ItemChanged, "response.output_item.done", output_index=index, item=item.as_item(status)
        )

    def _end_items(self) -> bytes:
        """A response without an output has an empty message."""
        begun = b"" if self._items else self._begin_item(_Item(OutputText))
        return begun + self._end_item(self._status)

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    @property
    def _place(self) -> dict[str, Any]:
        """Of the newest item, in its events."""
        return {"item_id": self._items[-1].id, "output_index": len(self._items) - 1}

    def _ended(self) -> Response:
        usage = self._tally.usage
        items = [item.as_item("completed") for item in self._items[:-1]]
        return structs.replace(
            self._response,
            status=self._status,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if self._finish == "length" else None,
            output=[*items, self._items[-1].as_item(self._status)],
            usage=ResponsesUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
        )

    def _written(self, kind: type[Struct], event_type: str | None = None, /, **fields: Any) -> bytes:  # of any event
        named = {} if event_type is None else {"type": event_type}
        made: Any = kind(sequence_number=next(self._numbers), **named, **fields)
        return named_event(made.type, made)
