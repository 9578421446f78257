"""OpenAI's Responses API, by a server that keeps nothing: `/v1/responses`.

Owns how the items of a request become a chat. A client sends the
whole conversation each time, as Codex does; what would need an earlier response is refused.
"""

from collections.abc import Mapping
from typing import Any

from graphgen.gateway import schema
from graphgen.gateway.chat_turn import read_chat
from graphgen.gateway.errors import ApiError
from graphgen.gateway.generation import not_served
from graphgen.gateway.http import FIELD_NAMES, Receive, Scope, Send, send_json
from graphgen.gateway.outputs import send_outputs
from graphgen.gateway.response_writer import ResponseWriter
from graphgen.gateway.responses_schema import Reasoning, ResponsesRequest, TextFormat
from graphgen.gateway.service import Service

_WHOLE = "what an earlier request has left", "send the whole conversation as input"
_UNSERVED = {
    "previous_response_id": _WHOLE,
    "conversation": _WHOLE,
    "background": ("an answer that is fetched later", "leave it out and wait for the answer, or stream it"),
    "prompt": ("a prompt that OpenAI keeps", "send its text as instructions and input"),
}
"""(what cannot be served, the remedy)."""
_FIELD_NAMES = {"messages": "input", "response_format": "text.format"}
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class Responses:
    """See this module."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, ResponsesRequest)
        limit = {} if request.max_output_tokens is None else {"max_tokens": "max_output_tokens"}
        scope[FIELD_NAMES] = _FIELD_NAMES | limit
        chat, model = chat_request_of(request), self._service.known(request.model)
        turn = await read_chat(self._service, chat, chat.max_tokens, scope)
        writer = ResponseWriter(request, model, turn.outputs[0])
        async with self._service.pieces([turn.prompt], turn.sampling, scope, receive, turn.parsing) as pieces:
            if request.stream:
                await send_outputs(scope, send, pieces, writer)
            else:
                await send_json(send, await writer.whole(pieces))


def chat_request_of(request: ResponsesRequest) -> schema.ChatRequest:
    """The same as a chat. Raises ApiError for what needs a memory, and for items that are none of a chat."""
    for name, (what, remedy) in _UNSERVED.items():
        if getattr(request, name):
            raise not_served(name, what, remedy)
    if request.n is not None and request.n != 1:
        raise not_served("n", "several outputs")
    reasoning, text = request.reasoning or Reasoning(), request.text or TextFormat()
    shared = {field: getattr(request, field) for field in schema.Generation.__struct_fields__}
    limit = request.max_tokens if request.max_output_tokens is None else request.max_output_tokens
    tools = [_chat_tool(tool) for tool in request.tools or [] if tool.get("type") == "function"]
    return schema.ChatRequest(
        **{**shared, "max_tokens": limit, "response_format": _chat_format(text.format)},
        messages=_messages_of(request),
        tools=tools or None,
        tool_choice=_chat_choice(request.tool_choice) if tools else None,
        parallel_tool_calls=request.parallel_tool_calls,
        logprobs=request.asks_for_logprobs,
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
            raise _wrong(f"input has an item of type {kind!r:.100}: give messages, function calls and their outputs")
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
        others = [kind for part in content if (kind := part.get("type")) not in _TEXT_PARTS]
        texts = [part.get("text") for part in content]
        if not others and all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
        if others:
            raise _wrong(f"input has a part of type {others[0]!r:.100}: this model reads text alone")
    raise _wrong(f"input has a content {content!r:.100}: give text, or a list of text parts")


def _wrong(text: str) -> ApiError:
    return ApiError(400, text, "invalid_request", "input")


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _chat_choice(choice: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, str) or choice is None:
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        text = f'tool_choice: {choice!r:.100} names no function: give {{"type": "function", "name": ...}}'
        raise ApiError(400, text, "invalid_request", "tool_choice")
    return {"type": "function", "function": {"name": choice["name"]}}


def _chat_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") != "json_schema":
        return None if given is None else dict(given)
    if given.get("schema") is None:
        text = 'text.format: no schema is given: give {"type": "json_schema", "name": ..., "schema": {...}}'
        raise ApiError(400, text, "invalid_request", "text.format")
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
