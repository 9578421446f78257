"""How an output becomes a message of Anthropic's API, whole or as events in Anthropic's order.

Owns the blocks of a message (thinking, text, calls), each begun when its first piece comes and ended when another
begins, and why the message ended. Used by `graphgen.gateway.messages`.
"""

from typing import Any

import msgspec
from msgspec import UNSET

from graphgen.gateway.chat_output import ChatOutput, PlainOutput
from graphgen.gateway.errors import ApiError, anthropic_body
from graphgen.gateway.http import Scope, named_event
from graphgen.gateway.ids import new_id
from graphgen.gateway.messages_schema import (
    AnswerMessage,
    Block,
    BlockChange,
    BlockDelta,
    BlockStart,
    BlockStop,
    InputJsonDelta,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessagesUsage,
    Stop,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from graphgen.gateway.outputs import Batch, Outputs, Tally
from graphgen.gateway.schema import ChatDelta
from graphgen.gateway.service import Service

PING = named_event("ping", {"type": "ping"})


class _Block:
    """A block while it grows."""

    def __init__(self, begun: Block) -> None:
        """begun: as it is when it begins, without text."""
        self.begun = begun
        self.texts: list[str] = []

    def change(self, text: str) -> BlockChange:
        match self.begun:
            case TextBlock():
                return TextDelta(text=text)
            case ThinkingBlock():
                return ThinkingDelta(thinking=text)
            case ToolUseBlock():
                return InputJsonDelta(partial_json=text)

    def ended(self) -> Block:
        text = "".join(self.texts)
        match self.begun:
            case TextBlock():
                return TextBlock(text=text)
            case ThinkingBlock():
                return ThinkingBlock(thinking=text)
            case ToolUseBlock(id=call_id, name=name):
                return ToolUseBlock(id=call_id, name=name, input=_object_of(text))


class MessageWriter:
    """One message as it grows."""

    def __init__(
        self, service: Service, scope: Scope, request: MessagesRequest, model: str, output: ChatOutput | PlainOutput
    ) -> None:
        self._service = service
        self._scope = scope
        self._stops = request.stop_sequences or []
        self._id = new_id("msg")
        self._model = model
        self._output = output
        self._tally = Tally(1)
        self._blocks: list[_Block] = []
        self._token_ids: list[int] = []
        self._finish = ""
        self._has_begun = False

    async def whole(self, outputs: Outputs) -> AnswerMessage:
        """The answer to who does not stream."""
        while (batch := await outputs.next()) is not None:
            self._take(batch)
        return self._message([block.ended() for block in self._blocks], await self._stop())

    def news(self, batch: Batch) -> bytes:
        """See EventWriter."""
        news = self._take(batch)
        start = b"" if self._has_begun else named_event("message_start", MessageStart(message=self._message([])))
        self._has_begun = True
        return start + news or PING

    async def end(self) -> bytes:
        """See EventWriter."""
        ended = MessageDelta(delta=await self._stop(), usage=self._usage)
        return self._end_block() + named_event("message_delta", ended) + named_event("message_stop", MessageStop())

    def failed(self, error: ApiError) -> bytes:
        """See EventWriter."""
        return named_event("error", anthropic_body(error))

    def _take(self, batch: Batch) -> bytes:
        """The events of what is new."""
        if not batch:
            return b""
        for number, piece in batch:
            self._tally.add(number, piece)
            self._token_ids += piece.token_ids
        deltas, finish = self._output.take([piece for _, piece in batch])
        self._finish = finish or self._finish
        return b"".join(self._take_delta(delta) for delta in deltas)

    def _take_delta(self, delta: ChatDelta) -> bytes:
        if delta.tool_calls is not UNSET:
            return b"".join(
                (b"" if call.id is UNSET else self._begin(ToolUseBlock(id=call.id, name=call.function.name or "")))
                + self._grow(call.function.arguments)
                for call in delta.tool_calls
            )
        for begun, text in ((ThinkingBlock(thinking=""), delta.reasoning), (TextBlock(text=""), delta.content)):
            if text is not UNSET:
                is_open = bool(self._blocks) and type(self._blocks[-1].begun) is type(begun)
                return (b"" if is_open else self._begin(begun)) + self._grow(text)
        return b""

    def _begin(self, begun: Block) -> bytes:
        before = self._end_block()
        self._blocks.append(_Block(begun))
        start = BlockStart(index=len(self._blocks) - 1, content_block=begun)
        return before + named_event("content_block_start", start)

    def _grow(self, text: str) -> bytes:
        if not text:
            return b""
        block = self._blocks[-1]
        block.texts.append(text)
        change = BlockDelta(index=len(self._blocks) - 1, delta=block.change(text))
        return named_event("content_block_delta", change)

    def _end_block(self) -> bytes:
        if not self._blocks:
            return b""
        return named_event("content_block_stop", BlockStop(index=len(self._blocks) - 1))

    async def _stop(self) -> Stop:
        """Why the output has ended. The engine does not say by which stop string: the last tokens do."""
        if self._finish == "length":
            return Stop(stop_reason="max_tokens")
        if any(isinstance(block.begun, ToolUseBlock) for block in self._blocks):
            return Stop(stop_reason="tool_use")
        if not self._stops or not self._token_ids or self._token_ids[-1] in self._service.core.welcome.eos_token_ids:
            return Stop(stop_reason="end_turn")
        if len(self._stops) == 1:
            return Stop(stop_reason="stop_sequence", stop_sequence=self._stops[0])
        most_bytes = max(len(stop.encode()) for stop in self._stops)  # and a token has at least one
        tail = await self._service.read_prompt(self._token_ids[-most_bytes - 1 :], self._scope, with_text=True)
        places = {stop: (tail.text or "").find(stop) for stop in self._stops}
        found = [stop for stop, place in places.items() if place >= 0]
        return Stop(stop_reason="stop_sequence", stop_sequence=min(found, key=places.__getitem__, default=None))

    @property
    def _usage(self) -> MessagesUsage:
        usage = self._tally.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return MessagesUsage(
            input_tokens=usage.prompt_tokens - cached,
            output_tokens=usage.completion_tokens,
            cache_read_input_tokens=cached,
        )

    def _message(self, content: list[Block], stop: Stop | None = None) -> AnswerMessage:
        return AnswerMessage(
            id=self._id,
            model=self._model,
            content=content,
            stop_reason=None if stop is None else stop.stop_reason,
            stop_sequence=None if stop is None else stop.stop_sequence,
            usage=self._usage,
        )


def _object_of(arguments: str) -> dict[str, Any]:
    """Those of a call that was cut, or that are no object, are told as the text that they are."""
    try:
        found = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}
