"""What engines have counted, so that the sum over several never falls.

Who collects such a sum takes a fall for a new beginning, and would count once more what the other engines have done:
what an engine had counted stays in the sum when it ends, or cannot be asked for a while.
"""

import threading
from collections.abc import Mapping

from graphgen.ipc.engine_messages import EngineStats
from graphgen.router.engine_stats import COUNTS, sum_of


class KeptCounts:
    """The newest counts of each engine, by number, and those of engines that are not there any more. For many threads,
    which must tell of one engine in the order in which it counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[int, EngineStats] = {}
        self._ended = sum_of(())

    def take(self, told: Mapping[int, EngineStats]) -> list[EngineStats]:
        """What engines say now. Returns what belongs in a sum beside it: the counts of those before them, and of those
        that say nothing now. An engine that has begun anew is found by a count that is smaller than before."""
        with self._lock:
            for number, stats in told.items():
                before = self._newest.get(number)
                if before is not None and _has_fallen(before, stats):
                    self._end(number)
                self._newest[number] = sum_of((), [stats])
            return [self._ended, *(stats for number, stats in self._newest.items() if number not in told)]

    def remove(self, number: int) -> None:
        """The engine is not there any more; another may get its number."""
        with self._lock:
            if number in self._newest:
                self._end(number)

    def _end(self, number: int) -> None:
        self._ended = sum_of((), [self._ended, self._newest.pop(number)])


def _has_fallen(before: EngineStats, now: EngineStats) -> bool:
    return any(getattr(now, name) < getattr(before, name) for name in COUNTS)
