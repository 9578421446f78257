"""Log-probabilities in the two forms of OpenAI's API: by token, of chats, and in columns, of completions.

Owns which of an output's tokens are told with which part of its text: a token whose text is held back waits for it, and
one whose text a stop string or the end of the sequence took away is never told. Used by the endpoints.
"""

import codecs
from collections.abc import Iterable, Sequence

from graphgen.calls.logprobs import Logprob, Logprobs, TokenLogprob
from graphgen.calls.outputs import StreamPiece
from graphgen.gateway import schema

LOWEST = -9999.0
"""Told for minus infinity, which JSON has no number for."""


class Told:
    """Of one output, while it comes."""

    def __init__(self) -> None:
        self._held: list[Logprob] = []
        self._num_bytes = 0  # of the tokens that were told
        self._text_bytes = 0

    def take(self, pieces: Sequence[StreamPiece]) -> list[Logprob]:
        """The tokens that are told with the text of these pieces, which are all since the last call."""
        for piece in pieces:
            self._held += piece.logprobs or ()
            self._text_bytes += len(piece.text.encode())
        finish = pieces[-1].finish_reason
        told: list[Logprob] = []
        for one in self._held:
            is_in_text = self._num_bytes < self._text_bytes or not one.token
            if not (is_in_text or finish not in (None, "stop")):
                break
            self._num_bytes += len(one.token)
            told.append(one)
        self._held = self._held[len(told) :]
        return told


def of_chat(told: Iterable[Logprob]) -> schema.ChatLogprobs:
    content = [
        schema.ChatLogprob(*_described(one), top_logprobs=[schema.TopLogprob(*_described(top)) for top in one.top])
        for one in told
    ]
    return schema.ChatLogprobs(content)


def _described(one: TokenLogprob) -> tuple[str, float, list[int]]:
    return text_of(one.token), max(one.logprob, LOWEST), list(one.token)


class Columns:
    """Of one output of a completion: its tokens so far, and where the next one begins in its text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of_prompt(self, found: Logprobs, text: str) -> schema.TextLogprobs:
        """What precedes the output where the prompt is echoed. Nothing predicts its first token. text: the prompt's,
        which may be without a special token that the tokenizer put before it."""
        columns = self.of(found)
        first = text_of(found.before)
        start = len(first) if text.startswith(first) else 0
        offsets = [0, *(start + offset for offset in columns.text_offset)]
        self._offset += start
        return schema.TextLogprobs(
            [first, *columns.tokens], [None, *columns.token_logprobs], [None, *columns.top_logprobs], offsets
        )

    def of(self, told: Iterable[Logprob]) -> schema.TextLogprobs:
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for one in told:
            tokens.append(text_of(one.token))
            values.append(max(one.logprob, LOWEST))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(one.token))
            top: dict[str, float] = {}
            for other in (*one.top, one):  # of tokens with one text the likelier one counts
                top.setdefault(text_of(other.token), max(other.logprob, LOWEST))
            tops.append(top)
        return schema.TextLogprobs(tokens, values, tops, offsets)


def text_of(token: bytes) -> str:
    """A part of a character is told as the replacement character; its bytes say more."""
    return token.decode(errors="replace")


def joined(first: schema.TextLogprobs | None, second: schema.TextLogprobs) -> schema.TextLogprobs:
    if first is None:
        return second
    return schema.TextLogprobs(
        [*first.tokens, *second.tokens],
        [*first.token_logprobs, *second.token_logprobs],
        [*first.top_logprobs, *second.top_logprobs],
        [*first.text_offset, *second.text_offset],
    )
