"""Where prompts part within a page: what the pages of the prefix cache hold, by what comes before them.

Owns the tokens of each page it is told of, full or not; never who holds a page, nor which page a digest stands for.
Called by `graphgen.scheduler.prefix_cache`; `graphgen.scheduler.admission` compares prompts with the same function.

Pages that come after the same tokens are branches of one tree. A prompt that shares those tokens, and then only a part
of a page, finds here the branch that goes on with it the longest.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice

MAX_COMPARED = 4
"""Branches a prompt is compared with, the newest first. Those of one system prompt part where it ends, all alike, and
of a conversation there is one."""

_TOKEN_BYTES = 4


class PageBranches:
    """Tokens are packed int32. Each operation costs O(1); a comparison copies a page's tokens some six times."""

    def __init__(self, num_pages: int) -> None:
        self._branches: dict[bytes, dict[int, bytes]] = {}  # the tokens of each page, by the digest before it
        self._parent_of: list[bytes | None] = [None] * num_pages

    def put(self, page: int, parent: bytes, tokens: bytes) -> None:
        """`page` holds `tokens` after what the digest `parent` stands for; more of them than it was known to hold."""
        self._parent_of[page] = parent
        self._branches.setdefault(parent, {})[page] = tokens

    def remove(self, page: int) -> None:
        """It holds something else from now on."""
        parent = self._parent_of[page]
        if parent is None:
            return
        self._parent_of[page] = None
        branches = self._branches[parent]
        del branches[page]
        if not branches:
            del self._branches[parent]

    def longest(self, parent: bytes, tokens: bytes, least: int) -> tuple[int, int] | None:
        """The page after `parent` that begins like `tokens` for the longest, and for how many of them; None if no page
        that was compared has the first `least` of them."""
        best, most, first = None, least - 1, tokens[: least * _TOKEN_BYTES]
        for page, held in self._newest(parent):
            if held.startswith(first):
                num_equal = common_len(held, tokens)
                if num_equal > most:
                    best, most = page, num_equal
        return None if best is None else (best, most)

    def holds(self, parent: bytes, tokens: bytes) -> bool:
        """Whether a page after `parent`, of those that are compared, begins with all of `tokens`."""
        return any(held.startswith(tokens) for _, held in self._newest(parent))

    def along(self, parent: bytes, tokens: bytes) -> list[int]:
        """All pages after `parent` that hold a beginning of `tokens`, or that begin with them."""
        branches = self._branches.get(parent, {})
        return [page for page, held in branches.items() if held.startswith(tokens) or tokens.startswith(held)]

    def _newest(self, parent: bytes) -> Iterator[tuple[int, bytes]]:
        branches = self._branches.get(parent)
        return iter(()) if branches is None else islice(reversed(branches.items()), MAX_COMPARED)


def common_len(one: bytes, other: bytes) -> int:
    """How many tokens two packed sequences have in common at their beginning."""
    num_tokens = min(len(one), len(other)) // _TOKEN_BYTES
    ends = range(_TOKEN_BYTES, (num_tokens + 1) * _TOKEN_BYTES, _TOKEN_BYTES)
    return bisect_left(ends, True, key=lambda end: one[:end] != other[:end])
