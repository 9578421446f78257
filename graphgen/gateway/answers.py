"""How many requests this gateway has answered, by path and status, and that the frontend hears of it.

The frontend adds up what all gateways report: a scraper that reaches any of them gets the counts of all.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable

from graphgen.gateway.http import Message, Receive, Scope, Send
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.ggp.limits import MAX_ENDPOINTS
from graphgen.remote.core import RemoteCore

Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]

REPORT_S = 1.0
CLIENT_LEFT = 499
"""Counted where nothing could be answered, as nginx does."""
OTHER_PATH = "other"
"""Of requests for what is no endpoint: their paths are without number."""


class Counted:
    """An endpoint whose answers are counted, each when it has ended."""

    def __init__(self, endpoint: Endpoint, path: str, answers: "Answers") -> None:
        """path: of its route."""
        self._endpoint = endpoint
        self._path = path
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = CLIENT_LEFT

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._endpoint(scope, receive, send_on)
        finally:
            self._answers.count(self._path, status)


class Answers:
    """Those that were not reported yet."""

    def __init__(self, core: RemoteCore) -> None:
        self._core = core
        self._counts: Counter[str] = Counter()

    def count(self, path: str, status: int) -> None:
        """path: of a route."""
        self._counts[f"{path} {status}"] += 1

    def report(self) -> None:
        """Tells the frontend. While there is none, they are kept."""
        while self._counts:
            some = dict(list(self._counts.items())[:MAX_ENDPOINTS])
            self._core.report(some)
            for name in some:
                del self._counts[name]

    async def report_always(self) -> None:
        """Until it is cancelled; then once more."""
        try:
            while True:
                await asyncio.sleep(REPORT_S)
                with contextlib.suppress(GraphgenError):
                    self.report()
        finally:
            with contextlib.suppress(GraphgenError):
                self.report()
