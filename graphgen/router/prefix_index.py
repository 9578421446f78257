"""Which engines keep the beginning of a prompt: what the router remembers of where it sent which prompts.

Owns the index from page digests to engines. Never asks an engine: it is a guess, which `correct` repairs when an
engine says how much of a prompt it found. Called by `graphgen.router.policy`.

Engines are numbers here, and a set of them is an int with a bit for each. A page of an engine is newer than another if
a prompt that contains it was sent there later; of one prompt the first page is the newest. An engine that needs room
gives up its oldest pages, so does the index, and one that no longer has a page has none that is older.
"""

from collections import OrderedDict
from collections.abc import Sequence
from random import Random

COARSE_LOOKS = 32
"""Pages of a prompt that are looked at first, evenly apart; between two of them only where engines drop out."""


class PrefixIndex:
    """Bounded: of `most` pairs of an engine and a page, each engine may have its part, at most what it can hold.

    Cost: `holders` looks at most at 32 pages and at n / 32 of the n pages of the prompt for each engine that it
    returns; `add` at every page once.
    """

    def __init__(self, most: int, random: Random) -> None:
        self._most = most
        self._random = random
        self._holders: dict[bytes, int] = {}
        self._pages: dict[int, OrderedDict[bytes, int]] = {}  # of each engine, oldest first: when each was touched
        self._capacity: dict[int, int] = {}
        self.num_touches = 0
        """Of pages, ever: the clock of the index."""
        self.num_pairs = 0
        """Of an engine and a page that it is thought to keep."""

    def join(self, number: int, num_pages: int) -> None:
        """A new engine, that keeps nothing yet and can hold so many pages."""
        self._pages[number] = OrderedDict()
        self._capacity[number] = num_pages
        for other in self._pages:
            self._shrink(other)

    def leave(self, number: int) -> None:
        self.empty(number)
        del self._pages[number], self._capacity[number]

    def empty(self, number: int) -> None:
        """It keeps nothing any more."""
        self._drop_oldest(number, 0)

    def num_pages(self, number: int) -> int:
        """That the engine is thought to keep."""
        return len(self._pages[number])

    def add(self, number: int, digests: Sequence[bytes]) -> int | None:
        """The engine gets a prompt of these pages. Returns when the oldest of those that it keeps was touched before,
        for `correct`; None if it keeps none."""
        pages, holders, bit = self._pages[number], self._holders, 1 << number
        touch = self.num_touches
        oldest: int | None = None
        num_before = len(pages)
        for digest in reversed(digests):
            touch += 1
            touched = pages.get(digest)
            pages[digest] = touch
            if touched is None:
                holders[digest] = holders.get(digest, 0) | bit
                continue
            pages.move_to_end(digest)
            if oldest is None or touched < oldest:
                oldest = touched
        self.num_touches = touch
        self.num_pairs += len(pages) - num_before
        self._shrink(number)
        return oldest

    def correct(self, number: int, age: int) -> None:
        """The engine had given up a page that was touched at this age, so it has none of that age or older."""
        pages = self._pages[number]
        num_old = 0
        for touched in pages.values():
            if touched > age:
                break
            num_old += 1
        self._drop_oldest(number, len(pages) - num_old)

    def holders(self, digests: Sequence[bytes], among: int, most: int) -> list[tuple[int, int]]:
        """Engines of the set `among` that keep the longest beginnings of a prompt, the longest first: (number, pages).

        At most so many; of those that keep equally much, some at random.
        """
        found: list[tuple[int, int]] = []
        for start, end, left in reversed(self._coarse(digests, among)):
            for number in self._some(left, most - len(found)):
                num_pages = self._kept(number, digests, start, end)
                if num_pages:
                    found.append((number, num_pages))
            if len(found) == most:
                break
        found.sort(key=lambda one: -one[1])
        return found

    def _coarse(self, digests: Sequence[bytes], among: int) -> list[tuple[int, int, int]]:
        """(start, end, engines): these keep the first `start` pages and not the first `end` ones, or all of them."""
        get, num_pages = self._holders.get, len(digests)
        stride = -(-num_pages // COARSE_LOOKS) or 1
        changes, start = [], 0
        while start < num_pages:
            end = min(start + stride, num_pages)
            kept = among & get(digests[end - 1], 0)
            if kept != among:
                changes.append((start, end, among ^ kept))
                among = kept
                if not among:
                    return changes
            start = end
        changes.append((num_pages, num_pages, among))
        return changes

    def _kept(self, number: int, digests: Sequence[bytes], start: int, end: int) -> int:
        pages = self._pages[number]
        while start < end and digests[start] in pages:
            start += 1
        return start

    def _some(self, among: int, count: int) -> list[int]:
        """So many engines of a set, or all of them."""
        numbers: list[int] = []
        while among and len(numbers) < count:
            first = self._random.randrange(among.bit_length())
            above = among >> first
            lowest = above & -above if above else among & -among
            number = lowest.bit_length() - 1 + (first if above else 0)
            numbers.append(number)
            among ^= 1 << number
        return numbers

    def _shrink(self, number: int) -> None:
        share = max(1, self._most // len(self._pages))
        self._drop_oldest(number, min(self._capacity[number], share))

    def _drop_oldest(self, number: int, num_left: int) -> None:
        pages, holders, bit = self._pages[number], self._holders, 1 << number
        while len(pages) > num_left:
            digest, _ = pages.popitem(last=False)
            self.num_pairs -= 1
            left = holders[digest] & ~bit
            if left:
                holders[digest] = left
            else:
                del holders[digest]
