"""The name of each HTTP request: its client's X-Request-Id, or one that is made here. It is in the answer and in the
logs of every process that the request passes.

Owns which names are taken: a client's may be of any length and hold anything.
"""

import re
import secrets
from collections.abc import Awaitable

from graphgen.gateway.http import Message, Scope, Send
from graphgen.ipc.ggp.limits import MAX_LOG_ID_LEN

HEADER = b"x-request-id"
REQUEST_ID = "graphgen.request_id"
"""In a scope."""
_TAKEN = re.compile(rb"[!-~]{1,%d}" % MAX_LOG_ID_LEN)


class Beginning:
    """The `send` of a request: names the answer when it begins, and knows how it did. What follows is passed on."""

    def __init__(self, send: Send, name: bytes) -> None:
        self.status: int | None = None
        """None until the answer has begun."""
        self._send = send
        self._name = name

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (HEADER, self._name)]}
        return self._send(message)


def name_of(scope: Scope) -> bytes:
    """One that is too long, or not of printable ASCII without spaces, is replaced."""
    given: bytes = dict(scope["headers"]).get(HEADER, b"")
    return given if _TAKEN.fullmatch(given) else f"req-{secrets.token_hex(12)}".encode()
