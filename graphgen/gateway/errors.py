"""What is told when a request cannot be served: status, headers and body as OpenAI's clients expect them.

Owns the mapping of graphgen's errors. Clients of OpenAI's API repeat a request by themselves on 408, 409, 429 and every
5xx, up to twice; where that can lead to nothing `x-should-retry: false` says so.
"""

import math
import re
from collections.abc import Mapping
from typing import Self

from msgspec import Struct

from graphgen.ipc.errors import (
    ConnectionLostError,
    DeadlineError,
    EngineClosedError,
    EngineDeadError,
    GraphgenError,
    InvalidRequestError,
    NumericalError,
    OverloadedError,
    PoisonedRequestError,
    PromptTooLongError,
    ServerError,
)
from graphgen.ipc.ggp.codes import CODES

Headers = list[tuple[bytes, bytes]]

_NAMES = re.compile(r"""^\w+|(?<!['"])\b[a-z]+(?:_[a-z]+)+\b""")
"""Where a message may name a field: its first word, and what is no word of a language; in quotes are a client's own."""
RETRY_AFTER_S = 1.0
"""When to try again where no server could say."""


class ErrorBody(Struct, frozen=True):
    """The value of `error` in an answer, or in an event of a stream that has begun."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ApiError(Exception):
    """Ends a request with this answer."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, _type_of(status), param, code)
        self.headers = [*(headers or []), *_retry_headers(status, retry_after_s)]

    def with_names(self, names: Mapping[str, str]) -> Self:
        """names: what the client calls the fields that have other names here."""
        body = self.body
        if names:
            text = _NAMES.sub(lambda found: names.get(found[0], found[0]), body.message)
            param = None if body.param is None else names.get(body.param, body.param)
            self.body = ErrorBody(text, body.type, param, body.code)
        return self


def openai_body(error: ApiError) -> object:
    return {"error": error.body}


def anthropic_body(error: ApiError) -> object:
    """As clients of Anthropic's API expect it."""
    match error.status:
        case 413:
            kind = "request_too_large"
        case 503:
            kind = "overloaded_error"
        case status if status >= 500:
            kind = "api_error"
        case _:
            kind = error.body.type
    return {"type": "error", "error": {"type": kind, "message": error.body.message}}


def _type_of(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 404:
            return "not_found_error"
        case 429:
            return "rate_limit_error"
        case _ if status < 500:
            return "invalid_request_error"
        case _:
            return "server_error"


def _retry_headers(status: int, retry_after_s: float | None) -> Headers:
    if retry_after_s is not None:
        milliseconds = max(1, round(retry_after_s * 1000))
        return [
            (b"retry-after", str(math.ceil(milliseconds / 1000)).encode()),
            (b"retry-after-ms", str(milliseconds).encode()),
        ]
    return [(b"x-should-retry", b"false")] if status in (408, 409) or status >= 500 else []


def error_of(error: Exception) -> ApiError:
    """The answer to what a client of the frontend raised."""
    match error:
        case ApiError():
            return error
        case PromptTooLongError():
            # By these words programs know that a shorter prompt would do.
            text = f"This model's maximum context length is exceeded, the prompt is too long: {error}"
            return ApiError(400, text, "context_length_exceeded", "messages")
        case InvalidRequestError():
            return ApiError(400, str(error), "invalid_request")
        case OverloadedError():
            return ApiError(429, str(error), "overloaded", retry_after_s=error.retry_after_s or RETRY_AFTER_S)
        case DeadlineError():
            return ApiError(408, str(error), "deadline")
        case PoisonedRequestError() | NumericalError():
            return ApiError(500, str(error), "poisoned" if isinstance(error, PoisonedRequestError) else "numerical")
        case ConnectionLostError() | EngineDeadError() | EngineClosedError():
            return ApiError(503, str(error), "engine_lost", retry_after_s=RETRY_AFTER_S)
        case ServerError(code=code) if code in CODES:
            info = CODES[code]
            retry_after_s = RETRY_AFTER_S if info.retryable else None
            return ApiError(info.http_status, str(error), code, retry_after_s=retry_after_s)
        case GraphgenError():
            return ApiError(500, str(error), "internal")
        case RecursionError():  # nothing here goes as deep as that but what reads or shows a client's JSON
            text = "the body has values nested too deep within one another to be read: make it flatter"
            return ApiError(400, text, "invalid_json")
        case _:
            return ApiError(500, f"the server failed with {type(error).__name__}", "internal")
