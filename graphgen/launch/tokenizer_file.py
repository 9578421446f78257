"""The part of a tokenizer that an engine's worker reads, where its requests follow grammars.

The Engine, or the supervisor of a server, writes the file with `graphgen.requests.tokenizer` into the
engine's folder before the first request; the worker reads it when the first grammar comes.
"""

from pathlib import Path

import msgspec
from msgspec import Struct

FILE = "tokenizer.msgpack"


class TokenizerPart(Struct, frozen=True):
    """Of `graphgen.requests.tokenizer.TokenizerData`, which has more."""

    backend: str  # as tokenizers writes it: tokenizer.json
    eos_token_id: int | None = None


def read_tokenizer_part(folder: Path) -> TokenizerPart:
    """Raises ValueError where the engine has no tokenizer; requests with a grammar are refused there."""
    part = msgspec.msgpack.decode((folder / FILE).read_bytes(), type=TokenizerPart | None)
    if part is None:
        raise ValueError("the engine has no tokenizer")
    return part
