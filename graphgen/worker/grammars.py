"""What the outputs that follow a grammar may draw next.

Owns a matcher for each slot whose request has a grammar, and the threads on which `graphgen.worker.grammar_compiler`
compiles grammars and fills masks. That takes from microseconds to many milliseconds, and no step waits for a mask.
Those that follow from one step are filled a few at a time: handing each to a thread would cost more than most masks do,
and one that takes long delays only those that are filled with it. Knows slots and positions, never requests. Called by
the runner for each plan (`GrammarSlots.open`, on the main thread) and for each result (`GrammarSlots.judge`, on the
collector's).

A draw whose mask is ready when its step is launched obeys it. One that comes too early, because its grammar is being
compiled or because its request runs ahead of its grammar, is launched without. Its mask follows it to the device, where
the draw comes last in a step: mostly it is there in time. Whether it was or not, what such a draw drew is looked at
when it arrives: a token that the grammar allows is the one that would have been drawn with the mask, see
`graphgen.models.sampling.reference`, and counts. Any other is refused, and the scheduler plans the draw again; what was
planned behind it is at a place that is not the grammar's next, and is refused too.

A matcher follows the tokens that were drawn for its slot. What a request had before it got the slot, after a preemption
or the death of a worker, comes with the slot's first chunk (`SlotInit.output_token_ids`).
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from graphgen.capture.buffers import Words
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.worker_messages import SlotInit, StepPlan
from graphgen.worker.grammar_compiler import GrammarCompiler

PATIENCE_S = 0.05
"""For grammars that are being compiled, in a step that computes nothing else."""
FILLED_TOGETHER = 32
"""Masks, at most."""
COMPILERS, FILLERS = 2, 2
"""Threads that compile grammars, and that have masks filled: when one takes long, those behind it go on."""


class Draw(NamedTuple):
    """One drawing row of a step that follows a grammar."""

    place: int  # among the step's drawing rows
    slot: int
    position: int  # of the token that is drawn
    grammar: "SlotGrammar"
    mask: Words | None = None  # that it is launched with; None: it draws from all tokens, if none follows it in time


class LateMask(NamedTuple):
    """For a draw that was launched without it."""

    slot: int
    position: int
    words: Words


SendLate = Callable[[Sequence[LateMask]], None]


class Verdicts(NamedTuple):
    """On the draws of a step, by their places."""

    refused: tuple[int, ...]
    failed: tuple[tuple[int, str], ...]


class SlotGrammar:
    """The grammar of one slot's owner, between the threads."""

    def __init__(self, slot: int, init: SlotInit, num_before: int = 0) -> None:
        """num_before: steps that were launched before the first of this owner."""
        self.slot = slot
        self.num_before = num_before
        self.text = init.grammar
        self.prompt_len = init.prompt_len
        self.drawn_position = -1  # of the last draw that was launched: the main thread's own
        self.compiled = threading.Event()  # or found to be wrong
        self.busy = threading.Lock()  # guards the matcher, and what it has followed
        self.matcher: Any = None  # of llguidance, which publishes no types; None before it is compiled, and at last
        self.is_new = False  # the matcher has been nobody else's
        self.num_followed = 0  # tokens of the output
        # The others are guarded by the lock of all grammars, which nobody holds for longer than a moment.
        self.tokens: list[int] = unpack_int32(init.output_token_ids).tolist()  # of the output
        self.mask: Words | None = None  # of the next token, once it is filled
        self.is_due = True  # to be filled: it will be for the token that is the next one then
        self.failure = ""

    @property
    def position(self) -> int:
        """Of the token that comes next."""
        return self.prompt_len + len(self.tokens)


