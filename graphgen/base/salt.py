"""Under which salt the prompts of a client share cached pages. Used by the processes that know who a client is."""

import hashlib


def cache_salt(key: str, salt: str) -> str:
    """The client's own salt within its key. Made here, never by a client: a salt that it could choose freely would let
    it ask whether another's prompt is cached. Without keys all clients are one."""
    return hashlib.blake2b(salt.encode(), key=hashlib.blake2b(key.encode()).digest(), digest_size=16).hexdigest()
