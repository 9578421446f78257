"""How many requests this gateway has answered, by path and status, and that the frontend hears of it.

The frontend adds up what all gateways report: a scraper that reaches any of them gets the counts of all.
"""

import asyncio
import contextlib
from collections import Counter

from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.ggp.limits import MAX_ENDPOINTS
from graphgen.remote.core import RemoteCore

REPORT_S = 1.0
CLIENT_LEFT = 499
"""Counted where nothing could be answered, as nginx does."""
OTHER_PATH = "other"
"""Of requests for what is no endpoint: their paths are without number."""


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
