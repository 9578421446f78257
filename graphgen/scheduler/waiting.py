"""The requests that wait for a slot and pages, in order of arrival.

Owns the order only. Called by `graphgen.scheduler.policy`.
"""

from collections import OrderedDict
from itertools import islice, takewhile

from graphgen.scheduler.request import Request


class WaitingQueue:
    """Adding at the end, removing anywhere and reading the first few are O(1) each, however many wait."""

    def __init__(self) -> None:
        self._by_arrival: OrderedDict[int, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_arrival)

    def __contains__(self, request: Request) -> bool:
        return request.arrival in self._by_arrival

    def append(self, request: Request) -> None:
        """A request younger than all that wait."""
        self._by_arrival[request.arrival] = request

    def put_back(self, request: Request) -> None:
        """A preempted request, at its place by arrival.

        O(number of older ones that wait): only the few it was once let past, so it lands near the head.
        """
        older = list(takewhile(lambda arrival: arrival < request.arrival, self._by_arrival))
        self._by_arrival[request.arrival] = request
        for arrival in (request.arrival, *reversed(older)):
            self._by_arrival.move_to_end(arrival, last=False)

    def remove(self, request: Request) -> None:
        """Raises KeyError when it does not wait."""
        del self._by_arrival[request.arrival]

    def first(self, count: int) -> list[Request]:
        """At most `count` requests, oldest first."""
        return list(islice(self._by_arrival.values(), count))
