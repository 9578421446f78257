"""The name of each HTTP request: its client's X-Request-Id, or one that is made here. It is in the answer and in the
logs of every process that the request passes.

Owns which names are taken: a client's may be of any length and hold anything.
"""

import re
import secrets

from starlette.types import ASGIApp

from graphgen.gateway.http import Message, Receive, Scope, Send
from graphgen.ipc.ggp.limits import MAX_LOG_ID_LEN

HEADER = b"x-request-id"
REQUEST_ID = "graphgen.request_id"
"""In a scope."""
_TAKEN = re.compile(rb"[!-~]{1,%d}" % MAX_LOG_ID_LEN)


class RequestIds:
    """An application whose requests have names."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = _name_of(scope)
        scope[REQUEST_ID] = name.decode()

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (HEADER, name)]}
            await send(message)

        await self._app(scope, receive, send_on)


def _name_of(scope: Scope) -> bytes:
    """One that is too long, or not of printable ASCII without spaces, is replaced."""
    given: bytes = dict(scope["headers"]).get(HEADER, b"")
    return given if _TAKEN.fullmatch(given) else f"req-{secrets.token_hex(12)}".encode()
