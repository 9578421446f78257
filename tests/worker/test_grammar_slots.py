"""Who waits for masks, and for which of them. No engine: what makes masks is held up on purpose."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from graphgen.capture.buffers import Words
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.worker_messages import Bucket, Chunk, SamplerParams, SlotInit, StepPlan
from graphgen.models.sampling import mask_words
from graphgen.worker.grammars import FILLED_TOGETHER, FILLERS, PATIENCE_S, Draw, GrammarSlots, LateMask, Verdicts

VOCAB_SIZE = 70
PROMPT_LEN = 3
PLENTY_S = 10.0
MOMENT_S = 0.5 * PATIENCE_S


class Matcher:
    """Of a grammar that allows the token that comes after as many as it has followed, and no other."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_followed = 0
        self.num_asked = 0
        self.is_broken = False

    def follow(self, token_ids: Sequence[int]) -> None:
        assert list(token_ids) == list(range(self.num_followed, self.num_followed + len(token_ids)))
        self.num_followed += len(token_ids)


class Compiler:
    """Grammars and masks are held up by their texts."""

    def __init__(self) -> None:
        self.may_compile, self.may_fill = threading.Event(), threading.Event()
        self.held: set[str] = set()  # grammars whose masks wait for may_fill
        self.filled: list[list[str]] = []
        self.asked: list[str] = []
        self.matchers: list[Matcher] = []
        self.used: list[Matcher] = []
        self.given_back: list[tuple[str, int]] = []
        self.may_compile.set()

    def used_matcher(self, text: str) -> Matcher | None:
        return self.used.pop() if self.used else None

    def give_back(self, text: str, matcher: Matcher, num_tokens: int) -> None:
        self.given_back.append((text, num_tokens))

    def matcher(self, text: str) -> Matcher:
        self.asked.append(text)
        assert self.may_compile.wait(PLENTY_S)
        self.matchers.append(Matcher(text))
        return self.matchers[-1]

    def allows(self, matcher: Matcher, token_ids: Sequence[int], token_id: int) -> bool:
        matcher.num_asked += 1
        matcher.follow(token_ids)
        return not matcher.is_broken and token_id == matcher.num_followed

    def masks_after(self, rows: Sequence[tuple[Any, Sequence[int]]]) -> list[Words | Exception]:
        self.filled.append([matcher.text for matcher, _ in rows])
        if self.held & set(self.filled[-1]):
            assert self.may_fill.wait(PLENTY_S)
        masks: list[Words | Exception] = []
        for matcher, token_ids in rows:
            matcher.follow(token_ids)
            masks.append(ValueError("too many states") if matcher.is_broken else words(matcher.num_followed))
        return masks


class Sent:
    """Late masks, as (slot, position)."""

    def __init__(self) -> None:
        self.masks: list[tuple[int, int]] = []
        self._came = threading.Condition()

    def __call__(self, masks: Sequence[LateMask]) -> None:
        with self._came:
            self.masks += [(mask.slot, mask.position) for mask in masks]
            self._came.notify_all()

    def wait_for(self, count: int) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.masks) >= count, PLENTY_S), self.masks


