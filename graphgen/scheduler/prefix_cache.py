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

Of a page group with a window, a request that shares a beginning needs no more than the pages that the window reaches
from its end on. Those are there where a request ended or was preempted; in between as long as nobody else took them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from graphgen.scheduler.page_branches import PageBranches
from graphgen.scheduler.page_chain import PageChain
from graphgen.scheduler.page_groups import PageGroups
from graphgen.scheduler.pages import PagePool
from graphgen.scheduler.request import RunningRequest

COPY_DIVISOR = 8
"""A copy saves at least this part of a page. An 8B model's page of 64 positions is 8 MiB to read and to write, some
4 us at the speed of an H200's memory; a row of a large step takes 27 us there."""


class Found(NamedTuple):
    """The first pages of a prompt, none of whose positions has to be computed."""

    num_pages: int
    tables: tuple[list[int], ...]
    """Of each page group, the pages that later rows read: the last of these, all where there is no window."""

    def all_pages(self) -> set[int]:
        return {page for table in self.tables for page in table}


class PageCopy(NamedTuple):
    """The first tokens of a page, for another request."""

    sources: tuple[int, ...]
    """Of each page group."""
    num_tokens: int


class PrefixCache:
    """The index over one pool. Switched off, it finds nothing and keeps nothing."""

    def __init__(self, num_pages: int, page_size: int, groups: PageGroups, enabled: bool) -> None:
        self.pool = PagePool(num_pages, on_reuse=self._forget)
        self._page_size = page_size
        self._groups = groups
        self._enabled = enabled
        # Contents are known by a digest and the group: equal tokens mean other keys and values in other layers.
        self._marks = [b"", *(bytes((group,)) for group in range(1, len(groups)))]
        self._page_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_pages  # None: not in `_page_of`
        self._branches = PageBranches(num_pages)
        self._least_copied = max(1, page_size // COPY_DIVISOR)

    @property
    def enabled(self) -> bool:
        return self._enabled

    def find(self, chain: PageChain, max_pages: int) -> Found:
        """The longest beginning of the request, of at most `max_pages`, of which every group has what later rows read:
        share those pages before taking others."""
        if not self._enabled:
            max_pages = 0
        full = self._find_full(chain, max_pages)
        num_pages = len(full[-1]) if full else max_pages
        num_pages = self._last_window(chain, num_pages) if self._groups.has_windows else num_pages
        next_full = iter(full)
        tables = []
        for group, window in enumerate(self._groups.windows):
            if window is None:
                tables.append(next(next_full)[:num_pages])
            else:
                first = self._groups.first_page(group, num_pages * self._page_size)
                pages = (self._page(group, chain, index) for index in range(first, num_pages))
                tables.append([page for page in pages if page is not None])
        return Found(num_pages, tuple(tables))

    def _find_full(self, chain: PageChain, max_pages: int) -> list[list[int]]:
        """Of each group without a window its first pages; the last one of these groups has what all of them have."""
        found = []
        for mark, window in zip(self._marks, self._groups.windows, strict=True):
            if window is None:
                pages: list[int] = []
                for index in range(max_pages):
                    digest = chain.digest(index)
                    page = None if digest is None else self._page_of.get(digest + mark if mark else digest)
                    if page is None:
                        break
                    pages.append(page)
                max_pages = len(pages)
                found.append(pages)
        return found

    def _last_window(self, chain: PageChain, num_pages: int) -> int:
        """The longest beginning, of at most so many pages, behind which every window lies in the cache."""
        gap: int | None = num_pages
        while gap is not None:
            num_pages = gap
            gap = self._gap(chain, num_pages)
        return num_pages

    def _gap(self, chain: PageChain, num_pages: int) -> int | None:
        """The last page that some window behind so many pages reads and that is not there; None: all are."""
        for group, window in enumerate(self._groups.windows):
            if window is not None:
                first = self._groups.first_page(group, num_pages * self._page_size)
                for index in range(num_pages - 1, first - 1, -1):
                    if self._page(group, chain, index) is None:
                        return index
        return None

    def _page(self, group: int, chain: PageChain, index: int) -> int | None:
        digest = chain.digest(index)
        return None if digest is None else self._page_of.get(digest + self._marks[group])

    def find_copy(self, chain: PageChain, index: int, max_tokens: int) -> PageCopy | None:
        """What to copy for page `index` of the request, of which at most `max_tokens` are wanted.

        The sources must be held, or be taken by nobody but this request, until the plan is made.
        """
        if not self._enabled or max_tokens < self._least_copied:
            return None
        wanted = chain.packed(index * self._page_size, index * self._page_size + min(max_tokens, self._page_size))
        sources, num_tokens = [], max_tokens
        for mark in self._marks:
            found = self._branches.longest(chain.parent(index) + mark, wanted, self._least_copied)
            if found is None:
                return None
            sources.append(found[0])
            num_tokens = min(num_tokens, found[1])
        return PageCopy(tuple(sources), num_tokens)

    def enter(self, running: RunningRequest, num_computed: int) -> None:
        """The first `num_computed` tokens of the request are known and computed by steps that are planned."""
        if not self._enabled:
            return
        end = num_computed // self._page_size
        for group, table in enumerate(running.tables):
            if end > table.num_entered:
                self.enter_table(running, group, end)
            if num_computed > end * self._page_size:
                self._enter_begun(running, group, end, num_computed)

    def enter_table(self, running: RunningRequest, group: int, end: int) -> None:
        """The pages before entry `end` of the request's table are computed by steps that are planned; those whose
        tokens are known may be shared. Contents that another page holds already are not entered twice: that page of the
        request stays its own."""
        table, chain = running.tables[group], running.request.chain
        end = min(end, chain.num_tokens // self._page_size)
        if not self._enabled or end <= table.num_entered:
            return
        first, table.num_entered = max(table.num_entered, table.first), end
        if first >= end:
            return
        page_of, digest_of, put, entered = self._page_of, self._digest_of, self._branches.put, []
        mark = self._marks[group]
        for page, (parent, digest, tokens) in zip(table.part(first, end), chain.links(first, end), strict=True):
            if page_of.setdefault(digest + mark, page) == page:
                digest_of[page] = digest + mark
                put(page, parent + mark, tokens)
                entered.append(page)
        self.pool.keep(entered)

    def distrust(self, chain: PageChain) -> None:
        """What the request computed, or found here, is wrong: no page that holds any of it is found again."""
        size, end = self._page_size, chain.num_tokens
        pages = [
            page
            for index, start in enumerate(range(0, end, size))
            for mark in self._marks
            for page in self._branches.along(chain.parent(index) + mark, chain.packed(start, min(start + size, end)))
        ]
        self._forget(pages)
        self.pool.drop(pages)

    def _enter_begun(self, running: RunningRequest, group: int, index: int, end: int) -> None:
        """The beginning of a page, up to position `end`, unless some page holds as much."""
        chain, table = running.request.chain, running.tables[group]
        if index < table.first:
            return
        (page,) = table.part(index, index + 1)
        parent, tokens = chain.parent(index) + self._marks[group], chain.packed(index * self._page_size, end)
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
