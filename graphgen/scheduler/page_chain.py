"""What a page of keys and values is known by: a digest of everything its rows attended to.

Owns the digests of one request's tokens. Called by `graphgen.scheduler.request` and `graphgen.scheduler.prefix_cache`.

A page's digest is blake2b over the digest of the page before it and its own tokens; before the first page stands the
digest of the request's salt. So equal digests mean equal keys and values, whichever request computed them, and
requests with different salts never have one in common.
"""

from hashlib import blake2b

from graphgen.scheduler.tokens import Tokens

DIGEST_BYTES = 32

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
        self._digests = [blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()]  # [0] stands before the first page

    def prepare(self, num_pages: int) -> None:
        """Makes the digests of the first pages, at most `num_pages`."""
        self._extend(min(len(self._tokens) // self._page_size, num_pages))

    def digest(self, index: int) -> bytes | None:
        """Of page `index`; None as long as its tokens are not all known."""
        if (index + 1) * self._page_size > len(self._tokens):
            return None
        if len(self._digests) < index + 2:
            self._extend(index + 1)
        return self._digests[index + 1]

    def digests(self, first: int, end: int) -> list[bytes]:
        """Of pages `first` to `end` - 1, whose tokens are all known."""
        self._extend(end)
        return self._digests[first + 1 : end + 1]

    def _extend(self, num_pages: int) -> None:
        digests, size = self._digests, self._page_size
        digest = digests[-1]
        for start in range((len(digests) - 1) * size, num_pages * size, size):
            page_bytes = self._tokens.part(start, start + size).tobytes()
            digest = blake2b(digest + page_bytes, digest_size=DIGEST_BYTES).digest()
            digests.append(digest)
