"""The part of a tokenizer that an engine's worker reads, where its requests follow grammars.

The Engine, or the supervisor of a server, writes the file with `graphgen.requests.tokenizer` into the
engine's folder while its processes start; the worker reads it before it is ready.
"""

import time
from pathlib import Path

import msgspec
from msgspec import Struct

FILE = "tokenizer.msgpack"


class TokenizerPart(Struct, frozen=True):
    """Of `graphgen.requests.tokenizer.TokenizerData`, which has more."""

    backend: str  # as tokenizers writes it: tokenizer.json
    eos_token_id: int | None = None


def read_tokenizer_part(folder: Path) -> TokenizerPart:
    """Waits for the file, as long as the watchdog of this process lets it live. Raises ValueError where the engine has
    no tokenizer; requests with a grammar are refused there."""
    path = folder / FILE
    while not path.exists():
        time.sleep(0.01)
    part = msgspec.msgpack.decode(path.read_bytes(), type=TokenizerPart | None)
    if part is None:
        raise ValueError("the engine has no tokenizer")
    return part
