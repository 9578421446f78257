"""Which pages hold the beginning of which prompts: the prefix cache.

Owns the index from contents to pages. Never takes or frees a page: `graphgen.scheduler.pages` does, and tells when a
page is used for something else. Called by `graphgen.scheduler.policy` and its parts.

A full page is known by its digest (`graphgen.scheduler.page_chain`), which stands for every token its rows attended to,
and is shared. A page of which a prompt needs only a beginning, because the two part there or because the page is not
full yet, is copied: its owner goes on writing behind that beginning, and so does the new request
(`graphgen.scheduler.page_branches`).

A page may be read as soon as the step that computes it is planned. Steps run in the order of their plans, and within a
step every layer writes the keys and values of all rows before it attends. A step copies before it writes anything, so
only what earlier plans computed can be copied.
"""

from collections.abc import Sequence
from typing import NamedTuple

from graphgen.scheduler.page_branches import PageBranches
from graphgen.scheduler.page_chain import PageChain
from graphgen.scheduler.pages import PagePool
from graphgen.scheduler.request import RunningRequest

COPY_DIVISOR = 8
"""A copy saves at least this part of a page. An 8B model's page of 64 positions is 8 MiB to read and to write, some
4 us at the speed of an H200's memory; a row of a large step takes 27 us there."""


class PageCopy(NamedTuple):
    """The first tokens of a page, for another request."""

    source: int
    num_tokens: int


class PrefixCache:
    """The index over one pool. Switched off, it finds nothing and keeps nothing."""

    def __init__(self, num_pages: int, page_size: int, enabled: bool) -> None:
        self.pool = PagePool(num_pages, on_reuse=self._forget)
        self._page_size = page_size
        self._enabled = enabled
        self._page_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_pages  # None: not in `_page_of`
        self._branches = PageBranches(num_pages)
        self._least_copied = max(1, page_size // COPY_DIVISOR)

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

    def find_copy(self, chain: PageChain, index: int, max_tokens: int) -> PageCopy | None:
        """What to copy for page `index` of the request, of which at most `max_tokens` are wanted.

        The source must be held, or be taken by nobody but this request, until the plan is made.
        """
        if not self._enabled or max_tokens < self._least_copied:
            return None
        wanted = chain.packed(index * self._page_size, index * self._page_size + min(max_tokens, self._page_size))
        found = self._branches.longest(chain.parent(index), wanted, self._least_copied)
        return None if found is None else PageCopy(*found)

    def enter(self, running: RunningRequest, num_computed: int) -> None:
        """The first `num_computed` tokens of the request are known and computed by steps that are planned."""
        if not self._enabled:
            return
        end = num_computed // self._page_size
        if end > running.num_entered:
            self._enter_full(running, running.num_entered, end)
            running.num_entered = end
        if num_computed > end * self._page_size:
            self._enter_begun(running, end, num_computed)

    def distrust(self, chain: PageChain) -> None:
        """What the request computed, or found here, is wrong: no page that holds any of it is found again."""
        size, end = self._page_size, chain.num_tokens
        pages = [
            page
            for index, start in enumerate(range(0, end, size))
            for page in self._branches.along(chain.parent(index), chain.packed(start, min(start + size, end)))
        ]
        self._forget(pages)
        self.pool.drop(pages)

    def _enter_full(self, running: RunningRequest, first: int, end: int) -> None:
        """Contents that another page holds already are not entered twice: that page of the request stays its own."""
        page_of, digest_of, put, entered = self._page_of, self._digest_of, self._branches.put, []
        links = running.request.chain.links(first, end)
        for page, (parent, digest, tokens) in zip(running.pages[first:end], links, strict=True):
            if page_of.setdefault(digest, page) == page:
                digest_of[page] = digest
                put(page, parent, tokens)
                entered.append(page)
        self.pool.keep(entered)

    def _enter_begun(self, running: RunningRequest, index: int, end: int) -> None:
        """The beginning of a page, up to position `end`, unless some page holds as much."""
        chain, page = running.request.chain, running.pages[index]
        parent, tokens = chain.parent(index), chain.packed(index * self._page_size, end)
        if not self._branches.holds(parent, tokens):
            self._branches.put(page, parent, tokens)
            self.pool.keep((page,))

    def _forget(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._branches.remove(page)
            digest = self._digest_of[page]
            if digest is not None:
                self._digest_of[page] = None
                del self._page_of[digest]
