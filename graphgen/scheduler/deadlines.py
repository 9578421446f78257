"""When requests have to be complete, soonest first.

Owns their order only; ends nothing. Called by `graphgen.scheduler.policy`.
"""

from bisect import bisect_left, insort

from graphgen.scheduler.request import Request

_Entry = tuple[float, int, Request]
"""The deadline and the arrival of a request, negated, and the request: the last entry is the soonest."""


class Deadlines:
    """A sorted list, as `graphgen.scheduler.waiting` keeps them: O(log n) comparisons to add or remove."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    @property
    def next_s(self) -> float | None:
        """The soonest one; None if there is none."""
        return -self._entries[-1][0] if self._entries else None

    def add(self, request: Request) -> None:
        """Ignores a request without a deadline."""
        if request.deadline_s is not None:
            insort(self._entries, (-request.deadline_s, -request.arrival, request))

    def remove(self, request: Request) -> None:
        """It has ended. Ignores a request without a deadline."""
        if request.deadline_s is not None:
            del self._entries[bisect_left(self._entries, (-request.deadline_s, -request.arrival, request))]

    def passed(self, now_s: float) -> list[Request]:
        """Those whose deadline has passed, soonest first. Each still has to be removed."""
        found = []
        for due_s, _, request in reversed(self._entries):
            if -due_s > now_s:
                break
            found.append(request)
        return found
