"""The ids of answers."""

import secrets


def new_id(kind: str) -> str:
    """`chatcmpl-...`: nobody can guess another's."""
    return f"{kind}-{secrets.token_hex(12)}"
