"""HTTP below the endpoints: bodies in, answers and events out, and readers that leave.

Owns the limits of a body, the form of server-sent events, and that a client which disconnects is noticed. Plain ASGI:
wrappers that hide `http.disconnect` would let requests of gone clients run on.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Protocol, TypeVar

import msgspec

from graphgen.gateway.errors import ApiError, Headers, error_of, openai_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Body = TypeVar("Body")

BODY_WRITER = "graphgen.body_writer"
"""In a scope: the answer's BodyWriter, where the server has one (`graphgen.gateway.protocol`)."""
FIELD_NAMES = "graphgen.field_names"
"""In a scope: what the client calls fields that have other names in `graphgen.gateway.schema.ChatRequest`."""
BODY_S = 30.0
"""A body that has not come after so long is not waited for."""
JSON_HEADERS: Headers = [(b"content-type", b"application/json")]
EVENT_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))
"""Characters that end a line to some clients, which would cut an event in two; JSON has them within strings alone."""


class BodyWriter(Protocol):
    """Writes parts of an answer at once, from any callback of the loop. `send` does the same from the request's task
    alone, which has to be woken for it through every layer of the application."""

    @property
    def is_ready(self) -> bool:
        """Whether the answer has begun and its client reads as fast as it comes; else `send` is to be awaited."""

    def write(self, part: bytes) -> None:
        """Not empty. Only while it is ready."""


class GoneError(Exception):
    """The client has closed its connection."""


async def read_json(scope: Scope, receive: Receive, kind: type[Body], limit_bytes: int) -> Body:
    """The body of a request. Raises ApiError for what is none, RecursionError, GoneError."""
    try:
        async with asyncio.timeout(BODY_S):
            body = await _read_body(receive, limit_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body had not come after {BODY_S:g} s: send it at once", "timeout") from None
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        param = path.strip("`").removeprefix("$").removeprefix(".") or None
        raise ApiError(400, f"{param or 'the body'}: {what}", "invalid_request", param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        encoding = dict(scope["headers"]).get(b"content-encoding", b"identity").decode("latin-1")
        if encoding.lower() != "identity":
            text = f"content-encoding is {encoding!r:.100}, which is not served: send the body as JSON without it"
            raise ApiError(415, text, "invalid_json") from None
        raise ApiError(400, f"the body is no JSON: {error}", "invalid_json") from None


async def _read_body(receive: Receive, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > limit_bytes:
            raise ApiError(413, f"the body has more than {limit_bytes} bytes: shorten it", "too_large")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def answer_of(error: Exception, scope: Scope) -> ApiError:
    """With the names of fields that the client knows."""
    names: Mapping[str, str] = scope.get(FIELD_NAMES, {})
    return error_of(error).with_names(names)


async def send_bytes(send: Send, status: int, body: bytes, headers: Headers = JSON_HEADERS) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: object, status: int = 200) -> None:
    await send_bytes(send, status, msgspec.json.encode(value))


async def send_error(send: Send, error: ApiError, body: object) -> None:
    """body: the form that the endpoint's clients expect."""
    await send_bytes(send, error.status, msgspec.json.encode(body), [*JSON_HEADERS, *error.headers])


def event(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + _one_line(msgspec.json.encode(value)) + b"\n\n"


def named_event(name: str, value: object) -> bytes:
    """A server-sent event that says its name twice, as those of Responses and of Anthropic's API do."""
    return b"event: %b\n" % name.encode() + event(value)


class EventTemplate:
    """An event that differs from others like it in one text alone: the rest of it is encoded once."""

    def __init__(self, make: Callable[[str], object]) -> None:
        """make: the event's value with a text in it."""
        mark = secrets.token_hex(16)
        self._before, _, self._after = event(make(mark)).partition(msgspec.json.encode(mark))

    def event(self, text: str) -> bytes:
        return self._before + _one_line(msgspec.json.encode(text)) + self._after


def error_event(error: ApiError) -> bytes:
    """What ends a stream that has begun."""
    return event(openai_body(error))


def _one_line(text: bytes) -> bytes:
    if not text.isascii():
        for end, escaped in _LINE_ENDS:
            text = text.replace(end, escaped)
    return text


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def begin_events(send: Send) -> Awaitable[None]:
    return send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})


def send_event(send: Send, data: bytes) -> Awaitable[None]:
    """data: one event or several, or a comment."""
    return send({"type": "http.response.body", "body": data, "more_body": True})


def end_events(send: Send) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": b""})
