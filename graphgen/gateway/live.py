"""What the engine does now, as events for the page: `GET /v1/engine/steps`.

Owns who watches. While somebody does, the frontend is asked ten times a second, once for all viewers of this gateway;
while nobody does, nothing is asked and the scheduler keeps no steps.
"""

import asyncio

from msgspec import Struct

from graphgen.gateway.errors import ApiError, error_of
from graphgen.gateway.http import (
    Receive,
    Scope,
    Send,
    begin_events,
    end_events,
    error_event,
    event,
    send_event,
    until_gone,
)
from graphgen.gateway.service import Service
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.ggp.messages import Stats, StatsRequest
from graphgen.ipc.ggp.statistics import Live, Metrics, OpenRequest, Steps

PERIOD_S = 0.1
AWAY_S = 1.0
"""Before a frontend that did not answer is asked again."""
MOST_VIEWERS = 16
UNREAD_EVENTS = 20
"""Of a viewer that reads slowly; of more, the oldest are dropped."""


class Snapshot(Struct, frozen=True, kw_only=True):
    """One event. Counts are since the start: a viewer takes differences."""

    serves: bool
    running: int
    waiting: list[int]
    """In the scheduler's queue, by service class."""
    held: list[int]
    """In the frontend, by service class."""
    pages_total: int
    pages_free: int
    pages_cached: int
    prompt_tokens: int
    output_tokens: int
    prefix_queries: int
    prefix_hits: int
    itl_bounds_ms: list[float]
    itl_counts: list[int]
    itl_wanted: int
    """Gaps that had a target."""
    itl_misses: int
    steps: Steps
    requests: list[OpenRequest]


class LiveFeed:
    """See this module."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._viewers: set[asyncio.Queue[bytes | None]] = set()  # None: the last
        self._poll: asyncio.Task[None] | None = None

    async def steps(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Events until the viewer leaves or the gateway ends. Raises ApiError."""
        if len(self._viewers) >= MOST_VIEWERS:
            raise ApiError(429, f"{MOST_VIEWERS} watch already: close another page", "overloaded", retry_after_s=10.0)
        events: asyncio.Queue[bytes | None] = asyncio.Queue(UNREAD_EVENTS)
        self._viewers.add(events)
        if self._poll is None or self._poll.done():
            self._poll = asyncio.create_task(self._ask_on())
        leaves = asyncio.create_task(_tell_when_gone(receive, events))
        try:
            await begin_events(send)
            while (data := await events.get()) is not None:
                await send_event(send, data)
            await end_events(send)
        finally:
            leaves.cancel()
            self._viewers.discard(events)

    def end(self) -> None:
        """The gateway ends: viewers wait for nothing more."""
        for events in self._viewers:
            _put(events, None)

    async def _ask_on(self) -> None:
        """While there are viewers."""
        newest = 0
        while self._viewers:
            try:
                question = StatsRequest(metrics=True, live_after=newest)
                stats = await asyncio.to_thread(self._service.frontends.stats, question)
            except GraphgenError as error:
                self._show(error_event(error_of(error)))
                await asyncio.sleep(AWAY_S)
                continue
            assert stats.metrics is not None, "they were asked for"
            assert stats.live is not None, "it was asked for"
            newest = stats.live.steps.ids[-1] if stats.live.steps.ids else newest
            self._show(event(_snapshot(stats, stats.metrics, stats.live)))
            await asyncio.sleep(PERIOD_S)

    def _show(self, data: bytes) -> None:
        for events in self._viewers:
            _put(events, data)


def _put(events: "asyncio.Queue[bytes | None]", data: bytes | None) -> None:
    if events.full():
        events.get_nowait()
    events.put_nowait(data)


async def _tell_when_gone(receive: Receive, events: "asyncio.Queue[bytes | None]") -> None:
    await until_gone(receive)
    _put(events, None)


def _snapshot(stats: Stats, metrics: Metrics, live: Live) -> Snapshot:
    itl = metrics.histograms["itl_s"]
    return Snapshot(
        serves=metrics.engine_serves,
        running=stats.running,
        waiting=metrics.waiting_by_class or [0],
        held=metrics.held_by_class,
        pages_total=stats.pages_total,
        pages_free=stats.pages_free,
        pages_cached=metrics.pages_cached,
        prompt_tokens=metrics.prompt_tokens,
        output_tokens=metrics.output_tokens,
        prefix_queries=metrics.prefix_queries,
        prefix_hits=metrics.prefix_hits,
        itl_bounds_ms=[round(bound * 1000, 3) for bound in itl.bounds],
        itl_counts=itl.counts,
        itl_wanted=metrics.with_target.get("itl", 0),
        itl_misses=metrics.target_misses.get("itl", 0),
        steps=live.steps,
        requests=live.requests,
    )
