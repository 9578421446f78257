"""What the outputs that follow a grammar may draw next.

Owns a matcher for each slot whose request has a grammar, and the threads that compile grammars and fill masks: they
are llguidance's and take from microseconds to many milliseconds, so no step ever waits for one while the device could
compute. Knows slots and positions, never requests. Called by the runner for each plan (`GrammarSlots.open`, on the main
thread) and for each result (`GrammarSlots.judge`, on the collector's).

A draw whose mask is ready when its step is launched obeys it. One that comes too early, because its grammar is being
compiled or because its request runs ahead of its grammar, draws from all tokens, and what it drew is looked at when it
arrives: a token that the grammar allows is the one that would have been drawn with the mask, see
`graphgen.models.sampling.reference`, and counts. Any other is refused, and the scheduler plans the draw again; what was
planned behind it is at a place that is not the grammar's next, and is refused too.

A matcher follows the tokens that were drawn for its slot. What a request had before it got the slot, after a preemption
or the death of a worker, comes with the slot's first chunk (`SlotInit.output_token_ids`).
"""

import importlib.util
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from graphgen.capture.buffers import Words
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.messages import SlotInit, StepPlan
from graphgen.launch.grammar_limits import parser_limits
from graphgen.launch.tokenizer_file import TokenizerPart
from graphgen.models.sampling import mask_words

MAX_FILLING_THREADS = 4
MAX_KEPT_CHARACTERS = 4 << 20
"""Of the texts of compiled grammars that are kept for the next request with an equal one."""
PATIENCE_S = 0.05
"""For the masks of a step that has nothing else to compute while the device is idle."""


class Draw(NamedTuple):
    """One drawing row of a step that follows a grammar."""

    place: int  # among the step's drawing rows
    slot: int
    position: int  # of the token that is drawn
    grammar: "SlotGrammar"
    is_ahead: bool = False  # the token before it is not known
    mask: Words | None = None  # what it obeys; None: it draws from all tokens, and is looked at
    again: int | None = None  # the token of the output that is computed once more for it


class Verdicts(NamedTuple):
    """On the draws of a step, by their places."""

    refused: tuple[int, ...]
    failed: tuple[tuple[int, str], ...]


class SlotGrammar:
    """The grammar of one slot's owner, between the threads."""

    def __init__(self, init: SlotInit) -> None:
        self.text = init.grammar
        self.prompt_len = init.prompt_len
        self.drawn_position = -1  # of the last draw that was launched: the main thread's own
        self.busy = threading.Lock()  # guards the matcher
        self.matcher: Any = None  # of llguidance, which publishes no types of it; None until it is compiled
        # The others are guarded by the lock of all grammars, which nobody holds for longer than a moment.
        self.pending = unpack_int32(init.output_token_ids).tolist()  # tokens that the matcher has not followed yet
        self.num_tokens = len(self.pending)  # of the output
        self.mask: Words | None = None  # of the next token, once it is filled
        self.num_fills = 0  # that are on their way
        self.failure = ""

    @property
    def position(self) -> int:
        """Of the token that comes next."""
        return self.prompt_len + self.num_tokens