Opened = Callable[[Sequence[str]], tuple[GrammarSlots, Compiler, Sent]]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Slots whose requests have these grammars, and have drawn nothing."""
    slots: list[GrammarSlots] = []
    compilers: list[Compiler] = []

    def open_slots(texts: Sequence[str]) -> tuple[GrammarSlots, Compiler, Sent]:
        compiler, sent = Compiler(), Sent()
        grammars = GrammarSlots(compiler, sent)  # type: ignore[arg-type]  # what it asks of one
        slots.append(grammars)
        compilers.append(compiler)
        grammars.open(prompts(texts))
        return grammars, compiler, sent

    yield open_slots
    for compiler in compilers:
        compiler.may_compile.set()
        compiler.may_fill.set()
    for grammars in slots:
        grammars.close()


def words(token_id: int) -> Words:
    """The mask that allows one token."""
    found = np.zeros(mask_words(VOCAB_SIZE), np.uint32)
    found[token_id // 32] = np.uint32(1) << np.uint32(token_id % 32)
    return found.view(np.int32)


def prompts(texts: Sequence[str], draws: bool = False) -> StepPlan:
    """New owners of slots 0, 1, ... whose whole prompts are computed. draws: so are their first tokens."""
    length = PROMPT_LEN if draws else PROMPT_LEN - 1
    chunks = tuple(
        Chunk(
            slot=slot,
            start=0,
            length=length,
            draws=draws,
            init=SlotInit(PROMPT_LEN, 0, (), SamplerParams(), grammar=text),
        )
        for slot, text in enumerate(texts)
    )
    num_bytes = 4 * length * len(texts)
    return StepPlan(step_id=0, bucket=Bucket(64, 0), chunks=chunks, chunk_token_ids=bytes(num_bytes), planned_s=0.0)


def decodes(num_slots: int, num_tokens: int) -> StepPlan:
    """The step that draws the token behind so many of the output of each."""
    return StepPlan(
        step_id=1,
        bucket=Bucket(0, num_slots),
        decode_slots=pack_int32(list(range(num_slots))),
        decode_positions=pack_int32([PROMPT_LEN - 1 + num_tokens] * num_slots),
        planned_s=0.0,
    )


def until(reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PLENTY_S
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def first_draws(grammars: GrammarSlots, compiler: Compiler) -> tuple[list[Draw], list[Draw]]:
    """Those of the only slot's first token, which has its mask, and of its second."""
    until(lambda: len(compiler.filled) == 1)
    until(lambda: all(draw.mask is not None for draw in grammars.open(decodes(1, 0))))
    return grammars.open(decodes(1, 0)), grammars.open(decodes(1, 1))


def hold_fillers(grammars: GrammarSlots, compiler: Compiler) -> None:
    """No mask is made until they may fill."""
    for _ in range(FILLERS):
        grammars._filling.submit(compiler.may_fill.wait, PLENTY_S)


@pytest.mark.parametrize("is_owner", [True, False])
def test_a_mask_that_is_made_late_is_sent_unless_its_slot_has_another_owner(opened: Opened, is_owner: bool) -> None:
    grammars, compiler, sent = opened(["", "free", ""])
    grammars.judge([], [])
    compiler.may_compile.clear()
    draws = grammars.open(prompts(["", "", "x"], draws=True))
    assert [(draw.slot, draw.mask) for draw in draws] == [(2, None)]
    until(lambda: "x" in compiler.asked)
    if not is_owner:
        grammars.open(prompts(["", "", ""]))
    compiler.may_compile.set()
    if is_owner:
        sent.wait_for(1)
    else:
        until(lambda: ("x", 0) in compiler.given_back)
    grammars.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grammar-"):
            thread.join(PLENTY_S)
    assert sent.masks == ([(2, PROMPT_LEN)] if is_owner else [])


def test_no_step_waits_for_a_mask_and_a_mask_that_takes_long_delays_only_those_made_with_it(opened: Opened) -> None:
    texts = [f"{number:03}" for number in range(2 * FILLED_TOGETHER)]
    grammars, compiler, sent = opened(texts)
    until(lambda: len(compiler.filled) == len(texts))
    first = grammars.open(decodes(len(texts), 0))
    until(lambda: all(draw.mask is not None for draw in grammars.open(decodes(len(texts), 0))))
    ahead = grammars.open(decodes(len(texts), 1))
    sent.masks.clear()
    compiler.held = {texts[0]}
    assert grammars.judge(first, [0] * len(texts)) == Verdicts((), ())
    sent.wait_for(FILLED_TOGETHER)
    assert sorted(sent.masks) == [(slot, PROMPT_LEN + 1) for slot in range(FILLED_TOGETHER, len(texts))]
    begun_s = time.monotonic()
    again = grammars.open(decodes(len(texts), 1))
    assert time.monotonic() - begun_s < MOMENT_S
    assert [draw.mask is None for draw in again] == [slot < FILLED_TOGETHER for slot in range(len(texts))]
    # The tokens that came without one are looked at; that of a matcher at work is drawn once more.
    assert grammars.judge(ahead, [1] * len(texts)).refused == tuple(range(FILLED_TOGETHER))
    compiler.may_fill.set()
    sent.wait_for(2 * FILLED_TOGETHER)


