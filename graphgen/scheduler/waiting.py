"""The requests of one tenant that wait for a slot and pages, in the order of service (`graphgen.scheduler.request`).

Owns the order only. Called by `graphgen.scheduler.tenants`, and read by the parts of the policy.

There is a lane for each service class and kind of prompt, long or not, and the few requests that a plan looks at are
merged from the heads of the lanes. Long prompts have lanes of their own so that a burst of them does not hide the short
prompts behind it.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import merge
from operator import attrgetter, itemgetter

from graphgen.scheduler.request import Request

_by_rank = attrgetter("rank")
_request_of = itemgetter(2)  # of an entry

_Entry = tuple[float, int, Request]
"""The rank of a request, negated, and the request: the last entry of a lane is the first to serve."""

_Key = tuple[int, bool]
"""Of a lane: service class, whether its prompts are long."""


class WaitingQueue:
    """Sorted lists: O(log n) comparisons to add or remove, and one move of the pointers behind the place.

    Who is served soon lies at a list's end, so that taking it moves nothing; 10 000 pointers are moved in 3 us.
    """

    def __init__(self, long_prompt_len: int) -> None:
        """long_prompt_len: the least known tokens that make a request long."""
        self._long_prompt_len = long_prompt_len
        self._lanes: dict[_Key, list[_Entry]] = {}  # those in which somebody waits
        # By arrival: the lane, and the tokens known when the request entered it (more may arrive while it waits).
        self._places: dict[int, tuple[_Key, int]] = {}
        self._num_tokens: dict[int, int] = {}  # known tokens that wait, by class
        self.only: Request | None = None
        """While it is set, `first` offers nobody else."""

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request: Request) -> bool:
        return request.arrival in self._places

    @property
    def next_request(self) -> Request | None:
        """The first to serve."""
        return next(self.first(1, 1), None)

    @property
    def num_tokens(self) -> int:
        """Known tokens of all that wait."""
        return sum(self._num_tokens.values())

    def num_tokens_from(self, priority: int) -> int:
        """Known tokens of those that wait in this class or a higher one."""
        return sum(count for of_class, count in self._num_tokens.items() if of_class >= priority)

    @property
    def highest_class(self) -> int | None:
        """The highest service class that waits."""
        return max((priority for priority, _ in self._lanes), default=None)

    def num_from(self, priority: int) -> int:
        """How many wait in this class or a higher one."""
        return sum(len(lane) for (of_class, _), lane in self._lanes.items() if of_class >= priority)

    def count_classes(self, counts: list[int]) -> None:
        """Adds how many wait in each class."""
        for (priority, _), lane in self._lanes.items():
            counts[priority] += len(lane)

    def add(self, request: Request) -> None:
        """A new request, or one that was preempted: it takes its place in the order of service."""
        num_tokens = len(request.tokens)
        key = (request.priority, num_tokens >= self._long_prompt_len)
        insort(self._lanes.setdefault(key, []), _entry(request))
        self._places[request.arrival] = (key, num_tokens)
        self._num_tokens[request.priority] = self._num_tokens.get(request.priority, 0) + num_tokens

    def remove(self, request: Request) -> int:
        """The tokens it was counted with. Raises KeyError when it does not wait."""
        key, num_tokens = self._places.pop(request.arrival)
        lane = self._lanes[key]
        if lane[-1][2] is request:  # as a rule; a search would read entries all over a long queue
            lane.pop()
        else:
            del lane[bisect_left(lane, _entry(request))]
        if not lane:
            del self._lanes[key]
        self._num_tokens[request.priority] -= num_tokens
        return num_tokens

    def first(self, count: int, count_long: int) -> Iterator[Request]:
        """The first in order of service: of each class at most `count` with short prompts and `count_long` with long
        ones. Merged as they are read, from a copy: the queue may change meanwhile."""
        if self.only is not None:
            return iter([self.only] if self.only in self else [])
        heads = [
            map(_request_of, lane[: -1 - (count_long if is_long else count) : -1])
            for (_, is_long), lane in self._lanes.items()
        ]
        return merge(*heads, key=_by_rank) if len(heads) != 1 else heads[0]


def _entry(request: Request) -> _Entry:
    due_s, arrival = request.rank
    return -due_s, -arrival, request