class GrammarSlots:
    """The grammars of one worker's slots."""

    def __init__(self, compiler: "GrammarCompiler") -> None:
        self._compiler = compiler
        self._slots: dict[int, SlotGrammar] = {}
        self._lock = threading.Condition()  # notified when a mask was filled or a step has ended
        self._num_launched = 0
        self._num_collected = 0
        # Grammars are compiled one after another; the masks of many are filled at once, without the interpreter.
        self._compiling = ThreadPoolExecutor(1, "grammar-compiler")
        num_threads = min(MAX_FILLING_THREADS, os.cpu_count() or 1)
        self._filling = ThreadPoolExecutor(num_threads, "grammar-masks")

    def close(self) -> None:
        for pool in (self._compiling, self._filling):
            pool.shutdown(wait=False, cancel_futures=True)

    # --- on the main thread --------------------------------------------------------------------------------------

    def open(self, plan: StepPlan) -> list[Draw]:
        """The plan's draws that follow a grammar, with the masks that are ready. Waits for the others only while the
        device has a step to compute, or if nothing else is drawn. To be called for every step that is launched."""
        for chunk in plan.chunks:
            if chunk.init is not None:
                self._own(chunk.slot, chunk.init)
        draws = self._draws(plan) if self._slots else []
        if due := [draw for draw in draws if not draw.is_ahead]:
            self._await_masks(due, is_alone=len(due) == plan.num_drawing_rows)
        with self._lock:
            self._num_launched += 1
            return [draw._replace(mask=_mask_for(draw)) for draw in draws]

    def _own(self, slot: int, init: SlotInit) -> None:
        """The slot has a new owner."""
        self._slots.pop(slot, None)
        if init.grammar:
            grammar = self._slots[slot] = SlotGrammar(init)
            grammar.num_fills = 1
            self._compiling.submit(self._compile, grammar)

    def _draws(self, plan: StepPlan) -> list[Draw]:
        draws: list[Draw] = []
        place = num_tokens = 0
        for chunk in plan.chunks:
            grammar = self._slots.get(chunk.slot)
            if chunk.draws and grammar is not None:
                position = chunk.start + chunk.length
                # One that was drawn before and refused. Of a prompt's tokens it does not matter how often they come.
                is_again = position == grammar.drawn_position and chunk.start >= grammar.prompt_len
                again = unpack_int32(plan.chunk_token_ids)[num_tokens] if is_again else None
                draws.append(Draw(place, chunk.slot, position, grammar, position > grammar.position, None, again))
                grammar.drawn_position = position
            place += chunk.draws
            num_tokens += chunk.length
        slots, positions = unpack_int32(plan.decode_slots), unpack_int32(plan.decode_positions)
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True), place):
            grammar = self._slots.get(slot)
            if grammar is not None:
                draws.append(Draw(row, slot, position + 1, grammar, position + 1 > grammar.position))
                grammar.drawn_position = position + 1
        return draws

    def _await_masks(self, draws: Sequence[Draw], is_alone: bool) -> None:
        def is_over() -> bool:
            is_idle = self._num_collected >= self._num_launched
            return (is_idle and not is_alone) or all(
                draw.grammar.failure or _mask_for(draw) is not None for draw in draws
            )

        with self._lock:
            for draw in draws:
                if _mask_for(draw) is None and not draw.grammar.num_fills:
                    self._start_fill(draw.grammar)
            self._lock.wait_for(is_over, PATIENCE_S)

    # --- on the collector's thread -------------------------------------------------------------------------------

    def judge(self, draws: Sequence[Draw], token_ids: Sequence[int]) -> Verdicts:
        """What the grammars say of a step's tokens, of which one below 0 is none; those that they allow they follow. To
        be called for every step."""
        refused: list[int] = []
        failed: list[tuple[int, str]] = []
        for draw in draws:
            grammar, token_id = draw.grammar, token_ids[draw.place]
            if draw.mask is not None:
                if token_id >= 0:
                    self._follow(draw, pending=[token_id])
            elif grammar.failure:
                failed.append((draw.place, grammar.failure))
            elif token_id >= 0 and self._takes(grammar, draw.position, token_id):
                self._follow(draw, pending=[])
            else:
                refused.append(draw.place)
                with self._lock:
                    if draw.position == grammar.position and not grammar.num_fills:
                        self._start_fill(grammar)
        with self._lock:
            self._num_collected += 1
            self._lock.notify_all()
        return Verdicts(tuple(refused), tuple(failed))

    def _takes(self, grammar: SlotGrammar, position: int, token_id: int) -> bool:
        """Whether the grammar allows a token that was drawn without it, which its matcher then has followed. One that
        is at work is not waited for."""
        if position != grammar.position or not grammar.busy.acquire(blocking=False):
            return False
        try:
            if grammar.matcher is None or grammar.pending:
                return False
            return bool(grammar.matcher.try_consume_tokens([token_id]) == 1)
        finally:
            grammar.busy.release()

    def _follow(self, draw: Draw, pending: list[int]) -> None:
        """The output goes on with a token. pending: the same, if the matcher has not followed it."""
        grammar = draw.grammar
        with self._lock:
            grammar.pending += pending
            grammar.num_tokens += 1
            grammar.mask = None
            if pending or not draw.is_ahead:  # one that runs ahead needs a mask when it is refused, and not before
                self._start_fill(grammar)

    def _start_fill(self, grammar: SlotGrammar) -> None:
        """With the lock."""
        grammar.num_fills += 1
        self._filling.submit(self._fill, grammar)

    # --- on other threads ----------------------------------------------------------------------------------------

    def _compile(self, grammar: SlotGrammar) -> None:
        try:
            with grammar.busy:
                grammar.matcher = self._compiler.matcher(grammar.text)
        except Exception as error:  # whatever is wrong with it ends its request alone
            self._fail(grammar, str(error))
            return
        self._fill(grammar)

    def _fill(self, grammar: SlotGrammar) -> None:
        """Follows the tokens that are known, and makes the mask of the next."""
        try:
            with grammar.busy:
                with self._lock:
                    pending, grammar.pending = grammar.pending, []
                    position = grammar.position
                mask = self._compiler.mask_after(grammar.matcher, pending)
        except Exception as error:
            self._fail(grammar, str(error))
            return
        with self._lock:
            grammar.num_fills -= 1
            if position == grammar.position:
                grammar.mask = mask
            self._lock.notify_all()

    def _fail(self, grammar: SlotGrammar, reason: str) -> None:
        with self._lock:
            grammar.failure = reason
            self._lock.notify_all()


