"""Who is served next: each client's share of the frontend, and queues that give every client the same turns.

Pure: no clock, no socket. Used by the server's loop, on its thread. A client is a string: a CURVE key, or a session
where there are no keys.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from graphgen.ipc.errors import OverloadedError

Item = TypeVar("Item")

RETRY_AFTER_S = 1.0
"""When a client that has used up its share may try again: one of its own requests must end first."""


class FairQueue(Generic[Item]):
    """Waiting items of several clients. The clients take turns; of one client's items the highest priority goes first,
    and of equal ones the oldest."""

    def __init__(self) -> None:
        self._items: OrderedDict[str, list[tuple[int, int, Item]]] = OrderedDict()  # by turn: heaps
        self._numbers = itertools.count()
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def push(self, client: str, item: Item, priority: int = 0) -> None:
        heapq.heappush(self._items.setdefault(client, []), (-priority, next(self._numbers), item))
        self._len += 1

    def pop(self, may_take: Callable[[str], bool]) -> Item | None:
        """The item whose turn it is among the clients that may take one; its client then goes behind the others."""
        client = next((client for client in self._items if may_take(client)), None)
        if client is None:
            return None
        heap = self._items[client]
        item = heapq.heappop(heap)[2]
        self._len -= 1
        if heap:
            self._items.move_to_end(client)
        else:
            del self._items[client]
        return item

    def discard(self, client: str, item: Item) -> bool:
        """Takes an item out of its turn; whether it was there. Linear in the client's own items."""
        heap = self._items.get(client, [])
        for index, (_, _, waiting) in enumerate(heap):
            if waiting is item:
                del heap[index]
                heapq.heapify(heap)
                self._len -= 1
                if not heap:
                    del self._items[client]
                return True
        return False


class Shares:
    """What each client has open, and the limits on that."""

    def __init__(self, open_requests: int, open_prompt_tokens: int, total_prompt_tokens: int) -> None:
        self._open_requests = open_requests
        self._open_prompt_tokens = open_prompt_tokens
        self._total_prompt_tokens = total_prompt_tokens
        self._requests: dict[str, int] = {}
        self._prompt_tokens: dict[str, int] = {}

    @property
    def num_open(self) -> int:
        """Requests of all clients."""
        return sum(self._requests.values())

    def open_request(self, client: str) -> None:
        """Counts a request. Raises OverloadedError, and counts nothing, when the client has as many as it may."""
        num_open = self._requests.get(client, 0)
        if num_open >= self._open_requests:
            raise OverloadedError(
                f"you have {num_open} open requests, the limit is {self._open_requests}: wait for one to end",
                RETRY_AFTER_S,
            )
        self._requests[client] = num_open + 1

    def add_prompt(self, client: str, num_tokens: int) -> None:
        """Counts a prompt of an open request. Raises OverloadedError, and counts nothing, when it is too much now."""
        own = self._prompt_tokens.get(client, 0) + num_tokens
        if own > self._open_prompt_tokens:
            raise OverloadedError(
                f"your open requests would have {own} prompt tokens, the limit is {self._open_prompt_tokens}:"
                " wait for one to end",
                RETRY_AFTER_S,
            )
        if sum(self._prompt_tokens.values()) + num_tokens > self._total_prompt_tokens:
            raise OverloadedError(
                f"all open requests would have more than {self._total_prompt_tokens} prompt tokens: try again later",
                RETRY_AFTER_S,
            )
        self._prompt_tokens[client] = own

    def close_request(self, client: str, num_tokens: int) -> None:
        """Takes a request and its prompt off the count."""
        for counts, amount in ((self._requests, 1), (self._prompt_tokens, num_tokens)):
            left = counts.get(client, 0) - amount
            if left > 0:
                counts[client] = left
            else:
                counts.pop(client, None)


class RateLimit:
    """A bucket that fills with `per_s` permits a second, up to `burst`."""

    def __init__(self, per_s: float, burst: int, now_s: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._permits = float(burst)
        self._filled_s = now_s

    def take(self, wanted: int, now_s: float) -> int:
        """How many of the wanted permits there are; they are taken."""
        taken = max(0, min(wanted, int(self.permits(now_s))))
        self._permits -= taken
        return taken

    def permits(self, now_s: float) -> float:
        """How many there are."""
        self._permits = min(self._burst, self._permits + (now_s - self._filled_s) * self._per_s)
        self._filled_s = now_s
        return self._permits

    def spend(self, number: int) -> None:
        """Permits for what cost more than was known, or, negative, back from what cost less. May go below zero."""
        self._permits -= number
