"""Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.

Owns how blocks become a chat and an output becomes blocks, and the order of the events. What is refused and how a
request is served is as for chats.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from msgspec import structs

from graphgen.calls.outputs import StreamPiece
from graphgen.gateway import schema
from graphgen.gateway.errors import ApiError, anthropic_body, error_of
from graphgen.gateway.generation import Pieces, Tally, prompt_without_calls, sampling_of
from graphgen.gateway.http import GoneError, Receive, Scope, Send, named_event, send_events, send_json
from graphgen.gateway.ids import new_id
from graphgen.gateway.messages_schema import (
    AnswerMessage,
    BlockDelta,
    BlockStart,
    BlockStop,
    Effort,
    InputTokens,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessagesUsage,
    PromptOfMessages,
    Stop,
    TextBlock,
    TextDelta,
)
from graphgen.gateway.service import Service

BILLING_HEADER = "x-anthropic-billing-header:"
"""Claude Code begins its first block of `system` so, and has something new behind it in each request: no prompt would
find its pages in the prefix cache."""
PING = named_event("ping", {"type": "ping"})
_SHARED = ("stream", "temperature", "top_p", "top_k", "seed", "min_tokens", "ignore_eos", "priority", "cache_salt")
_SHARED_TIMES = ("deadline_ms", "itl_target_ms", "ttft_target_ms", "tpot_target_ms")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Messages:
    """See this module."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, MessagesRequest)
        shared = {field: getattr(request, field) for field in (*_SHARED, *_SHARED_TIMES)}
        chat = structs.replace(_chat_of(request), stop=request.stop_sequences, max_tokens=request.max_tokens, **shared)
        prompt, sampling = prompt_without_calls(chat), sampling_of(chat, request.max_tokens)
        writer = _Writer(self._service, scope, request, self._service.known(request.model))
        async with self._service.pieces([prompt], sampling, scope, receive) as pieces:
            if request.stream:
                await send_events(send, writer.events(pieces))
            else:
                await send_json(send, await writer.whole(pieces))

    async def count_tokens(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, PromptOfMessages)
        self._service.known(request.model)
        found = await self._service.read_prompt(prompt_without_calls(_chat_of(request)), scope)
        await send_json(send, InputTokens(len(found.token_ids)))


def _chat_of(request: PromptOfMessages) -> schema.ChatRequest:
    """Raises ApiError for blocks that are no text."""
    messages: list[dict[str, Any]] = []
    system = request.system
    if isinstance(system, list):
        blocks = [block for block in system if not str(block.get("text")).startswith(BILLING_HEADER)]
        system = _text_of(blocks, "system")
    if system:
        messages.append({"role": "system", "content": system})
    for message in request.messages:
        messages += _chat_messages(message)
    output, thinking = request.output_config or Effort(), request.thinking
    tools = [_chat_tool(tool) for tool in request.tools or [] if tool.get("type", "custom") == "custom"]
    return schema.ChatRequest(
        messages=messages,
        tools=tools or None,
        tool_choice=_chat_choice(request.tool_choice) if tools else None,
        response_format=_chat_format(output.format),
        reasoning_effort=output.effort,
        chat_template_kwargs=None if thinking is None else {"enable_thinking": thinking.type != "disabled"},
    )