def _mask_for(draw: Draw) -> Words | None:
    """With the lock of all grammars."""
    return draw.grammar.mask if draw.position == draw.grammar.position else None


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
        self._tokenizer: Any = None  # an LLTokenizer
        self._kept: OrderedDict[str, Any] = OrderedDict()  # compiled matchers that have followed nothing, by text
        self._kept_characters = 0

    def prepare(self) -> float:
        """Makes the tokenizer, if there is llguidance: one of 128 000 tokens holds the interpreter for a second, which
        no step may wait for. Returns the seconds without those in which there was none to be read yet."""
        if importlib.util.find_spec("llguidance") is None:
            return 0.0
        part = self._read_tokenizer()
        begun_s = time.monotonic()
        self._tokenizer = self._make_tokenizer(part)
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

    def mask_after(self, matcher: Any, token_ids: Sequence[int]) -> Words:
        """Lets the matcher follow the tokens, and says which may come next. Raises ValueError where it cannot go on."""
        if token_ids and not matcher.consume_tokens(list(token_ids)):
            raise ValueError(reason_of(matcher))
        num_words = mask_words(self._tokenizer.vocab_size)
        words = np.zeros(max(num_words, self._num_words), np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, num_words * words.itemsize)
        if matcher.is_error():
            raise ValueError(reason_of(matcher))
        mask = words[: self._num_words]
        if spare := 32 * self._num_words - self._vocab_size:
            mask[-1:].view(np.uint32)[:] &= np.uint32(0xFFFFFFFF >> spare)
        if not mask.any():
            raise ValueError("no token of the model's vocabulary may come next")
        return mask

    def _make_tokenizer(self, part: TokenizerPart) -> Any:
        from llguidance import LLTokenizer

        own = () if part.eos_token_id is None else (part.eos_token_id,)
        eos_token_ids = [one for one in dict.fromkeys((*self._eos_token_ids, *own)) if one < self._vocab_size]
        return LLTokenizer(part.backend, eos_token=eos_token_ids)


def reason_of(matcher: Any) -> str:
    """Why a matcher is in its error state, without the state itself."""
    return str(matcher.get_error()).partition("<state>")[0].strip()
