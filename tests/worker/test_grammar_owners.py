"""Grammars whose slots get another owner while they are compiled, filled or looked at, and those that end badly."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from graphgen.worker.grammars import COMPILERS, GrammarSlots, SlotGrammar, Verdicts
from tests.worker.test_grammar_slots import (
    PLENTY_S,
    Compiler,
    Matcher,
    Opened,
    decodes,
    first_draws,
    hold_fillers,
    prompts,
    until,
)
from tests.worker.test_grammar_slots import opened as _opened

opened = _opened


class HeldCompiler:
    """Makes a compiler hold up the grammars whose texts begin with "slow"."""

    def __init__(self, compiler: Compiler) -> None:
        self.asked: list[str] = []
        self.may_go_on = threading.Event()
        self._matcher = compiler.matcher
        compiler.matcher = self.matcher  # type: ignore[method-assign]

    def matcher(self, text: str) -> Matcher:
        self.asked.append(text)
        if text.startswith("slow"):
            assert self.may_go_on.wait(PLENTY_S)
        return self._matcher(text)


class RetiredBefore:
    """The lock of a matcher: whoever tries to get it finds that the slot has got another owner just before."""

    def __init__(self, grammars: GrammarSlots, compiler: Compiler, grammar: SlotGrammar) -> None:
        self._grammars, self._compiler = grammars, compiler
        self._lock = grammar.busy

    def acquire(self, blocking: bool = True) -> bool:
        assert not blocking
        self._grammars.open(prompts([""]))
        until(lambda: len(self._compiler.given_back) == 1)
        return self._lock.acquire(blocking)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Panic(BaseException):
    """As those of a library in Rust: no Exception."""


def test_a_token_is_looked_at_while_its_slot_gets_another_owner(opened: Opened) -> None:
    grammars, compiler, _ = opened(["a"])
    draws, ahead = first_draws(grammars, compiler)
    hold_fillers(grammars, compiler)
    assert grammars.judge(draws, [0]) == Verdicts((), ())
    grammar = ahead[0].grammar
    grammar.busy = RetiredBefore(grammars, compiler, grammar)  # type: ignore[assignment]  # the part that is used
    assert grammars.judge(ahead, [1]).refused == (0,)


def test_a_grammar_that_compiles_for_long_holds_up_one_thread_whoever_gets_its_slot(opened: Opened) -> None:
    grammars, compiler, _ = opened([])
    held = HeldCompiler(compiler)
    grammars.open(prompts(["slow"]))
    until(lambda: held.asked == ["slow"])
    grammars.open(prompts(["next"]))
    until(lambda: ["next"] in compiler.filled)
    held.may_go_on.set()
    until(lambda: ("slow", 0) in compiler.given_back)


def test_a_grammar_that_nobody_wants_any_more_is_not_compiled(opened: Opened) -> None:
    grammars, compiler, _ = opened([])
    held = HeldCompiler(compiler)
    busy = [f"slow {number}" for number in range(COMPILERS)]
    grammars.open(prompts(busy))
    until(lambda: len(held.asked) == COMPILERS)
    grammars.open(prompts([*busy, "unwanted"]))  # the first slots have new owners with equal grammars
    grammars.open(prompts([*busy, "last"]))
    held.may_go_on.set()
    until(lambda: ["last"] in compiler.filled)
    assert "unwanted" not in held.asked


@pytest.mark.parametrize("is_of_mask", [True, False])
def test_a_panic_ends_a_request_and_leaves_none_that_draws_for_ever(opened: Opened, is_of_mask: bool) -> None:
    grammars, compiler, _ = opened([])

    def panic(_: str | Sequence[Any]) -> Any:
        raise Panic("index out of bounds")

    setattr(compiler, "masks_after" if is_of_mask else "matcher", panic)
    draws = grammars.open(prompts(["x", ""], draws=True))
    until(lambda: grammars.judge(draws, [5, 5]).failed == ((0, "index out of bounds"),))


def test_what_ended_all_masks_of_a_call_is_no_limit_of_a_matcher_made_since(opened: Opened) -> None:
    """Between the failed call and what follows from it the next token is judged, its mask fails, too, and a new matcher
    is made."""
    grammars, compiler, _ = opened([])
    compiler.used.append(Matcher("a"))
    grammars.open(prompts(["a"]))
    until(lambda: all(draw.mask is not None for draw in grammars.open(decodes(1, 0))))
    draws, ahead, third = (grammars.open(decodes(1, num_tokens)) for num_tokens in range(3))
    grammar, masks_after, num_calls = draws[0].grammar, compiler.masks_after, 0

    def fail_twice(rows: Sequence[tuple[Any, Sequence[int]]]) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 2:
            return masks_after(rows)
        for matcher, token_ids in rows:
            matcher.follow(token_ids)
        raise ValueError("no memory")

    class Lock:
        """Of the matcher."""

        def __init__(self) -> None:
            self.lock, self.is_judged = grammar.busy, False

        def acquire(self, blocking: bool = True) -> bool:
            return self.lock.acquire(blocking)

        def release(self) -> None:
            self.lock.release()
            if num_calls == 1 and not self.is_judged:
                self.is_judged = True
                assert grammars.judge(ahead, [1]) == Verdicts((), ())
                until(lambda: grammar.is_new and grammar.mask is not None)

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    compiler.masks_after = fail_twice  # type: ignore[method-assign]
    grammar.busy = Lock()  # type: ignore[assignment]  # the part that is used
    assert grammars.judge(draws, [0]) == Verdicts((), ())
    until(lambda: num_calls >= 4 or bool(grammar.failure))
    assert not grammar.failure
    until(lambda: grammar.mask is not None)
    assert grammars.judge(third, [2]) == Verdicts((), ())
