"""Which exception a message of an engine becomes: of a request that was refused, of a process that cannot go on.

Owns nothing. Called by `graphgen.requests.link` and the supervisor of a server.
"""

from graphgen.ipc import errors
from graphgen.ipc.engine_messages import Rejected
from graphgen.ipc.errors import (
    DeadlineError,
    EngineDeadError,
    GraphgenError,
    InvalidRequestError,
    NumericalError,
    OverloadedError,
    PoisonedRequestError,
)
from graphgen.ipc.worker_messages import Failed


def refusal_of(rejected: Rejected) -> GraphgenError:
    """The exception for the one request."""
    match rejected.error:
        case "OverloadedError":
            return OverloadedError(rejected.message, rejected.retry_after_s or 0.0)
        case "DeadlineError":
            return DeadlineError(rejected.message)
        case "PoisonedRequestError":
            return PoisonedRequestError(rejected.message)
        case "NumericalError":
            return NumericalError(rejected.message)
        case _:
            return InvalidRequestError(rejected.message)


def error_of(failed: Failed) -> GraphgenError:
    """The exception that a process ended with, as the class it had there if that is one of ours."""
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, GraphgenError):
        return kind(failed.message)
    return EngineDeadError(f"{failed.where} failed with {failed.error}: {failed.message}")
