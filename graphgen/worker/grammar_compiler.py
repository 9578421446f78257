"""Grammars become matchers here, and matchers say which tokens may come next.

Owns the tokenizer as llguidance wants it, the matchers that nobody uses, and the threads on which masks are filled.
Knows no request and no slot. Used by `graphgen.worker.grammars`, on threads of its own.

No two requests share a matcher, nor a copy of one: copies share their lexer and its lock, so that their masks are made
one after the other, and its states, of which a grammar may have so many and no more. A matcher that is given back is
the next request's with an equal grammar, and has the states that it has made.
"""

import importlib.util
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from graphgen.capture.buffers import Words
from graphgen.launch.grammar_limits import parser_limits
from graphgen.launch.tokenizer_file import TokenizerPart
from graphgen.models.sampling import mask_words

MAX_FILLING_THREADS = 16
"""Of one worker, which has half the cores at most: the other processes of the engine are at work at the same time."""
MAX_KEPT, MAX_KEPT_CHARACTERS = 64, 4 << 20
"""Matchers that nobody uses, and characters of their texts."""
MAX_REUSED_TOKENS = 1024
"""A matcher that has followed so many for one request is not kept: its lexer may have grown to 30 MB."""
GOOD_ENDS = frozenset(("NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence"))
"""Reasons of a matcher to have stopped. After any other it would allow the end of sequence wherever it is."""


class GrammarCompiler:
    """Makes matchers and masks."""

    def __init__(
        self, vocab_size: int, eos_token_ids: Sequence[int], read_tokenizer: Callable[[], TokenizerPart]
    ) -> None:
        """vocab_size: of the tokens that may be drawn. eos_token_ids: the model's."""
        self._num_words = mask_words(vocab_size)
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._read_tokenizer = read_tokenizer
        self._tokenizer: Any = None  # an LLTokenizer, and
        self._executor: Any = None  # an LLExecutor: its threads need no interpreter
        self._kept: deque[_Kept] = deque()  # the newest last; guarded by the lock
        self._lock = threading.Lock()

    def prepare(self) -> float:
        """Makes the tokenizer, if there is llguidance: one of 128 000 tokens holds the interpreter for a second, which
        no step may wait for. Returns the seconds without those in which there was none to be read yet."""
        if importlib.util.find_spec("llguidance") is None:
            return 0.0
        part = self._read_tokenizer()
        begun_s = time.monotonic()
        self._tokenizer, self._executor = self._make_tokenizer(part), _make_executor()
        return time.monotonic() - begun_s

    def matcher(self, text: str) -> Any:
        """A matcher for a request alone, which has followed nothing. Raises what is wrong with the grammar."""
        from llguidance import LLMatcher

        if self._tokenizer is None:
            raise ValueError("this worker has no tokenizer for grammars")
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise ValueError(reason_of(matcher))
        return matcher

    def used_matcher(self, text: str) -> Any | None:
        """The same, of those that were given back, if there is one. It may come to a limit sooner than a new one."""
        with self._lock:
            found = next((kept for kept in reversed(self._kept) if kept.text == text), None)
            if found is not None:
                self._kept.remove(found)
        return None if found is None else found.matcher

    def give_back(self, text: str, matcher: Any, num_tokens: int) -> None:
        """What nobody uses any more. num_tokens: that it has followed for its last request."""
        if num_tokens >= MAX_REUSED_TOKENS or not is_sound(matcher) or not matcher.reset():
            return
        with self._lock:
            self._kept.append(_Kept(text, matcher))
            while len(self._kept) > MAX_KEPT or sum(len(kept.text) for kept in self._kept) > MAX_KEPT_CHARACTERS:
                self._kept.popleft()

    def masks_after(self, rows: Sequence[tuple[Any, Sequence[int]]]) -> list[Words | Exception]:
        """Lets each matcher follow its tokens, and says which may come next; for one that cannot go on, why. The masks
        are filled at once, on several threads and without the interpreter.

        rows: matchers, each once, and the tokens that they have not followed."""
        if single := [(matcher, token_ids[0]) for matcher, token_ids in rows if len(token_ids) == 1]:
            self._executor.consume_token_par(single)
        for matcher, token_ids in rows:
            if len(token_ids) > 1:
                matcher.consume_tokens(list(token_ids))
        num_known = mask_words(self._tokenizer.vocab_size)
        masks = np.empty((len(rows), max(num_known, self._num_words)), np.int32)
        numbered = [(matcher, row) for row, (matcher, _) in enumerate(rows)]
        self._executor.unsafe_compute_mask_ptr(numbered, masks.ctypes.data, masks.strides[0], len(rows))
        masks[:, num_known:] = 0
        masks = masks[:, : self._num_words]
        if spare := 32 * self._num_words - self._vocab_size:
            masks[:, -1] &= np.uint32(0xFFFFFFFF >> spare).view(np.int32)
        has_any = np.asarray(masks.any(axis=1))  # to its types any() may be one value
        return [self._checked(matcher, masks[row], has_any[row]) for row, (matcher, _) in enumerate(rows)]

    def allows(self, matcher: Any, token_ids: Sequence[int], token_id: int) -> bool:
        """Lets a matcher follow its tokens, and says whether its next mask will allow one more, without making it. May
        say no where it will: at the end of sequence.

        A mask allows fewer tokens than would be valid: of a text that has to come, the tokenizer's own tokens alone."""
        if token_ids:
            matcher.consume_tokens(list(token_ids))
        # To be asked for a token that the tokenizer does not have breaks a matcher.
        if token_id >= self._tokenizer.vocab_size or not is_sound(matcher) or matcher.is_stopped():
            return False
        if forced := matcher.compute_ff_tokens():
            return bool(token_id == forced[0])
        return matcher.validate_tokens([token_id]) == 1 and is_sound(matcher)

    def _checked(self, matcher: Any, mask: Words, has_any: bool) -> Words | Exception:
        if not is_sound(matcher):
            return ValueError(reason_of(matcher))
        return mask if has_any else ValueError("no token of the model's vocabulary may come next")

    def _make_tokenizer(self, part: TokenizerPart) -> Any:
        from llguidance import LLTokenizer

        own = () if part.eos_token_id is None else (part.eos_token_id,)
        eos_token_ids = [one for one in dict.fromkeys((*self._eos_token_ids, *own)) if one < self._vocab_size]
        return LLTokenizer(part.backend, eos_token=eos_token_ids)


def num_filling_threads(num_cores: int) -> int:
    """num_cores: that this process may use."""
    return min(MAX_FILLING_THREADS, max(1, num_cores // 2))


def _make_executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor(num_filling_threads(len(os.sched_getaffinity(0))))


class _Kept(NamedTuple):
    text: str
    matcher: Any


def is_sound(matcher: Any) -> bool:
    """Whether it still says what its grammar allows."""
    return not matcher.is_error() and matcher.stop_reason() in GOOD_ENDS


def reason_of(matcher: Any) -> str:
    """Why a matcher is not sound, without its state."""
    return re.split("<(?:state|non-verbose)", str(matcher.get_error()))[0].strip() or str(matcher.stop_reason())
