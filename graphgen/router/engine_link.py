"""What the router asks of the link to an engine, whatever lies between them.

Owns no state. A `graphgen.requests.link.Link` goes to a scheduler on this machine, a
`graphgen.router.remote_link.RemoteLink` to a server elsewhere. Links are made and called by
`graphgen.router.links`; `graphgen.router.places` sends requests by them.
"""

import functools
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from graphgen.ipc.engine_messages import EngineStats, Notice, Ready
from graphgen.ipc.worker_messages import Progress
from graphgen.requests.link import Link
from graphgen.requests.link_ends import Observer, Processes
from graphgen.requests.open_request import OpenRequest


class EngineLink(Protocol):
    """The link to one engine, which may end and be there again. Any thread may call it."""

    def wait_ready(self, timeout_s: float) -> Ready:
        """What the engine says of itself once it serves. Raises what stopped the start, EngineDeadError in time."""

    def submit(self, requests: Iterable[OpenRequest]) -> None:
        """Opens the requests; from now on their sinks are called. Raises when the engine is closed or dead."""

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Ends requests without a word to their sinks. Ids that are not open any more are ignored."""

    def ask_stats(self, steps: bool = False) -> "Future[EngineStats]":
        """Asks for a snapshot and does not wait for it. steps: with those since the last such question."""

    def ask_probe(self) -> "Future[None]":
        """Is done when scheduler, worker and device have answered."""

    def ask_report(self) -> None:
        """The observer hears soon how much there is to do."""

    def when_ready(self, call: Callable[[Ready], None]) -> None:
        """From now on `call` is made, on the receiving thread, each time that an engine begins to serve."""

    def when_noticed(self, call: Callable[[Notice], None]) -> None:
        """From now on `call` gets what an operator should know, on the receiving thread."""

    def await_another_engine(self) -> list[OpenRequest]:
        """The engine has ended: returns the requests that were open. With the next Ready the link serves again."""

    def lose(self, take: Callable[[list[OpenRequest]], None]) -> None:
        """The same once what the engine had sent is delivered: `take` is called on the receiving thread."""

    def release(self, request_ids: Collection[int], take: Callable[[list[OpenRequest]], None]) -> None:
        """These requests go on elsewhere: the engine ends them, and `take` is called with those that are open."""

    def open_requests(self) -> list[OpenRequest]:
        """Those of this moment."""

    def expect(self) -> None:
        """Its engine has drained, and is to serve again."""

    def begin_close(self) -> None:
        """Open requests get EngineClosedError, and every later call. Idempotent."""

    def close(self) -> None:
        """The same, and ends the thread. Idempotent."""


class LinkPlace(NamedTuple):
    """The place of a link beside others, for who makes it."""

    lock: threading.RLock
    """Shared by all of them: a request changes from one to another."""
    observer: Observer
    """Who follows its requests."""
    on_notice: Callable[[Notice], None] | None
    on_away: Callable[[str, bool], None]
    """Called, on the receiving thread, by a link that itself finds that its engine has ended or cannot be reached, with
    the reason, and whether it is none of these engines. Of engines on this machine whoever keeps them finds it."""
    is_kept: bool
    """Whether its engine may end and be there again, while what it had goes on elsewhere; else that ends with it."""


MakeLink = Callable[[LinkPlace], EngineLink]


def own_links(
    engines: Sequence[Processes],
    on_progress: Callable[[Progress], None] | None = None,
    attaches: bool = False,
    after_outputs: Callable[[], None] | None = None,
) -> list[MakeLink]:
    """What makes the links to engines on this machine. The arguments: see `Link`; the first engine tells its progress.

    engines: their processes, or what stands for them.
    """

    def make(number: int, place: LinkPlace) -> EngineLink:
        return Link(
            engines[number],
            on_progress if number == 0 else None,
            attaches,
            after_outputs,
            place.on_notice,
            is_kept=place.is_kept,
            observer=place.observer,
            lock=place.lock,
        )

    return [functools.partial(make, number) for number in range(len(engines))]
