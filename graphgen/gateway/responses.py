"""OpenAI's Responses API, by a server that keeps nothing: `/v1/responses`.

Owns how the items of a request become a chat, and in which order the events of a response come. A client sends the
whole conversation each time, as Codex does; what would need an earlier response is refused.
"""

import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from msgspec import Struct, structs

from graphgen.calls.outputs import StreamPiece
from graphgen.gateway import schema
from graphgen.gateway.errors import ApiError, error_of
from graphgen.gateway.generation import Pieces, Tally, not_served, prompt_without_calls, sampling_of
from graphgen.gateway.http import KEEP_ALIVE, GoneError, Receive, Scope, Send, named_event, send_events, send_json
from graphgen.gateway.ids import new_id
from graphgen.gateway.responses_schema import (
    IncompleteDetails,
    InputTokensDetails,
    ItemChanged,
    Message,
    OutputText,
    PartChanged,
    Reasoning,
    Response,
    ResponseChanged,
    ResponseError,
    ResponsesRequest,
    ResponsesUsage,
    TextDelta,
    TextDone,
    TextFormat,
)
from graphgen.gateway.service import Service

_UNSERVED = ("previous_response_id", "conversation", "background", "prompt")
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class Responses:
    """See this module."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, ResponsesRequest)
        chat = chat_request_of(request)
        prompt, sampling = prompt_without_calls(chat), sampling_of(chat, chat.max_tokens)
        writer = _Writer(request, self._service.known(request.model))
        async with self._service.pieces([prompt], sampling, scope, receive) as pieces:
            if request.stream:
                await send_events(send, writer.events(pieces))
            else:
                await send_json(send, await writer.whole(pieces))


def chat_request_of(request: ResponsesRequest) -> schema.ChatRequest:
    """The same as a chat. Raises ApiError for what needs a memory, and for items that are none of a chat."""
    for name in _UNSERVED:
        if getattr(request, name):
            raise not_served(name, "what an earlier request has left", "send the whole conversation as input")
    if request.n is not None and request.n != 1:
        raise not_served("n", "several outputs")
    reasoning, text = request.reasoning or Reasoning(), request.text or TextFormat()
    shared = {field: getattr(request, field) for field in schema.Generation.__struct_fields__}
    limit = request.max_tokens if request.max_output_tokens is None else request.max_output_tokens
    tools = [_chat_tool(tool) for tool in request.tools or [] if tool.get("type") == "function"]
    return schema.ChatRequest(
        **{**shared, "max_tokens": limit},
        messages=_messages_of(request),
        tools=tools or None,
        tool_choice=_chat_choice(request.tool_choice) if tools else None,
        response_format=_chat_format(text.format),
        top_logprobs=request.top_logprobs,
        chat_template_kwargs=request.chat_template_kwargs,
        reasoning_effort=reasoning.effort,
    )


def _messages_of(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    if not request.input:
        raise _wrong("input has no items: give a text or at least one message")
    said: dict[str, Any] | None = None  # the model's turn that the next items may belong to
    for item in request.input:
        kind = item.get("type", "message")
        if kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant"):
            if said is None or (kind == "message" and "content" in said):
                said = {"role": "assistant"}
                messages.append(said)
            _add_to_turn(said, kind, item)
            continue
        said = None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _text_of(item.get("content"))})
        elif kind == "function_call_output":
            output = _text_of(item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            raise _wrong(f"input has an item of type {kind!r}: give messages, function calls and their outputs")
    return [message for message in messages if len(message) > 1]


def _add_to_turn(turn: dict[str, Any], kind: str, item: Mapping[str, Any]) -> None:
    match kind:
        case "message":
            turn["content"] = _text_of(item.get("content"))
        case "reasoning":
            text = _text_of(item.get("content") or item.get("summary") or "")
            if text:  # what OpenAI has encrypted is nothing to others
                turn["reasoning_content"] = text
        case _:
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)


def _text_of(content: Any) -> str:  # whatever JSON has
    """Raises ApiError for what is no text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {part.get("type") for part in content} - set(_TEXT_PARTS)
        texts = [part.get("text") for part in content]
        if not kinds and all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
        if kinds:
            raise _wrong(f"input has a part of type {kinds.pop()!r}: this model reads text alone")
    raise _wrong(f"input has a content {content!r:.100}: give text, or a list of text parts")