def test_a_token_that_came_before_its_mask_is_looked_at_by_the_matcher_and_else_by_the_mask(opened: Opened) -> None:
    grammars, compiler, sent = opened(["a", "b"])
    until(lambda: len(compiler.filled) == 2)
    until(lambda: all(draw.mask is not None for draw in grammars.open(decodes(2, 0))))
    draws, ahead, behind = (grammars.open(decodes(2, num_tokens)) for num_tokens in range(3))
    assert grammars.judge(draws, [0, 0]) == Verdicts((), ())
    sent.wait_for(2)
    assert grammars.judge(ahead, [1, 5]).refused == (1,)
    assert [matcher.num_asked for matcher in compiler.matchers] == [0, 0]
    sent.wait_for(3)
    assert grammars.judge(behind, [2, 6]).refused == (1,), "it is behind one that was refused"
    # Both fillers are at work: the mask of slot 0 is due, its matcher is free.
    third = grammars.open(decodes(2, 3))
    until(lambda: third[0].grammar.mask is not None)
    hold_fillers(grammars, compiler)
    fourth, fifth = grammars.open(decodes(2, 4)), grammars.open(decodes(2, 5))
    assert grammars.judge(third, [3, 0]).refused == (1,)
    assert grammars.judge(fourth, [4, 0]).refused == (1,)
    assert grammars.judge(fifth, [0, 0]).refused == (0, 1)
    assert compiler.matchers[0].num_asked == 2
    num_filled, num_sent = len(compiler.filled), len(sent.masks)
    compiler.may_fill.set()
    sent.wait_for(num_sent + 1)
    assert compiler.filled[num_filled:] == [["a"]], "one mask behind both tokens"
    assert sent.masks[-1] == (0, PROMPT_LEN + 5)


@pytest.mark.parametrize("computes_for_others", [True, False])
def test_a_step_waits_for_a_grammar_in_the_making_if_it_computes_nothing_else(
    opened: Opened, computes_for_others: bool
) -> None:
    grammars, compiler, _ = opened([])
    compiler.may_compile.clear()
    texts = ["x", ""] if computes_for_others else ["x"]
    begun_s = time.monotonic()
    (draw,) = grammars.open(prompts(texts, draws=True))
    assert draw.mask is None
    assert (time.monotonic() - begun_s < MOMENT_S) == computes_for_others
    threading.Timer(0.2 * PATIENCE_S, compiler.may_compile.set).start()
    (draw,) = grammars.open(prompts(["y"], draws=True))
    assert draw.mask is not None


def test_masks_of_tokens_that_come_while_others_are_made_are_made_and_nobody_waits_for_ever(opened: Opened) -> None:
    """Slots are judged in another order at every step, and matchers are asked while masks are due."""
    num_slots, num_steps = 3 * FILLED_TOGETHER, 40
    grammars, compiler, _ = opened([f"{number:03}" for number in range(num_slots)])
    until(lambda: len(compiler.filled) == num_slots)
    masks_after = compiler.masks_after

    def slow(rows: Sequence[tuple[Any, Sequence[int]]]) -> list[Words | Exception]:
        time.sleep(0.001)
        return masks_after(rows)

    compiler.masks_after = slow  # type: ignore[method-assign]
    numbers = [0] * num_slots
    for step in range(num_steps):
        draws = [draw for num_tokens in set(numbers) for draw in grammars.open(decodes(num_slots, num_tokens))]
        draws = [draw for draw in draws if draw.position == PROMPT_LEN + numbers[draw.slot]]
        draws = draws[step % num_slots :] + draws[: step % num_slots]
        token_ids = [numbers[slot] for slot in range(num_slots)]
        refused = grammars.judge(draws, token_ids).refused
        for draw in draws:
            numbers[draw.slot] += draw.place not in refused
    assert min(numbers) > 0
    wanted = [(slot, PROMPT_LEN + numbers[slot]) for slot in range(num_slots)]
    until(lambda: all(draw.grammar.mask is not None for draw in draws))
    assert [(draw.slot, draw.grammar.position) for draw in sorted(draws)] == wanted


def test_a_token_is_no_grammars_next_because_its_matcher_is_broken(opened: Opened) -> None:
    """To a broken one the end of sequence is right everywhere."""
    grammars, compiler, sent = opened(["a"])
    draws, ahead = first_draws(grammars, compiler)
    hold_fillers(grammars, compiler)
    assert grammars.judge(draws, [0]) == Verdicts((), ())
    compiler.matchers[0].is_broken = True
    assert grammars.judge(ahead, [1]).refused == (0,)
    assert compiler.matchers[0].num_asked == 1
    compiler.may_fill.set()
    until(lambda: bool(draws[0].grammar.failure))
    assert sent.masks == []
    assert grammars.judge(ahead, [1]).failed == ((0, "too many states"),)


