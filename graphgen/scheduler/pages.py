"""Which pages of the KV cache are free.

Owns one flag per page, never a tensor and never who holds a page: the policy keeps a request's pages with the
request. Called by `graphgen.scheduler.policy` only.
"""

from collections.abc import Iterable


class PagePool:
    """Pages 0 .. num_pages - 1; taking and giving back one page is O(1).

    The page given back last is handed out first: it is the one most likely still in the device's caches.
    """

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_taken = bytearray(num_pages)

    @property
    def num_pages(self) -> int:
        return len(self._is_taken)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages nobody else holds. Raises ValueError, and takes none, when fewer are free."""
        if not 0 <= count <= len(self._free):
            raise ValueError(
                f"{count} pages were asked for, {len(self._free)} of {self.num_pages} are free:"
                " compare with num_free first"
            )
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._is_taken[page] = 1
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Frees pages that `take` returned. Raises ValueError for one that is free or not of this pool."""
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise ValueError(f"page {page} is given back, the pool has pages 0 to {self.num_pages - 1}")
            if not self._is_taken[page]:
                raise ValueError(f"page {page} is given back twice: it has a second holder or was never taken")
            self._is_taken[page] = 0
            self._free.append(page)
