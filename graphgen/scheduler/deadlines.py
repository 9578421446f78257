"""When requests have to be complete, soonest first.

Owns times only; ends nothing. Called by `graphgen.scheduler.policy`.
"""

from heapq import heappop, heappush

from graphgen.scheduler.request import Request


class Deadlines:
    """Adding and taking one out cost O(log n). Requests that ended leave when their time comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []  # deadline_s, arrival, request id

    @property
    def next_s(self) -> float | None:
        """The soonest one; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def add(self, request: Request) -> None:
        """Ignores a request without a deadline."""
        if request.deadline_s is not None:
            heappush(self._heap, (request.deadline_s, request.arrival, request.request_id))

    def take_passed(self, now_s: float, open_requests: dict[int, Request]) -> list[Request]:
        """Those of `open_requests`, by id, whose deadline has passed."""
        passed = []
        while self._heap and self._heap[0][0] <= now_s:
            _, arrival, request_id = heappop(self._heap)
            request = open_requests.get(request_id)
            if request is not None and request.arrival == arrival:  # an id may have been used again
                passed.append(request)
        return passed