def test_a_matcher_that_was_anothers_and_is_at_its_end_is_replaced_by_a_new_one(opened: Opened) -> None:
    grammars, compiler, sent = opened([])
    compiler.used.append(Matcher("a"))
    (used,) = compiler.used
    grammars.open(prompts(["a"]))
    until(lambda: len(compiler.filled) == 1)
    until(lambda: all(draw.mask is not None for draw in grammars.open(decodes(1, 0))))
    assert compiler.matchers == []
    draws, ahead = (grammars.open(decodes(1, num_tokens)) for num_tokens in range(2))
    used.is_broken = True
    assert grammars.judge(draws, [0]) == Verdicts((), ())
    sent.wait_for(1)
    assert sent.masks == [(0, PROMPT_LEN + 1)]
    assert [matcher.num_followed for matcher in compiler.matchers] == [1]
    assert grammars.judge(ahead, [1]) == Verdicts((), ())


def test_masks_of_a_step_follow_the_older_ones_that_are_being_sent(opened: Opened) -> None:
    grammars, compiler, sent = opened(["a"])
    draws, ahead = first_draws(grammars, compiler)
    may_send, is_sending = threading.Event(), threading.Event()

    def send(masks: Sequence[LateMask]) -> None:
        is_sending.set()
        assert may_send.wait(PLENTY_S)
        sent(masks)

    grammars._send_late = send
    assert grammars.judge(draws, [0]) == Verdicts((), ())
    assert is_sending.wait(PLENTY_S)
    assert grammars.judge(ahead, [1]) == Verdicts((), ()), "it is the mask's, sent or not"
    until(lambda: ahead[0].grammar.mask is not None)
    found: list[Draw] = []
    opening = threading.Thread(target=lambda: found.extend(grammars.open(decodes(1, 2))))
    opening.start()
    opening.join(MOMENT_S)
    assert not found, "its mask would be on the device before an older one"
    may_send.set()
    opening.join(PLENTY_S)
    assert [draw.mask is not None for draw in found] == [True]
    assert sent.masks == [(0, PROMPT_LEN + 1)]


def test_a_late_mask_waits_for_the_draws_of_the_owner_before(opened: Opened) -> None:
    """They may be for the same position, and of a request without a grammar."""
    grammars, compiler, sent = opened([""])
    compiler.may_compile.clear()
    assert grammars.open(decodes(1, 0)) == []
    (draw,) = grammars.open(prompts(["x", ""], draws=True))
    compiler.may_compile.set()
    until(lambda: draw.grammar.mask is not None)
    grammars.judge([], [])
    time.sleep(MOMENT_S)
    assert sent.masks == [], "a step of before is under way"
    grammars.judge([], [])
    sent.wait_for(1)
    assert sent.masks == [(0, PROMPT_LEN)]
    assert grammars.judge([draw], [0]) == Verdicts((), ())


def test_a_draw_that_has_not_obeyed_its_mask_is_refused(opened: Opened) -> None:
    grammars, compiler, _ = opened(["a"])
    until(lambda: len(compiler.filled) == 1)
    until(lambda: all(draw.mask is not None for draw in grammars.open(decodes(1, 0))))
    draws = grammars.open(decodes(1, 0))
    assert grammars.judge(draws, [-1]) == Verdicts((), ()), "nothing could be drawn"
    assert grammars.judge(draws, [7]).refused == (0,)
    assert grammars.judge(draws, [0]) == Verdicts((), ())


def test_a_matcher_whose_slot_has_another_owner_is_given_back(opened: Opened) -> None:
    grammars, compiler, _ = opened(["a", "b"])
    until(lambda: len(compiler.filled) == 2)
    until(lambda: all(draw.mask is not None for draw in grammars.open(decodes(2, 0))))
    assert grammars.judge(grammars.open(decodes(2, 0)), [0, 0]) == Verdicts((), ())
    until(lambda: len(compiler.filled) == 3)
    grammars.open(prompts(["c"]))
    until(lambda: compiler.given_back == [("a", 1)])
    grammars.disown()
    until(lambda: len(compiler.given_back) == 3)
    assert sorted(compiler.given_back) == [("a", 1), ("b", 1), ("c", 0)]
