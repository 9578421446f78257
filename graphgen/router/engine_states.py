"""Which engines of a program or a server serve, and which drain or have drained.

Owns what each engine said when it began to serve and what it has reported since, and who waits for one to drain. Sends
nothing and moves no request.
Made and called by `graphgen.router.links`, read by `graphgen.router.places`; who changes a state holds their lock.
"""

import threading
import time
from collections.abc import Callable, Iterator

from graphgen.ipc.engine_messages import Ready
from graphgen.ipc.errors import EngineDeadError
from graphgen.ipc.reports import EngineReport
from graphgen.router.engine_stats import sum_of_reports


class EngineStates:
    """Of all engines, by number. Contains and iterates over those that serve."""

    def __init__(self, lock: "threading.RLock") -> None:
        self._lock = lock
        self._ready: dict[int, Ready] = {}  # of the engines that serve
        self._drained: dict[int, Callable[[int], None]] = {}  # engines that drain: who is told when nothing is left
        self._drains_by_s: dict[int, float] = {}
        self._at_rest: set[int] = set()  # engines that have drained, and may still be ending
        self._reports: dict[int, EngineReport] = {}  # of the engines that serve, their newest
        self._epoch = 0

    def __contains__(self, number: int) -> bool:
        return number in self._ready

    def __iter__(self) -> Iterator[int]:
        return iter(self._ready)

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def ready(self) -> Ready:
        """Of the engines that serve, what the one with least room said: what fits there fits everywhere. Raises
        EngineDeadError where none serves."""
        with self._lock:
            found = min(self._ready.values(), key=_room_of, default=None)
        if found is None:
            raise EngineDeadError("no engine serves at the moment: try again")
        return found

    @property
    def page_size(self) -> int:
        """Positions of a page, which all engines have in common; 1 where none serves."""
        return next((ready.worker.page_size for ready in list(self._ready.values())), 1)

    @property
    def num_engines(self) -> int:
        """That serve, those behind servers elsewhere each counted."""
        with self._lock:
            return sum(ready.num_engines for ready in self._ready.values())

    def take_report(self, number: int, report: EngineReport) -> None:
        """What an engine says of itself, ten times a second."""
        with self._lock:
            if number not in self._ready:
                return
            before = self._reports.get(number)
            self._reports[number] = report
            if (before is None or before.epoch != report.epoch) and len(self._ready) == 1:
                self._epoch += 1

    def report(self) -> EngineReport | None:
        """Of all that serve, as one; None before any has reported. Its epoch is another one when nothing is left of
        what was cached: of one engine among several that lost its cache, who routes here learns by `cached_tokens`."""
        with self._lock:
            reports = list(self._reports.values())
            return sum_of_reports(reports, self._epoch) if reports or self._epoch else None

    def serve(self, number: int, ready: Ready) -> bool:
        """Whether it did not serve before. What an engine that has drained still says of itself is not heard."""
        if number in self._ready or number in self._at_rest:
            return False
        self._ready[number] = ready
        return True

    def end(self, number: int) -> None:
        """It serves no more."""
        self._ready.pop(number, None)
        self._reports.pop(number, None)
        self._drains_by_s.pop(number, None)

    def leave(self, number: int) -> None:
        """Its link has failed: it does not serve, and its drain goes on."""
        self._ready.pop(number, None)
        self._reports.pop(number, None)

    def drain(self, number: int, grace_s: float, when_drained: Callable[[int], None]) -> None:
        """Raises EngineDeadError where no other engine serves, and for one that does not serve or drains already."""
        if number not in self._ready:
            raise EngineDeadError(f"engine {number} does not serve, so there is nothing to drain")
        if number in self._drained:
            raise EngineDeadError(f"engine {number} drains already: wait until that has ended")
        if len(self._ready.keys() - self._drained.keys()) < 2:
            raise EngineDeadError(f"engine {number} is the only one that serves: let another one serve first")
        self._drained[number] = when_drained
        self._drains_by_s[number] = time.monotonic() + grace_s

    def drains(self) -> dict[int, float]:
        """The engines that drain, and when the grace of each is over (monotonic seconds)."""
        return dict(self._drains_by_s)

    def end_drain(self, number: int, rests: bool) -> Callable[[int], None] | None:
        """Nothing is left of what an engine had. Returns who is told, if it drained; rests: it is not heard before
        `expect`."""
        when_drained = self._drained.pop(number, None)
        if when_drained is not None and rests:
            self._at_rest.add(number)
        return when_drained

    def forget(self, number: int) -> None:
        """There is no engine of this number any more."""
        self.end(number)
        self._drained.pop(number, None)
        self._at_rest.discard(number)

    def is_draining(self, number: int) -> bool:
        """Whether it drains and has not ended that."""
        return number in self._drained

    def expect(self, number: int) -> bool:
        """An engine that has drained is about to be started again, or is kept after all. Whether it had drained; one
        that has not goes on."""
        has_drained = number in self._at_rest
        self._at_rest.discard(number)
        self._drained.pop(number, None)
        self._drains_by_s.pop(number, None)
        return has_drained


def _room_of(ready: Ready) -> int:
    return ready.worker.num_pages * ready.worker.page_size
