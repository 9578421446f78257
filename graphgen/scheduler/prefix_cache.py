"""Which pages hold the beginning of which prompts: the prefix cache.

Owns the index from contents to pages. Never takes or frees a page: `graphgen.scheduler.pages` does, and tells when a
page is used for something else. Called by `graphgen.scheduler.policy`.

A page is known by the digest of everything its rows attended to: blake2b over the digest of the page before it and
its own tokens, the first page's over the request's salt. So equal digests mean equal keys and values, whichever request
computed them, and requests with different salts never share a page.

Only full pages are shared. The rest of a shared prompt, at most page_size - 1 tokens, is computed again: that is
a few rows of a step that runs anyway, where a copy would be a second kind of work for the device.

A page may be read as soon as the step that computes it is planned. Steps run in the order of their plans, and within a
step every layer writes the keys and values of all rows before it attends.
"""

from array import array
from hashlib import blake2b

from graphgen.scheduler.pages import PagePool

DIGEST_BYTES = 32


class PageChain:
    """The digests of one request's full pages, each made when it is first asked for."""

    __slots__ = ("_digests", "_page_size", "_tokens")

    def __init__(self, tokens: "array[int]", page_size: int, salt: str) -> None:
        """tokens: the request's own array, which grows at its end as tokens arrive."""
        self._tokens = tokens
        self._page_size = page_size
        self._digests = [blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()]  # [0] stands before the first page

    def digest(self, index: int) -> bytes | None:
        """Of page `index`; None as long as its tokens are not all known."""
        digests, size = self._digests, self._page_size
        if (index + 1) * size > len(self._tokens):
            return None
        while len(digests) <= index + 1:
            start = (len(digests) - 1) * size
            page_bytes = self._tokens[start : start + size].tobytes()
            digests.append(blake2b(digests[-1] + page_bytes, digest_size=DIGEST_BYTES).digest())
        return digests[index + 1]


class PrefixCache:
    """The index over one pool. Switched off, it finds nothing and keeps nothing."""

    def __init__(self, num_pages: int, enabled: bool) -> None:
        self.pool = PagePool(num_pages, on_reuse=self._forget)
        self._enabled = enabled
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

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

    def enter(self, chain: PageChain, first: int, pages: list[int]) -> None:
        """`pages` are the pages `first` and following of the request, full, and computed by a step that is planned.

        Contents that another page holds already are not entered twice: that page of the request stays its own.
        """
        if not self._enabled:
            return
        for index, page in enumerate(pages, first):
            digest = chain.digest(index)
            if digest is not None and digest not in self._page_of:
                self._page_of[digest] = page
                self._digest_of[page] = digest
                self.pool.keep(page)

    def _forget(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]
