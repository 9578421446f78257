"""What the outputs that follow a grammar may draw next.

Owns a matcher for each slot whose request has a grammar, and the threads on which `graphgen.worker.grammar_compiler`
compiles grammars and fills masks. That takes from microseconds to many milliseconds: no step waits for it while
the device could compute. The masks that follow from one step are filled together: handing each to a thread, and waking
the main thread for each, would cost more than most masks do. Knows slots and positions, never requests. Called by the
runner for each plan (`GrammarSlots.open`, on the main thread) and for each result (`GrammarSlots.judge`, on the
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from graphgen.capture.buffers import Words
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.messages import SlotInit, StepPlan
from graphgen.worker.grammar_compiler import GrammarCompiler

PATIENCE_S = 0.05
"""For the masks of a step that has nothing else to compute while the device is idle."""
FILLED_TOGETHER = 16
"""Masks, at most: the first of many are on their way while the next are made."""
LOOK_PATIENCE_S = 0.002
"""For a matcher that is at work on the mask of a token that has arrived."""


class Draw(NamedTuple):
    """One drawing row of a step that follows a grammar."""

    place: int  # among the step's drawing rows
    slot: int
    position: int  # of the token that is drawn
    grammar: "SlotGrammar"
    is_ahead: bool = False  # the token before it is not known
    mask: Words | None = None  # what it obeys; None: it draws from all tokens, and is looked at
    again: int | None = None  # the token of the output that is computed once more for it


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

    def __init__(self, slot: int, init: SlotInit) -> None:
        self.slot = slot
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

    def __init__(self, compiler: GrammarCompiler, send_late: SendLate = lambda masks: None) -> None:
        """send_late: brings masks to draws that are launched. Called on other threads, by one at a time."""
        self._compiler = compiler
        self._send_late = send_late
        self._owning = threading.Lock()  # held while masks are sent to slots that must keep their owners
        self._slots: dict[int, SlotGrammar] = {}
        self._lock = threading.Condition()  # notified when a mask was filled or a step has ended
        self._num_launched = 0
        self._num_collected = 0
        self._due: list[SlotGrammar] = []  # whose masks are filled next; guarded by the lock
        # A grammar is compiled, and its first mask filled, beside the masks of the others.
        self._compiling = ThreadPoolExecutor(1, "grammar-compiler")
        self._filling = ThreadPoolExecutor(1, "grammar-masks")

    def close(self) -> None:
        for pool in (self._compiling, self._filling):
            pool.shutdown(wait=False, cancel_futures=True)

    def disown(self) -> None:
        """No slot has an owner, and every step has ended, those included that nobody judged."""
        with self._owning:
            self._slots.clear()
        with self._lock:
            self._num_collected = self._num_launched

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
        with self._owning:
            self._slots.pop(slot, None)
        if init.grammar:
            grammar = self._slots[slot] = SlotGrammar(slot, init)
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
                if _mask_for(draw) is None and not draw.grammar.num_fills and not draw.grammar.failure:
                    self._start_fill(draw.grammar)
            self._lock.wait_for(is_over, PATIENCE_S)

    # --- on the collector's thread -------------------------------------------------------------------------------

    def judge(self, draws: Sequence[Draw], token_ids: Sequence[int]) -> Verdicts:
        """What the grammars say of a step's tokens, of which one below 0 is none; those that they allow they follow. To
        be called for every step."""
        refused: list[int] = []
        failed: list[tuple[int, str]] = []
        taken = {draw.place for draw in draws if draw.mask is None and self._takes(draw, token_ids[draw.place])}
        with self._lock:
            for draw in draws:
                grammar, token_id = draw.grammar, token_ids[draw.place]
                if draw.mask is not None:
                    if token_id >= 0:
                        self._follow(draw, pending=[token_id])
                elif draw.place in taken:
                    self._follow(draw, pending=[])
                elif grammar.failure:
                    failed.append((draw.place, grammar.failure))
                else:
                    refused.append(draw.place)
                    if draw.position == grammar.position and not grammar.num_fills:
                        self._start_fill(grammar)
            self._num_collected += 1
            self._lock.notify_all()
        return Verdicts(tuple(refused), tuple(failed))

    def _takes(self, draw: Draw, token_id: int) -> bool:
        """Whether the grammar allows a token that was drawn without it, which its matcher then has followed. One that
        is at work is waited for no longer than a moment."""
        grammar = draw.grammar
        if token_id < 0 or grammar.failure or draw.position != grammar.position:
            return False
        if not grammar.busy.acquire(timeout=LOOK_PATIENCE_S):
            return False
        try:
            if grammar.matcher is None:
                return False
            with self._lock:
                pending, grammar.pending = grammar.pending, []
            if pending:
                grammar.matcher.consume_tokens(pending)
            return bool(grammar.matcher.try_consume_tokens([token_id]) == 1)
        finally:
            grammar.busy.release()

    def _follow(self, draw: Draw, pending: list[int]) -> None:
        """With the lock. The output goes on with a token. pending: the same, if the matcher has not followed it."""
        grammar = draw.grammar
        grammar.pending += pending
        grammar.num_tokens += 1
        grammar.mask = None
        self._start_fill(grammar)

    def _start_fill(self, grammar: SlotGrammar) -> None:
        """With the lock: what is started until it is released is filled together."""
        grammar.num_fills += 1
        self._due.append(grammar)
        if len(self._due) == 1:
            self._filling.submit(self._fill_due)

    # --- on other threads ----------------------------------------------------------------------------------------

    def _compile(self, grammar: SlotGrammar) -> None:
        try:
            with grammar.busy:
                grammar.matcher = self._compiler.matcher(grammar.text)
        except Exception as error:  # whatever is wrong with it ends its request alone
            with self._lock:
                grammar.failure = str(error)
                self._lock.notify_all()
            return
        self._fill([grammar])

    def _fill_due(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for first in range(0, len(due), FILLED_TOGETHER):
            self._fill(due[first : first + FILLED_TOGETHER])

    def _fill(self, grammars: Sequence[SlotGrammar]) -> None:
        """Follows the tokens that are known, and makes the masks of the next. A grammar that was started twice
        is filled once."""
        distinct = list(dict.fromkeys(grammars))
        for grammar in distinct:
            grammar.busy.acquire()
        try:
            with self._lock:
                positions = [grammar.position for grammar in distinct]
                rows = [(grammar.matcher, grammar.pending) for grammar in distinct]
                for grammar in distinct:
                    grammar.pending = []
            found = self._compiler.masks_after(rows)
        except Exception as error:
            found = [error for _ in distinct]
        finally:
            for grammar in distinct:
                grammar.busy.release()
        late: list[SlotGrammar] = []
        with self._lock:
            for grammar in grammars:
                grammar.num_fills -= 1
            for grammar, position, mask in zip(distinct, positions, found, strict=True):
                if isinstance(mask, Exception):  # it ends its request alone
                    grammar.failure = str(mask)
                elif position == grammar.position:
                    grammar.mask = mask
                    if grammar.drawn_position >= position:
                        late.append(grammar)
            self._lock.notify_all()
        if late:
            self._send(late)

    def _send(self, grammars: Sequence[SlotGrammar]) -> None:
        """Brings their masks to draws that are launched. Whose slot has another owner by now gets none, and none gets
        another owner meanwhile."""
        with self._owning:
            with self._lock:
                masks = [
                    LateMask(grammar.slot, grammar.position, grammar.mask)
                    for grammar in grammars
                    if grammar.mask is not None and self._slots.get(grammar.slot) is grammar
                ]
            if masks:
                self._send_late(masks)


def _mask_for(draw: Draw) -> Words | None:
    """With the lock of all grammars."""
    return draw.grammar.mask if draw.position == draw.grammar.position else None
