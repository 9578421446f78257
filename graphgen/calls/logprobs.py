"""Log-probabilities as a program gets them: of tokens of an output or of a prompt, and of the likeliest in their place.

They stay packed until somebody looks: a step has them for every request that asks, and most of them are only passed on.
Owns the packed form in which `graphgen.remote` and the frontend send them, too. Made by
`graphgen.requests.open_request` and `graphgen.remote.requests`.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import overload

from msgspec import Struct

from graphgen.ipc.short import short_repr
from graphgen.ipc.step_schema import WORD_BYTES, logprob_words


class TokenLogprob(Struct, frozen=True):
    """A token that was one of the likeliest in its place."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability by the model's own logits: before temperature, penalties, filters and masks.
    """
    token: bytes
    """What the text has of it: UTF-8, but for tokens that are part of a character. Empty without a tokenizer."""


class Logprob(TokenLogprob, frozen=True):
    """A token of an output or of a prompt."""

    rank: int
    """1 for the likeliest in its place; of equally likely ones the lower id comes first."""
    top: tuple[TokenLogprob, ...]
    """The likeliest tokens in its place, as many as were asked for, likeliest first. It may be one of them."""


class Logprobs(Struct, frozen=True):
    """Those of consecutive tokens: a sequence of Logprob."""

    num_top: int
    """Likeliest tokens of each."""
    token_ids: tuple[int, ...]
    values: bytes
    """Of each token, 4 bytes each, little-endian: its log-probability (a float), its rank, the ids of the likeliest
    tokens, and their log-probabilities (floats)."""
    tokens: tuple[bytes, ...]
    """Of each token: its own bytes, then those of the likeliest tokens."""
    before: bytes = b""
    """Of a prompt's: the bytes of its first token, which nothing predicts."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @overload
    def __getitem__(self, place: int) -> Logprob: ...
    @overload
    def __getitem__(self, place: slice) -> list[Logprob]: ...
    def __getitem__(self, place: int | slice) -> Logprob | list[Logprob]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"place {place} of {len(self)} log-probabilities")
        num_top, place = self.num_top, place % len(self)
        size = WORD_BYTES * logprob_words(num_top)
        logprob, rank, *top = struct.unpack_from(f"<fI{num_top}I{num_top}f", self.values, place * size)
        first = place * (1 + num_top)
        likeliest = zip(top[:num_top], top[num_top:], self.tokens[first + 1 : first + 1 + num_top], strict=True)
        return Logprob(
            self.token_ids[place], logprob, self.tokens[first], rank, tuple(TokenLogprob(*one) for one in likeliest)
        )

    def __iter__(self) -> Iterator[Logprob]:
        return (self[place] for place in range(len(self)))

    def __repr__(self) -> str:
        return short_repr(self)


def pack(
    num_top: int,
    token_ids: tuple[int, ...],
    values: bytes,
    token_bytes: Callable[[int], bytes],
    before: bytes = b"",
) -> Logprobs:
    """What a scheduler sends of tokens, with their bytes."""
    size = WORD_BYTES * logprob_words(num_top)
    tokens: list[bytes] = []
    for place, token_id in enumerate(token_ids):
        tokens.append(token_bytes(token_id))
        top = struct.unpack_from(f"<{num_top}I", values, place * size + 2 * WORD_BYTES)
        tokens += map(token_bytes, top)
    return Logprobs(num_top, token_ids, values, tuple(tokens), before)


def join(parts: Iterable[Logprobs]) -> Logprobs | None:
    """Those of tokens that follow one another, in one. None of none."""
    found = list(parts)
    if not found:
        return None
    return Logprobs(
        found[0].num_top,
        tuple(token_id for part in found for token_id in part.token_ids),
        b"".join(part.values for part in found),
        tuple(token for part in found for token in part.tokens),
        found[0].before,
    )
