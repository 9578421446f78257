"""The requests that wait for a slot and pages, in the order of service (`graphgen.scheduler.request`).

Owns the order only. Called by `graphgen.scheduler.policy`.

There is a lane for each service class and kind of prompt, long or not: within a lane the order is that of arrival, and
the few that a plan looks at are merged from the heads of the lanes. Long prompts have lanes of their own so that a
burst of them does not hide the short prompts behind it.
"""

from collections import OrderedDict
from collections.abc import Iterator
from heapq import merge
from itertools import islice, takewhile
from operator import attrgetter

from graphgen.ipc.messages import MAX_PRIORITY
from graphgen.scheduler.request import Request

_by_rank = attrgetter("rank")

Lane = OrderedDict[int, Request]  # by arrival, oldest first

_Key = tuple[int, bool]
"""Of a lane: service class, whether its prompts are long."""


class WaitingQueue:
    """Adding at the end, removing anywhere and reading the first few are O(1) each, however many wait."""

    def __init__(self, long_prompt_len: int) -> None:
        """long_prompt_len: the least known tokens that make a request long."""
        self._long_prompt_len = long_prompt_len
        self._lanes: dict[_Key, Lane] = {}  # those in which somebody waits
        # By arrival: the lane, and the tokens known when the request entered it (more may arrive while it waits).
        self._places: dict[int, tuple[_Key, int]] = {}
        self._num_tokens = [0] * (MAX_PRIORITY + 1)  # known tokens that wait, by class

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request: Request) -> bool:
        return request.arrival in self._places

    @property
    def num_tokens(self) -> int:
        """Known tokens of all that wait."""
        return sum(self._num_tokens)

    def num_tokens_from(self, priority: int) -> int:
        """Known tokens of those that wait in this class or a higher one."""
        return sum(self._num_tokens[priority:])

    @property
    def highest_class(self) -> int | None:
        """The highest service class that waits."""
        return max((priority for priority, _ in self._lanes), default=None)

    def num_from(self, priority: int) -> int:
        """How many wait in this class or a higher one."""
        return sum(len(lane) for (lane_priority, _), lane in self._lanes.items() if lane_priority >= priority)

    def append(self, request: Request) -> None:
        """A request younger than all that wait."""
        self._enter(request)

    def put_back(self, request: Request) -> None:
        """A preempted request, at its place.

        O(number of older ones in its lane): only the few it was once let past, so it lands near the head.
        """
        lane = self._enter(request)
        older = list(takewhile(lambda arrival: arrival < request.arrival, lane))
        for arrival in (request.arrival, *reversed(older)):
            lane.move_to_end(arrival, last=False)

    def remove(self, request: Request) -> None:
        """Raises KeyError when it does not wait."""
        key, num_tokens = self._places.pop(request.arrival)
        lane = self._lanes[key]
        del lane[request.arrival]
        if not lane:
            del self._lanes[key]
        self._num_tokens[request.priority] -= num_tokens

    def first(self, count: int, count_long: int) -> Iterator[Request]:
        """The first in order of service: of each class at most `count` with short prompts and `count_long` with long
        ones. Merged as they are read, from a copy: the queue may change meanwhile."""
        heads = [
            list(islice(lane.values(), count_long if is_long else count)) for (_, is_long), lane in self._lanes.items()
        ]
        return merge(*heads, key=_by_rank) if len(heads) != 1 else iter(heads[0])

    def _enter(self, request: Request) -> Lane:
        num_tokens = len(request.tokens)
        key = (request.priority, num_tokens >= self._long_prompt_len)
        lane = self._lanes.setdefault(key, OrderedDict())
        lane[request.arrival] = request
        self._places[request.arrival] = (key, num_tokens)
        self._num_tokens[request.priority] += num_tokens
        return lane
