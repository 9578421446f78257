"""Who is served next: each client's share of the frontend, and queues that give every client the same turns.

Pure: no clock, no socket. Used by the server's loop, on its thread. A client is a string: a CURVE key, or a session
where there are no keys.
"""

import bisect
import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from graphgen.ipc.errors import InvalidRequestError, OverloadedError

Item = TypeVar("Item")

RETRY_AFTER_S = 1.0
"""When a client that has used up its share may try again: one of its own requests must end first."""


class _Line(Generic[Item]):
    """The items of one client, and its turn."""

    def __init__(self, turn: tuple[float, int]) -> None:
        self.turn = turn  # what it has been served, and a number that has no equals
        self.heap: list[tuple[int, int, int, Item]] = []  # priority negated, number, size, item


class FairQueue(Generic[Item]):
    """Waiting items of several clients. The client that was served least takes its turn: in the long run each is served
    items of the same size together, however large the single ones are. Of one client's items the highest priority goes
    first, and of equal ones the oldest. A client that had none waiting begins level with whoever is next."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[Item]] = {}
        self._turns: list[tuple[float, int, str]] = []  # those of `_lines`, in order
        self._numbers = itertools.count()
        self._served = 0.0  # of the client whose turn was the last
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Item]:
        """In no order."""
        return (item for line in self._lines.values() for _, _, _, item in line.heap)

    def push(self, client: str, item: Item, priority: int = 0, size: int = 1) -> None:
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = _Line((self._served, next(self._numbers)))
            bisect.insort(self._turns, (*line.turn, client))
        heapq.heappush(line.heap, (-priority, next(self._numbers), size, item))
        self._len += 1

    def pop(self, may_take: Callable[[str, Item], bool]) -> Item | None:
        """The item whose turn it is, of those that may be taken; only the first of each client is asked for."""
        for served, _, client in self._turns:
            line = self._lines[client]
            _, _, size, item = line.heap[0]
            if may_take(client, item):
                heapq.heappop(line.heap)
                self._len -= 1
                self._served = max(self._served, served)
                self._move(client, line, size)
                return item
        return None

    def discard(self, client: str, item: Item) -> bool:
        """Takes an item out of its turn; whether it was there. Linear in the client's own items."""
        line = self._lines.get(client)
        for index, (_, _, _, waiting) in enumerate(line.heap if line is not None else ()):
            if line is not None and waiting is item:
                del line.heap[index]
                heapq.heapify(line.heap)
                self._len -= 1
                self._move(client, line, 0)
                return True
        return False

    def _move(self, client: str, line: _Line[Item], served: int) -> None:
        """To its place after it was served so much; a client without items has none."""
        del self._turns[bisect.bisect_left(self._turns, (*line.turn, client))]
        if not line.heap:
            del self._lines[client]
            return
        line.turn = (line.turn[0] + served, next(self._numbers) if served else line.turn[1])
        bisect.insort(self._turns, (*line.turn, client))


class Shares:
    """What each client has open, and the limits on that. A request counts as often as it has samples."""

    def __init__(self, open_requests: int, open_prompt_tokens: int, total_prompt_tokens: int) -> None:
        self._open_requests = open_requests
        self._open_prompt_tokens = open_prompt_tokens
        self._total_prompt_tokens = total_prompt_tokens
        self._samples: dict[str, int] = {}
        self._prompt_tokens: dict[str, int] = {}

    @property
    def num_open(self) -> int:
        """Samples of all clients' requests."""
        return sum(self._samples.values())

    def open_request(self, client: str, num_samples: int) -> None:
        """Counts a request. Raises OverloadedError, and counts nothing, when the client would have more than it may;
        InvalidRequestError when that will always be so."""
        if num_samples > self._open_requests:
            raise InvalidRequestError(
                f"n is {num_samples}, all of a client's open requests may have {self._open_requests} samples: lower n"
            )
        num_open = self._samples.get(client, 0)
        if num_open + num_samples > self._open_requests:
            raise OverloadedError(
                f"you have {num_open} open requests, the limit is {self._open_requests}, and a request counts as often"
                " as it has samples (n): wait for one to end",
                RETRY_AFTER_S,
            )
        self._samples[client] = num_open + num_samples

    def add_prompt(self, client: str, num_tokens: int) -> None:
        """Counts a prompt of an open request, as often as it has samples. Raises OverloadedError, and counts nothing,
        when it is too much now."""
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

    def close_request(self, client: str, num_samples: int, num_tokens: int) -> None:
        """Takes a request and its prompt off the count."""
        for counts, amount in ((self._samples, num_samples), (self._prompt_tokens, num_tokens)):
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
