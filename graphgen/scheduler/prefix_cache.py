"""Which pages hold the beginning of which prompts: the prefix cache.

Owns the index from contents to pages. Never takes or frees a page: `graphgen.scheduler.pages` does, and tells when a
page is used for something else. Called by `graphgen.scheduler.policy`.

A page is known by its digest (`graphgen.scheduler.page_chain`), which stands for every token its rows attended to.

Only full pages are shared. The rest of a shared prompt, at most page_size - 1 tokens, is computed again: that is
a few rows of a step that runs anyway, where a copy would be a second kind of work for the device.

A page may be read as soon as the step that computes it is planned. Steps run in the order of their plans, and within a
step every layer writes the keys and values of all rows before it attends.
"""

from collections.abc import Sequence

from graphgen.scheduler.page_chain import PageChain
from graphgen.scheduler.pages import PagePool
from graphgen.scheduler.request import RunningRequest


class PrefixCache:
    """The index over one pool. Switched off, it finds nothing and keeps nothing."""

    def __init__(self, num_pages: int, page_size: int, enabled: bool) -> None:
        self.pool = PagePool(num_pages, on_reuse=self._forget)
        self._page_size = page_size
        self._enabled = enabled
        self._page_of: dict[bytes, int] = {}
        self._digest_of: list[bytes] = [b""] * num_pages  # valid for the pages in `_page_of`

    @property
    def enabled(self) -> bool:
        return self._enabled

    def find(self, chain: PageChain, max_pages: int) -> list[int]:
        """The pages that hold the request's first tokens, at most `max_pages`: share them before taking others."""
        found: list[int] = []
        if not self._enabled:
            return found
        for index in range(max_pages):
            digest = chain.digest(index)
            page = None if digest is None else self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def enter(self, running: RunningRequest, num_computed: int) -> None:
        """The first `num_computed` tokens of the request are known and computed by steps that are planned.

        Contents that another page holds already are not entered twice: that page of the request stays its own.
        """
        first, end = running.num_entered, num_computed // self._page_size
        if end <= first or not self._enabled:
            return
        running.num_entered = end
        page_of, digest_of, entered = self._page_of, self._digest_of, []
        for digest, page in zip(running.request.chain.digests(first, end), running.pages[first:end], strict=True):
            if page_of.setdefault(digest, page) == page:
                digest_of[page] = digest
                entered.append(page)
        self.pool.keep(entered)

    def _forget(self, pages: Sequence[int]) -> None:
        for page in pages:
            del self._page_of[self._digest_of[page]]
