"""What a page of a prompt is known by: a digest of the page and of all that stands before it.

Pure. The scheduler finds shared pages by these digests, the router finds the engines that keep them: equal digests mean
equal tokens under an equal salt, whoever made them.
"""

from hashlib import blake2b

DIGEST_BYTES = 32
TOKEN_BYTES = 4
"""Of a packed token id."""


def salt_digest(salt: str) -> bytes:
    """What stands before the first page."""
    return blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()


def page_digest(before: bytes, token_ids: bytes) -> bytes:
    """Of a page of these tokens, packed int32. before: the digest of the page before it, or of the salt."""
    return blake2b(before + token_ids, digest_size=DIGEST_BYTES).digest()


def prompt_digests(token_ids: bytes, page_size: int, salt: str, most: int) -> tuple[bytes, ...]:
    """Of the full pages of a prompt in packed int32, at most the first `most`. About 1 us a page."""
    digest = salt_digest(salt)
    digests = []
    page_bytes = page_size * TOKEN_BYTES
    for start in range(0, min(len(token_ids) // page_bytes, most) * page_bytes, page_bytes):
        digest = page_digest(digest, token_ids[start : start + page_bytes])
        digests.append(digest)
    return tuple(digests)
