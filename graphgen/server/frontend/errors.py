"""Which error of the protocol answers which exception. Used wherever a request of a client fails."""

import logging

import msgspec

from graphgen.ipc.errors import (
    DeadlineError,
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    NumericalError,
    OverloadedError,
    PoisonedRequestError,
    PromptTooLongError,
)
from graphgen.ipc.ggp.codes import Code
from graphgen.ipc.ggp.framing import FrameError, make_error
from graphgen.ipc.ggp.messages import Error

SERVERS_OWN: frozenset[Code] = frozenset({"draining", "engine_lost", "poisoned", "numerical", "internal"})
"""What says nothing about the message that it answers."""

logger = logging.getLogger("graphgen.server.frontend")


def error_of(failure: BaseException, request_id: int | None, log_id: str = "") -> Error:
    """What the client of a failed `generate` is told. log_id: what logs call it."""
    about = "generate"
    match failure:
        case FrameError():
            return msgspec.structs.replace(failure.error, id=request_id, about=about)
        case OverloadedError():
            retry_after_ms = round(failure.retry_after_s * 1000)
            return make_error("overloaded", str(failure), request_id, about, retry_after_ms)
    code = _code_of(failure)
    if code == "internal":
        logger.error("request %s failed", log_id or request_id, exc_info=failure)
        return make_error(code, f"the server failed with {type(failure).__name__}", request_id, about)
    return make_error(code, str(failure), request_id, about)


def _code_of(failure: BaseException) -> Code:
    match failure:
        case PromptTooLongError():
            return "never_fits"
        case InvalidRequestError():
            return "bad_request"
        case DeadlineError():
            return "deadline"
        case PoisonedRequestError():
            return "poisoned"
        case NumericalError():
            return "numerical"
        case EngineDeadError() | EngineClosedError():
            return "engine_lost"
        case _:
            return "internal"