class GrammarSlots:
    """The grammars of one worker's slots."""

    def __init__(self, compiler: GrammarCompiler, send_late: SendLate = lambda masks: None) -> None:
        """send_late: brings masks to draws that are launched. Called on other threads, by one at a time."""
        self._compiler = compiler
        self._send_late = send_late
        self._owning = threading.Lock()  # held while masks are sent to slots that must keep their owners
        self._slots: dict[int, SlotGrammar] = {}
        self._lock = threading.Lock()
        self._num_launched = self._num_judged = 0  # steps; guarded by the lock, and so is
        self._held: list[SlotGrammar] = []  # whose masks might still be taken for those of their slots' owners before
        # A grammar is compiled, and its first mask filled, beside the masks of the others.
        self._compiling = ThreadPoolExecutor(COMPILERS, "grammar-compiler")
        self._filling = ThreadPoolExecutor(FILLERS, "grammar-masks")

    def close(self) -> None:
        for pool in (self._compiling, self._filling):
            pool.shutdown(wait=False, cancel_futures=True)

    def disown(self) -> None:
        """No slot has an owner, and every step has ended, those included that nobody judged."""
        with self._owning:
            owned = list(self._slots.values())
            self._slots.clear()
        with self._lock:
            self._num_judged = self._num_launched
            self._held.clear()
        for grammar in owned:
            self._compiling.submit(self._retire, grammar)

    # --- on the main thread --------------------------------------------------------------------------------------

    def open(self, plan: StepPlan) -> list[Draw]:
        """The plan's draws that follow a grammar, with the masks that are ready. To be called for every step that is
        launched."""
        for chunk in plan.chunks:
            if chunk.init is not None:
                self._own(chunk.slot, chunk.init)
        draws = self._draws(plan) if self._slots else []
        if len(draws) == len(plan.chunks) + plan.num_decodes:
            _await_compiled(draws)
        with self._lock:
            self._num_launched += 1
            draws = [draw._replace(mask=_mask_for(draw)) for draw in draws]
        if any(draw.mask is not None for draw in draws):
            # What is being sent may be an older mask of one of them: it must be on its way before these are.
            with self._owning:
                pass
        return draws

    def _own(self, slot: int, init: SlotInit) -> None:
        """The slot has a new owner."""
        with self._owning:
            before = self._slots.pop(slot, None)
        if before is not None:
            self._compiling.submit(self._retire, before)
        if init.grammar:
            grammar = self._slots[slot] = SlotGrammar(slot, init, self._num_launched)
            self._compiling.submit(self._compile, grammar)

    def _draws(self, plan: StepPlan) -> list[Draw]:
        draws: list[Draw] = []
        place = 0
        for chunk in plan.chunks:
            grammar = self._slots.get(chunk.slot)
            if chunk.draws and grammar is not None:
                grammar.drawn_position = chunk.start + chunk.length
                draws.append(Draw(place, chunk.slot, grammar.drawn_position, grammar))
            place += chunk.draws
        slots, positions = unpack_int32(plan.decode_slots), unpack_int32(plan.decode_positions)
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True), place):
            grammar = self._slots.get(slot)
            if grammar is not None:
                draws.append(Draw(row, slot, position + 1, grammar))
                grammar.drawn_position = position + 1
        return draws

    # --- on the collector's thread -------------------------------------------------------------------------------

    def judge(self, draws: Sequence[Draw], token_ids: Sequence[int]) -> Verdicts:
        """What the grammars say of a step's tokens, of which one below 0 is none; those that they allow they follow. To
        be called for every step."""
        refused: list[int] = []
        failed: list[tuple[int, str]] = []
        due: list[SlotGrammar] = []
        allowed = {draw.place for draw in draws if self._allows(draw, token_ids[draw.place])}
        with self._lock:
            for draw in draws:
                grammar = draw.grammar
                if draw.place in allowed:
                    grammar.tokens.append(token_ids[draw.place])
                    grammar.mask = None
                    if not grammar.is_due:
                        grammar.is_due = True
                        due.append(grammar)
                elif draw.mask is not None and token_ids[draw.place] < 0:
                    pass  # nothing could be drawn
                elif grammar.failure:
                    failed.append((draw.place, grammar.failure))
                else:
                    refused.append(draw.place)
            self._num_judged += 1
            held, self._held = self._held, []
        for work, grammars in ((self._send, held), (self._fill, due)):
            for first in range(0, len(grammars), FILLED_TOGETHER):
                self._filling.submit(work, grammars[first : first + FILLED_TOGETHER])
        return Verdicts(tuple(refused), tuple(failed))

    def _allows(self, draw: Draw, token_id: int) -> bool:
        """Whether a draw's token is its grammar's next. Before there is a mask the matcher says so, unless it is at
        work. Needs no lock: on the thread that judges, nobody else moves a grammar on. One that was launched with a
        mask is looked at, too: where its request was preempted since, the mask of the slot's next owner may have taken
        its place."""
        grammar = draw.grammar
        if token_id < 0 or grammar.failure or draw.position != grammar.position:
            return False
        if (mask := grammar.mask if draw.mask is None else draw.mask) is not None:
            return is_in_mask(mask, token_id)
        if not grammar.busy.acquire(blocking=False):
            return False
        try:
            if grammar.matcher is None:
                return False
            behind, grammar.num_followed = grammar.tokens[grammar.num_followed :], len(grammar.tokens)
            return self._compiler.allows(grammar.matcher, behind, token_id)
        finally:
            grammar.busy.release()

    # --- on other threads ----------------------------------------------------------------------------------------

    def _compile(self, grammar: SlotGrammar, is_again: bool = False) -> None:
        """Makes its matcher and its first mask, unless nobody waits for it any more. is_again: one that was somebody
        else's has come to a limit."""
        if not self._is_owned(grammar):
            return
        try:
            used = None if is_again else self._compiler.used_matcher(grammar.text)
            matcher = self._compiler.matcher(grammar.text) if used is None else used
        except BaseException as error:  # a panic, too; whatever is wrong with it ends its request alone
            with self._lock:
                grammar.failure = str(error)
        else:
            with grammar.busy:
                grammar.matcher, grammar.is_new, grammar.num_followed = matcher, used is None, 0
            self._fill([grammar])
        grammar.compiled.set()
        if not self._is_owned(grammar):  # it may have been retired before it had a matcher
            self._retire(grammar)

    def _is_owned(self, grammar: SlotGrammar) -> bool:
        return self._slots.get(grammar.slot) is grammar

    def _retire(self, grammar: SlotGrammar) -> None:
        """Nobody owns it any more."""
        with grammar.busy:
            matcher, grammar.matcher = grammar.matcher, None
            if matcher is not None:
                self._compiler.give_back(grammar.text, matcher, grammar.num_followed)

    def _fill(self, grammars: Sequence[SlotGrammar]) -> None:
        """Follows the tokens that are known, and makes the masks of the next. Each of them is due, so that nobody else
        holds several of their matchers at a time."""
        for grammar in grammars:
            grammar.busy.acquire()
        owned = [grammar for grammar in grammars if grammar.matcher is not None]
        were_new = [grammar.is_new for grammar in owned]  # once they are free, others may replace them
        try:
            with self._lock:
                positions = [grammar.position for grammar in owned]
                rows = [(grammar.matcher, grammar.tokens[grammar.num_followed :]) for grammar in owned]
                for grammar in owned:
                    grammar.is_due, grammar.num_followed = False, len(grammar.tokens)
            found: Sequence[Words | BaseException] = self._compiler.masks_after(rows) if rows else []
        except BaseException as error:  # a panic, too
            found = [error for _ in owned]
        finally:
            for grammar in grammars:
                grammar.busy.release()
        late: list[SlotGrammar] = []
        with self._lock:
            for grammar, was_new, position, mask in zip(owned, were_new, positions, found, strict=True):
                if isinstance(mask, BaseException) and not was_new:
                    if not grammar.is_due:  # else who fills it next finds the same
                        grammar.is_due = True
                        self._compiling.submit(self._compile, grammar, is_again=True)
                elif isinstance(mask, BaseException):  # it ends its request alone
                    grammar.failure = str(mask)
                elif position == grammar.position:
                    grammar.mask = mask
                    if grammar.drawn_position >= position:
                        late.append(grammar)
        if late:
            self._send(late)

    def _send(self, grammars: Sequence[SlotGrammar]) -> None:
        """Brings their masks to draws that are launched. Whose slot has another owner by now gets none, and none gets
        another owner meanwhile. A mask waits until no draw of the owner before it can be under way, which may be for
        the same position."""
        with self._owning:
            masks: list[LateMask] = []
            with self._lock:
                for grammar in grammars:
                    if grammar.mask is None or not self._is_owned(grammar):
                        continue
                    if grammar.num_before > self._num_judged:
                        self._held.append(grammar)
                    else:
                        masks.append(LateMask(grammar.slot, grammar.position, grammar.mask))
            if masks:
                self._send_late(masks)


def _await_compiled(draws: Sequence[Draw]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    for draw in draws:
        if not draw.grammar.compiled.is_set():
            draw.grammar.compiled.wait(max(0.0, until_s - time.monotonic()))


def _mask_for(draw: Draw) -> Words | None:
    """With the lock of all grammars."""
    return draw.grammar.mask if draw.position == draw.grammar.position else None


def is_in_mask(mask: Words, token_id: int) -> bool:
    return bool(mask[token_id // 32] >> (token_id % 32) & 1)
