"""The error codes of GGP/1: what each means, whether a repetition may succeed, and its closest HTTP status.

Owns the table. Used by the frontend, which sends codes, by the Python client, which makes exceptions of them, and by
the reference in PROTOCOL.md. A code is never removed and never changes its meaning.
"""

from typing import Literal

from msgspec import Struct

Code = Literal[
    "bad_frame",
    "bad_request",
    "too_large",
    "never_fits",
    "unsupported_version",
    "no_session",
    "forbidden",
    "duplicate_id",
    "overloaded",
    "deadline",
    "draining",
    "engine_lost",
    "poisoned",
    "slow_consumer",
    "internal",
    "numerical",
]


class CodeInfo(Struct, frozen=True):
    """What a client can know of an error by its code alone."""

    http_status: int
    retryable: bool  # the same message may succeed later, as it is
    meaning: str


CODES: dict[Code, CodeInfo] = {
    "bad_frame": CodeInfo(
        400, False, "not two frames, a wrong header, an unknown kind, or no msgpack map of valid UTF-8"
    ),
    "bad_request": CodeInfo(
        400, False, "a field of a wrong type or outside its table's range, or a contradiction between two"
    ),
    "too_large": CodeInfo(413, False, "a text or a list above a limit of `welcome`, within its table's range"),
    "never_fits": CodeInfo(
        422, False, "prompt and output can never fit the model's context or the KV cache; any prompt that is too long"
    ),
    "unsupported_version": CodeInfo(
        426, False, "no common version; the error's `versions` says what the server speaks"
    ),
    "no_session": CodeInfo(401, True, "the connection has no session: say `hello`, then repeat"),
    "forbidden": CodeInfo(
        403, False, "the session belongs to a client with another key, or the connection's key was removed"
    ),
    "duplicate_id": CodeInfo(409, False, "an open request of the session has this id; that request goes on"),
    "overloaded": CodeInfo(429, True, "a queue or the client's share of it is full, or the deadline cannot be met"),
    "deadline": CodeInfo(
        408,
        False,
        "the request's deadline passed before its output was complete, or is too early even for an idle server",
    ),
    "draining": CodeInfo(503, True, "the server is about to end and takes no new work"),
    "engine_lost": CodeInfo(503, True, "the engine ended; the output is lost, and the engine is being started again"),
    "poisoned": CodeInfo(500, False, "the worker ended each time it computed the request, which is not tried again"),
    "slow_consumer": CodeInfo(408, False, "the client took no output for the time of `slow_consumer_ms`"),
    "internal": CodeInfo(500, False, "a fault of the server"),
    "numerical": CodeInfo(500, False, "all logits of the model for a token of the request were NaN or -inf"),
}
