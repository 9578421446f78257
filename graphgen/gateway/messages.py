"""Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.

Owns how blocks become a chat. What is refused and how a request is served is as for chats.
"""

from collections.abc import Mapping
from typing import Any

from msgspec import structs

from graphgen.gateway import schema
from graphgen.gateway.chat_turn import read_chat
from graphgen.gateway.errors import ApiError
from graphgen.gateway.generation import chat_prompt
from graphgen.gateway.http import FIELD_NAMES, Receive, Scope, Send, send_json
from graphgen.gateway.message_writer import MessageWriter
from graphgen.gateway.messages_schema import Effort, InputTokens, MessagesRequest, PromptOfMessages
from graphgen.gateway.outputs import send_outputs
from graphgen.gateway.service import Service
from graphgen.gateway.tools import read_tools

BILLING_HEADER = "x-anthropic-billing-header:"
"""Claude Code begins its first block of `system` so, and has something new behind it in each request: no prompt would
find its pages in the prefix cache."""
_SHARED = ("stream", "temperature", "top_p", "top_k", "seed", "min_tokens", "ignore_eos", "priority", "cache_salt")
_SHARED_TIMES = ("deadline_ms", "itl_target_ms", "ttft_target_ms", "tpot_target_ms")
_FIELD_NAMES = {"stop": "stop_sequences", "response_format": "output_config.format"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Messages:
    """See this module."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, MessagesRequest)
        scope[FIELD_NAMES] = _FIELD_NAMES
        shared = {field: getattr(request, field) for field in (*_SHARED, *_SHARED_TIMES)}
        chat = structs.replace(_chat_of(request), stop=request.stop_sequences, max_tokens=request.max_tokens, **shared)
        model = self._service.known(request.model)
        turn = await read_chat(self._service, chat, request.max_tokens, scope)
        writer = MessageWriter(self._service, scope, request, model, turn.outputs[0])
        async with self._service.pieces([turn.prompt], turn.sampling, scope, receive, turn.parsing) as pieces:
            if request.stream:
                await send_outputs(scope, send, pieces, writer)
            else:
                await send_json(send, await writer.whole(pieces))

    async def count_tokens(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, PromptOfMessages)
        scope[FIELD_NAMES] = _FIELD_NAMES
        self._service.known(request.model)
        chat = _chat_of(request)
        tools = read_tools(chat, self._service.parsers.has_calls)
        found = await self._service.read_prompt(chat_prompt(chat, tools.described), scope)
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
        parallel_tool_calls=False if (request.tool_choice or {}).get("disable_parallel_tool_use") else None,
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
        if not isinstance(choice.get("name"), str):
            text = f'tool_choice is {choice!r:.100}: give {{"type": "tool", "name": ...}}'
            raise ApiError(400, text, "invalid_request", "tool_choice")
        return {"type": "function", "function": {"name": choice.get("name")}}
    name = _CHOICES.get(str(choice.get("type")))
    if name is None:
        text = f"tool_choice is {choice!r:.100}: its type is auto, any, tool or none"
        raise ApiError(400, text, "invalid_request", "tool_choice")
    return name


def _chat_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    if given.get("type") != "json_schema" or given.get("schema") is None:
        text = f'output_config.format is {given!r:.100}: give {{"type": "json_schema", "schema": {{...}}}}'
        raise ApiError(400, text, "invalid_request", "output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given.get("schema")}}
