"""How many tokens the tokenizer in a checkpoint's folder has; without making it.

Tables of embeddings are often longer than the vocabulary, to be divisible: their last rows mean nothing, and the
sampler must never draw one. Called by models/checkpoint.py at every start, so it reads the ids and nothing else.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct


class _Added(Struct, frozen=True):
    id: int


class _Model(Struct, frozen=True):
    vocab: dict[str, int] | list[Any] = {}  # by token, or (token, score) in the order of ids


class _Tokenizer(Struct, frozen=True):
    model: _Model = _Model()
    added_tokens: list[_Added] = []


class _Settings(Struct, frozen=True):
    added_tokens_decoder: dict[str, Any] = {}


def count_tokens(folder: Path) -> int | None:
    """One more than the highest id of tokenizer.json and of tokenizer_config.json; None where the former is missing or
    is not what it should be, which whoever makes the tokenizer says."""
    try:
        highest = max(_ids(folder), default=-1)
    except (OSError, ValueError, msgspec.MsgspecError):
        return None
    return None if highest < 0 else highest + 1


def _ids(folder: Path) -> Iterator[int]:
    tokenizer = msgspec.json.decode((folder / "tokenizer.json").read_bytes(), type=_Tokenizer)
    vocabulary = tokenizer.model.vocab
    yield from (len(vocabulary) - 1,) if isinstance(vocabulary, list) else vocabulary.values()
    yield from (token.id for token in tokenizer.added_tokens)
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        yield from map(int, msgspec.json.decode(settings.read_bytes(), type=_Settings).added_tokens_decoder)
