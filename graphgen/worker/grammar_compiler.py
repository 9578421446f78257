"""Grammars become matchers here, and matchers say which tokens may come next.

Owns the tokenizer as llguidance wants it, the compiled grammars that are kept, and the threads on which masks are
filled. Knows no request and no slot. Used by `graphgen.worker.grammars`, on threads of its own.
"""

import importlib.util
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphgen.capture.buffers import Words
from graphgen.launch.grammar_limits import parser_limits
from graphgen.launch.tokenizer_file import TokenizerPart
from graphgen.models.sampling import mask_words

MAX_FILLING_THREADS = 16
"""Of one worker, which has half the cores at most: the other processes of the engine are at work at the same time."""
MAX_KEPT_CHARACTERS = 4 << 20
"""Of the texts of compiled grammars that are kept for the next request with an equal one."""


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
        self._kept: OrderedDict[str, Any] = OrderedDict()  # compiled matchers that have followed nothing, by text
        self._kept_characters = 0

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
        """A matcher of its own for a request. Called on one thread. Raises what is wrong with the grammar."""
        from llguidance import LLMatcher

        if self._tokenizer is None:
            raise ValueError("this worker has no tokenizer for grammars")
        template = self._kept.pop(text, None)
        if template is None:
            template = LLMatcher(self._tokenizer, text, log_level=0, limits=parser_limits())
            if template.is_error():
                raise ValueError(reason_of(template))
            self._kept_characters += len(text)
        self._kept[text] = template
        while self._kept_characters > MAX_KEPT_CHARACTERS:
            oldest, _ = self._kept.popitem(last=False)
            self._kept_characters -= len(oldest)
        return template.deep_copy()

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

    def _checked(self, matcher: Any, mask: Words, has_any: bool) -> Words | Exception:
        if matcher.is_error():
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


def reason_of(matcher: Any) -> str:
    """Why a matcher is in its error state, without the state itself."""
    return str(matcher.get_error()).partition("<state>")[0].strip()
