"""What a page of keys and values is known by: a digest of everything its rows attended to.

Owns the digests of one request's tokens. Made by `graphgen.scheduler.request`; called by `graphgen.scheduler.policy`
and its parts, `graphgen.scheduler.prefix_cache` above all.

A page's digest is blake2b over the digest of the page before it and its own tokens; before the first page stands the
digest of the request's salt. So equal digests mean equal keys and values, whichever request computed them, and
requests with different salts never have one in common.
"""

from collections.abc import Iterator

from graphgen.base.page_digests import page_digest, salt_digest
from graphgen.scheduler.tokens import Tokens

PAGES_AHEAD = 64
"""Pages of a prompt whose digests are made when it arrives, while no plan waits for them. The others follow as they are
needed, so that a very long prompt holds up nothing."""


class PageChain:
    """The digests of one request's full pages, each made when it is first asked for."""

    __slots__ = ("_digests", "_page_size", "_tokens")

    def __init__(self, tokens: Tokens, page_size: int, salt: str) -> None:
        """tokens: the request's own, which grow as output arrives."""
        self._tokens = tokens
        self._page_size = page_size
        self._digests = [salt_digest(salt)]  # [0] stands before the first page

    def prepare(self, num_pages: int) -> None:
        """Makes the digests of the first pages, at most `num_pages`."""
        self._extend(min(len(self._tokens) // self._page_size, num_pages))

    @property
    def num_tokens(self) -> int:
        """Tokens that are known."""
        return len(self._tokens)

    def digest(self, index: int) -> bytes | None:
        """Of page `index`; None as long as its tokens are not all known."""
        if (index + 1) * self._page_size > len(self._tokens):
            return None
        if len(self._digests) < index + 2:
            self._extend(index + 1)
        return self._digests[index + 1]

    def parent(self, index: int) -> bytes:
        """The digest that stands before page `index`, all tokens of the pages before which are known."""
        if len(self._digests) <= index:
            self._extend(index)
        return self._digests[index]

    def packed(self, start: int, end: int) -> bytes:
        """Tokens [start, end), all of which are known, as int32."""
        return self._tokens.part(start, end).tobytes()

    def links(self, first: int, end: int) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Of pages `first` to `end` - 1, whose tokens are all known: the digest before, the page's own, its tokens."""
        self._extend(end)
        size = self._page_size
        tokens = self.packed(first * size, end * size)
        step = len(tokens) // (end - first)
        pages = [tokens[place : place + step] for place in range(0, len(tokens), step)]
        return zip(self._digests[first:end], self._digests[first + 1 : end + 1], pages, strict=True)

    def _extend(self, num_pages: int) -> None:
        digests, size = self._digests, self._page_size
        digest = digests[-1]
        for start in range((len(digests) - 1) * size, num_pages * size, size):
            digest = page_digest(digest, self.packed(start, start + size))
            digests.append(digest)