def _wrong(text: str) -> ApiError:
    return ApiError(400, text, "invalid_request", "input")


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _chat_choice(choice: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice if isinstance(choice, str) or choice is None else dict(choice)


def _chat_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") != "json_schema":
        return None if given is None else dict(given)
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


class _Writer:
    """One response as it grows."""

    def __init__(self, request: ResponsesRequest, model: str) -> None:
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
        )
        self._numbers = itertools.count()
        self._item_id = new_id("msg")
        self._texts: list[str] = []
        self._has_item = False
        self._finish = ""
        self._tally = Tally(1)

    async def whole(self, pieces: Pieces) -> Response:
        """The answer to who does not stream."""
        async for batch in pieces.batches():
            self._take(batch)
        return self._ended()

    async def events(self, pieces: Pieces) -> AsyncIterator[bytes]:
        """The answer as server-sent events. What ends the request before the first of them is raised; later the
        response has failed."""
        begun = False
        try:
            async for batch in pieces.batches():
                head = b"" if begun else self._begin()
                begun = True
                yield head + self._grow(self._take(batch)) or KEEP_ALIVE
        except Exception as error:
            if isinstance(error, GoneError) or not begun:
                raise
            body = error_of(error).body
            failure = ResponseError(code=body.code or body.type, message=body.message)
            failed = structs.replace(self._response, status="failed", error=failure)
            yield self._written(ResponseChanged, "response.failed", response=failed)
            return
        yield self._end()

    def _take(self, batch: Sequence[tuple[int, StreamPiece]]) -> str:
        """The new text."""
        for number, piece in batch:
            self._tally.add(number, piece)
            self._finish = piece.finish_reason or self._finish
        text = "".join(piece.text for _, piece in batch)
        self._texts.append(text)
        return text

    def _begin(self) -> bytes:
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._written(ResponseChanged, kind, response=self._response) for kind in kinds)

    def _grow(self, text: str) -> bytes:
        if not text:
            return b""
        begun = b"" if self._has_item else self._begin_item()
        return begun + self._written(TextDelta, item_id=self._item_id, output_index=0, delta=text)

    def _begin_item(self) -> bytes:
        self._has_item = True
        item = Message(id=self._item_id, status="in_progress", content=[])
        part: dict[str, Any] = {"item_id": self._item_id, "output_index": 0, "part": OutputText(text="")}
        return b"".join(
            (
                self._written(ItemChanged, "response.output_item.added", output_index=0, item=item),
                self._written(PartChanged, "response.content_part.added", **part),
            )
        )

    def _end(self) -> bytes:
        response = self._ended()
        (item,) = response.output
        (part,) = item.content
        place: dict[str, Any] = {"item_id": self._item_id, "output_index": 0}
        begun = b"" if self._has_item else self._begin_item()
        return begun + b"".join(
            (
                self._written(TextDone, text=part.text, **place),
                self._written(PartChanged, "response.content_part.done", part=part, **place),
                self._written(ItemChanged, "response.output_item.done", output_index=0, item=item),
                self._written(ResponseChanged, f"response.{response.status}", response=response),
            )
        )

    def _ended(self) -> Response:
        status = "incomplete" if self._finish == "length" else "completed"
        usage = self._tally.usage
        return structs.replace(
            self._response,
            status=status,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            output=[Message(id=self._item_id, status=status, content=[OutputText(text="".join(self._texts))])],
            usage=ResponsesUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
        )

    def _written(self, kind: type[Struct], name: str | None = None, **fields: Any) -> bytes:  # of any event
        named = {} if name is None else {"type": name}
        made: Any = kind(sequence_number=next(self._numbers), **named, **fields)
        return named_event(made.type, made)
