"""The OpenAPI document of the gateway, `GET /openapi.json`, made from the types that it reads and answers with.

Owns what is said of each path; a test holds that no endpoint of the application is missing.
"""

from typing import Any, NamedTuple

import msgspec

from graphgen.base.version import __version__
from graphgen.gateway import messages_schema, responses_schema, schema
from graphgen.gateway.http import Receive, Scope, Send, send_bytes

_REF = "#/components/schemas/{name}"
_TEXT = {"type": "string"}
_EVENTS = {
    "text/event-stream": {
        "schema": {"type": "object", "properties": {"event": _TEXT, "data": _TEXT}, "required": ["data"]}
    }
}
"""The schema is that of each event: OpenAPI has no other place for it before 3.2."""


class _Operation(NamedTuple):
    """One method of one path."""

    summary: str
    body: type | None = None
    answer: type | None = None  # None: any JSON
    streams: bool = False
    content: str = "application/json"


_OPERATIONS: dict[tuple[str, str], _Operation] = {
    ("POST", "/v1/chat/completions"): _Operation(
        "Answer a chat", schema.ChatRequest, schema.ChatCompletion, streams=True
    ),
    ("POST", "/v1/completions"): _Operation(
        "Continue a text", schema.CompletionRequest, schema.TextCompletion, streams=True
    ),
    ("POST", "/v1/responses"): _Operation(
        "Answer a conversation", responses_schema.ResponsesRequest, responses_schema.Response, streams=True
    ),
    ("POST", "/v1/messages"): _Operation(
        "Answer a conversation", messages_schema.MessagesRequest, messages_schema.AnswerMessage, streams=True
    ),
    ("POST", "/v1/messages/count_tokens"): _Operation(
        "Count the tokens of a conversation", messages_schema.PromptOfMessages, messages_schema.InputTokens
    ),
    ("POST", "/tokenize"): _Operation("Tokens of a prompt", schema.TokenizeRequest, schema.Tokens),
    ("POST", "/detokenize"): _Operation("Text of tokens", schema.DetokenizeRequest, schema.Detokenized),
    ("GET", "/tokenizer_info"): _Operation("Special tokens and chat template"),
    ("GET", "/v1/models"): _Operation("Names of the model", answer=schema.ModelList),
    ("GET", "/v1/models/{name}"): _Operation("One of them", answer=schema.Model),
    ("GET", "/health"): _Operation("Whether frontend, scheduler and worker answer"),
    ("GET", "/ready"): _Operation("Whether new requests are taken"),
    ("GET", "/metrics"): _Operation("Metrics for Prometheus", content="text/plain"),
    ("GET", "/v1/engine/steps"): _Operation("What the engine does, live", content="text/event-stream"),
    ("GET", "/"): _Operation("A page that shows it", content="text/html"),
    ("GET", "/page/{name}"): _Operation("A file of the page", content="text/html"),
    ("GET", "/openapi.json"): _Operation("This document"),
}


def document() -> dict[str, Any]:
    """The document as JSON has it."""
    kinds = {kind for one in _OPERATIONS.values() for kind in (one.body, one.answer) if kind is not None}
    ordered = sorted(kinds, key=lambda kind: (kind.__module__, kind.__name__))
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    by_kind = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in _OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _described(path, operation, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "graphgen", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _described(path: str, operation: _Operation, by_kind: dict[type, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {} if operation.answer is None else by_kind[operation.answer]
    content = {operation.content: {"schema": answer}, **(_EVENTS if operation.streams else {})}
    failure = {"description": "An error", "content": {"application/json": {"schema": {"type": "object"}}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": operation.summary, "content": content}, "default": failure},
    }
    if operation.body is not None:
        body = {"application/json": {"schema": by_kind[operation.body]}}
        described["requestBody"] = {"required": True, "content": body}
    if "{name}" in path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return described


class OpenApi:
    """The endpoint."""

    def __init__(self) -> None:
        self._bytes = msgspec.json.encode(document())

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(send, 200, self._bytes)
