"""Which pages of the KV cache are held, by how many requests, and which free ones still hold something of use.

Owns a count of holders per page, never a tensor, never who the holders are and never what a page holds: the policy
keeps a request's pages with the request, `graphgen.scheduler.prefix_cache` knows contents. Called by both, and by
parts of the policy.

    taken     one or more holders; never handed out
    idle      no holder, but its contents are kept for whoever may share them; handed out last, least recently used
              first
    empty     no holder, nothing kept; handed out first
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence


class PagePool:
    """Pages 0 .. num_pages - 1; every operation costs O(1) a page."""

    def __init__(self, num_pages: int, on_reuse: Callable[[Sequence[int]], None]) -> None:
        """`on_reuse` hears of the idle pages that are handed out: their contents are gone from then on."""
        self._on_reuse = on_reuse
        # The page given back last is handed out first: it is the one most likely still in the device's caches.
        self._empty = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_holders = [0] * num_pages
        self._is_kept = bytearray(num_pages)

    @property
    def num_pages(self) -> int:
        return len(self._num_holders)

    @property
    def num_free(self) -> int:
        """Pages that `take` can hand out, idle ones included."""
        return len(self._empty) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def num_holders(self, page: int) -> int:
        return self._num_holders[page]

    def take(self, count: int) -> list[int]:
        """`count` pages nobody else holds. Raises ValueError, and takes none, when fewer are free."""
        if not 0 <= count <= self.num_free:
            raise ValueError(
                f"{count} pages were asked for, {self.num_free} of {self.num_pages} are free: compare with num_free"
                " first"
            )
        empty, holders = self._empty, self._num_holders
        num_empty = min(count, len(empty))
        taken = empty[len(empty) - num_empty :]
        del empty[len(empty) - num_empty :]
        if num_empty < count:
            taken += self._reuse(count - num_empty)
        for page in taken:
            holders[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for pages that are taken or idle. Raises ValueError for an empty one."""
        for page in pages:
            if not self._num_holders[page]:
                if page not in self._idle:
                    raise ValueError(f"page {page} is to be shared, but nothing holds or keeps it: take a page instead")
                del self._idle[page]
            self._num_holders[page] += 1

    def keep(self, pages: Sequence[int]) -> None:
        """From now on these become idle, not empty, when their last holder leaves."""
        is_kept = self._is_kept
        for page in pages:
            is_kept[page] = 1

    def drop(self, pages: Sequence[int]) -> None:
        """What these hold is kept for nobody: idle ones become empty now, taken ones when their last holder leaves."""
        for page in pages:
            self._is_kept[page] = 0
            if page in self._idle:
                del self._idle[page]
                self._empty.append(page)

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder less for each page. Raises ValueError for one that nobody holds or that is not of this pool.

        Idle pages are used again in the order given here: so the last pages of a request come first.
        """
        holders, is_kept, idle, empty = self._num_holders, self._is_kept, self._idle, self._empty
        for page in pages:
            if not 0 <= page < len(holders):
                raise ValueError(f"page {page} is given back, the pool has pages 0 to {self.num_pages - 1}")
            if not holders[page]:
                raise ValueError(f"page {page} is given back once too often: nobody holds it")
            holders[page] -= 1
            if holders[page]:
                continue
            if is_kept[page]:
                idle[page] = None
            else:
                empty.append(page)

    def make_empty(self, count: int) -> None:
        """Gives up what idle pages hold, least recently used first, until `count` are empty or none is idle."""
        num_missing = min(count - len(self._empty), len(self._idle))
        if num_missing > 0:
            self._empty += self._reuse(num_missing)

    def _reuse(self, count: int) -> list[int]:
        idle, is_kept = self._idle, self._is_kept
        pages = [idle.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            is_kept[page] = 0
        self._on_reuse(pages)
        return pages
