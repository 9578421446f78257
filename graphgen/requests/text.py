"""From token ids to text, one token at a time: incremental decoding and stop strings.

Owns the promise that streamed text, joined, is exactly what the tokenizer makes of the whole output. Knows no request
and does no I/O. Used by `graphgen.requests.open_request`, on the thread that receives tokens.
"""

import copy
from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
"""What a decoder makes of bytes that are no UTF-8, or not yet."""

_CONTEXT_TOKENS = 4
_TRIM_TOKENS = 12
_FORCED_TRIM_TOKENS = 512
"""So long may a window grow whose end is never certain; a longer run of byte tokens is decoded in parts."""


class Detokenizer:
    """Decodes a growing output in time linear in its length.

    It decodes a window of the last tokens and hands out what the window's text has grown by. Handed out is only what
    no later token can change:
    - not a last replacement character, which may be a character whose bytes lie in tokens to come;
    - nothing of a run of byte tokens (the `<0x0A>` of sentencepiece vocabularies) before the run has ended, since one
      bad byte turns the whole run into replacement characters.
    What is held back so far is `pending`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], byte_token_ids: frozenset[int] = frozenset()) -> None:
        self._decode = decode
        self._byte_token_ids = byte_token_ids
        self._window: list[int] = []
        self._released = ""  # the part of the window's text that was handed out
        self._text = ""  # the window's text
        self._in_byte_run = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._window.append(token_id)
        before, self._text = self._text, self._decode(self._window)
        text = self._text
        # A special token that is left out of the text does not end a run either.
        self._in_byte_run = token_id in self._byte_token_ids or (self._in_byte_run and text == before)
        too_long = len(self._window) >= _FORCED_TRIM_TOKENS
        if self._in_byte_run and not too_long:
            return ""
        certain = text[:-1] if text.endswith(_REPLACEMENT) else text
        if not certain.startswith(self._released):
            return ""
        piece = certain[len(self._released) :]
        self._released = certain
        if len(self._window) >= _TRIM_TOKENS:
            self._trim(forced=too_long)
        return piece

    @property
    def pending(self) -> str:
        """What the tokens so far say beyond the text handed out, if no further token came."""
        return self._text[len(self._released) :]

    def finish(self) -> str:
        """The text held back, when no further token comes."""
        piece, self._released = self.pending, self._text
        return piece

    def _trim(self, forced: bool) -> None:
        """Keeps the last tokens only, where the text of what follows cannot depend on those before.

        That needs whole characters at the end, and some text in the context: decoders treat the first text they see
        differently (sentencepiece drops its leading space).
        """
        context = self._window[-_CONTEXT_TOKENS:]
        text = self._decode(context)
        if forced:  # a flood of broken bytes: the window must stay short, its context is long enough to resume in
            context = self._window[-2 * _TRIM_TOKENS :]
            text = self._decode(context)
        elif not text or text.endswith(_REPLACEMENT):
            return
        self._window, self._text = context, text
        self._released = text[:-1] if text.endswith(_REPLACEMENT) else text


class StopFinder:
    """Finds the first of several stop strings in text that comes in pieces of any size.

    The first one to be complete wins; of several that end at the same character the longest. Each string is matched
    by the Knuth-Morris-Pratt automaton, so the cost of a character does not depend on what came before, and the
    automaton's state is how much must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that certainly comes before any stop string, whether one was found). After a find it is over."""
        text = self._held + piece
        for index, character in enumerate(piece, start=len(self._held)):
            found_len = self._advance(character)
            if found_len:
                return text[: index + 1 - found_len], True
        keep = max(self._matched, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def peek(self, pending: str) -> tuple[str, bool]:
        """What `push` would say, without pushing: for text that a later token may still change."""
        probe = copy.copy(self)
        probe._matched = list(self._matched)
        return probe.push(pending)

    def finish(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Feeds one character to every automaton; the length of the longest stop it completed, or 0."""
        found_len = 0
        for number, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            matched = self._matched[number]
            while matched and stop[matched] != character:
                matched = borders[matched]
            matched += stop[matched] == character
            if matched == len(stop):
                found_len = max(found_len, matched)
                matched = borders[matched]
            self._matched[number] = matched
        return found_len


def _borders(stop: str) -> tuple[int, ...]:
    """borders[n]: length of the longest proper prefix of stop[:n] that is also its suffix."""
    borders = [0, 0]
    for end in range(1, len(stop)):
        border = borders[end]
        while border and stop[border] != stop[end]:
            border = borders[border]
        borders.append(border + (stop[border] == stop[end]))
    return tuple(borders)