def _chat_messages(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A message of blocks as one of a chat, behind one for each result of a tool that it has."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        return [{"role": role, "content": content}]
    texts, results, calls, thoughts = [], [], [], []
    for block in content:
        match block.get("type"):
            case "tool_result":
                said = block.get("content") or ""
                text = said if isinstance(said, str) else _text_of(said, "messages")
                results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input")}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "thinking":
                thoughts.append(str(block.get("thinking") or ""))
            case "redacted_thinking":
                pass  # what Anthropic has encrypted is nothing to others
            case _:
                texts.append(block)
    if not (texts or calls or thoughts):
        return results
    own: dict[str, Any] = {"role": role, "content": _text_of(texts, "messages")}
    if calls:
        own["tool_calls"] = calls
    if any(thoughts):
        own["reasoning_content"] = "\n".join(thoughts)
    return [*results, own]


def _text_of(blocks: Any, param: str) -> str:  # whatever JSON has
    if isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks):
        texts = [block.get("text") for block in blocks if block.get("type") == "text"]
        if len(texts) == len(blocks) and all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
    text = f"{param} has {blocks!r:.100}: this model reads text alone"
    raise ApiError(400, text, "invalid_request", param)


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    known = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
    return {"type": "function", "function": {name: value for name, value in known.items() if value is not None}}


def _chat_choice(choice: Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    name = _CHOICES.get(str(choice.get("type")))
    if name is None:
        text = f"tool_choice is {choice!r:.100}: its type is auto, any, tool or none"
        raise ApiError(400, text, "invalid_request", "tool_choice")
    return name


def _chat_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    return {"type": given.get("type"), "json_schema": {"name": "answer", "schema": given.get("schema")}}


class _Writer:
    """One message as it grows."""

    def __init__(self, service: Service, scope: Scope, request: MessagesRequest, model: str) -> None:
        self._service = service
        self._scope = scope
        self._stops = request.stop_sequences or []
        self._id = new_id("msg")
        self._model = model
        self._tally = Tally(1)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finish = ""
        self._has_block = False

    async def whole(self, pieces: Pieces) -> AnswerMessage:
        """The answer to who does not stream."""
        async for batch in pieces.batches():
            self._take(batch)
        text = "".join(self._texts)
        stop = await self._stop()
        return self._message([TextBlock(text=text)] if text else [], stop.stop_reason, stop.stop_sequence)

    async def events(self, pieces: Pieces) -> AsyncIterator[bytes]:
        """The answer as server-sent events. What ends the request before the first of them is raised; later it is one
        of them."""
        begun = False
        try:
            async for batch in pieces.batches():
                news = self._grow(self._take(batch))
                yield (news or PING) if begun else self._begin() + news
                begun = True
        except Exception as error:
            if isinstance(error, GoneError) or not begun:
                raise
            yield named_event("error", anthropic_body(error_of(error)))
            return
        last = named_event("content_block_stop", BlockStop(index=0)) if self._has_block else b""
        ended = MessageDelta(delta=await self._stop(), usage=self._usage)
        yield last + named_event("message_delta", ended) + named_event("message_stop", MessageStop())

    def _take(self, batch: Sequence[tuple[int, StreamPiece]]) -> str:
        """The new text."""
        for number, piece in batch:
            self._tally.add(number, piece)
            self._token_ids += piece.token_ids
            self._finish = piece.finish_reason or self._finish
        text = "".join(piece.text for _, piece in batch)
        self._texts.append(text)
        return text

    def _begin(self) -> bytes:
        return named_event("message_start", MessageStart(message=self._message([])))

    def _grow(self, text: str) -> bytes:
        if not text:
            return b""
        start = b""
        if not self._has_block:
            self._has_block = True
            start = named_event("content_block_start", BlockStart(index=0, content_block=TextBlock(text="")))
        return start + named_event("content_block_delta", BlockDelta(index=0, delta=TextDelta(text=text)))

    async def _stop(self) -> Stop:
        """Why the output has ended. The engine does not say by which stop string: the last tokens do."""
        if self._finish == "length":
            return Stop(stop_reason="max_tokens", stop_sequence=None)
        if not self._stops or not self._token_ids or self._token_ids[-1] in self._service.core.welcome.eos_token_ids:
            return Stop(stop_reason="end_turn", stop_sequence=None)
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

    def _message(
        self, content: list[TextBlock], stop_reason: str | None = None, stop_sequence: str | None = None
    ) -> AnswerMessage:
        return AnswerMessage(
            id=self._id,
            model=self._model,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=self._usage,
        )
