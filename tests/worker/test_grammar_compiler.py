"""Matchers of equal grammars have nothing to do with each other, whether they are new or were used before."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from graphgen.calls.structured import Choice, JsonSchema
from graphgen.capture.buffers import Words
from graphgen.demo import model_folder
from graphgen.models.families import load_spec
from graphgen.requests.grammar_builder import Job, build
from graphgen.worker import grammar_compiler
from graphgen.worker.grammar_compiler import MAX_KEPT, MAX_REUSED_TOKENS, GrammarCompiler, is_sound
from graphgen.worker.grammars import is_in_mask
from tests.worker.local_engine import demo_tokenizer

EOS = 0
VOCAB_SIZE = load_spec(str(model_folder())).num_drawable
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "tags": {"type": "array", "items": {"enum": ["alpha", "alphabet", "beta"]}},
        "size": {"type": "number", "minimum": 0},
    },
    "required": ["name", "tags", "size"],
}
LONG = build(Job(JsonSchema({"type": "string", "minLength": 5000})))
SHORT = build(Job(Choice(["yes", "no"])))
NUM_STATES = 3000
"""Fewer than LONG's texts of some hundred tokens take."""


@pytest.fixture
def compiler() -> GrammarCompiler:
    made = GrammarCompiler(VOCAB_SIZE, (EOS,), demo_tokenizer)
    made.prepare()
    return made


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    from llguidance import LLParserLimits

    monkeypatch.setattr(grammar_compiler, "parser_limits", lambda: LLParserLimits(max_lexer_states=NUM_STATES))


def follow(compiler: GrammarCompiler, matcher: Any, most: int, seed: int = 0) -> tuple[list[Words], list[int]]:
    """The masks and the tokens until the end, the limit, or so many."""
    chance = random.Random(seed)
    masks: list[Words] = []
    token_ids: list[int] = []
    while len(token_ids) < most and EOS not in token_ids:
        (mask,) = compiler.masks_after([(matcher, token_ids[-1:])])
        if isinstance(mask, Exception):
            break
        masks.append(mask)
        token_ids.append(chance.choice([token_id for token_id in range(VOCAB_SIZE) if is_in_mask(mask, token_id)]))
    return masks, token_ids


def equal(some: Sequence[Words], others: Sequence[Words]) -> bool:
    return [mask.tolist() for mask in some] == [mask.tolist() for mask in others]


@pytest.mark.usefixtures("few_states")
def test_a_request_that_comes_to_a_limit_takes_nothing_from_one_with_an_equal_grammar(
    compiler: GrammarCompiler,
) -> None:
    one, other = compiler.matcher(LONG), compiler.matcher(LONG)
    before, _ = follow(compiler, one, 2000)
    assert 10 < len(before) < 2000
    assert not is_sound(one)
    after, token_ids = follow(compiler, other, len(before))
    assert equal(after, before)
    assert EOS not in token_ids


@pytest.mark.usefixtures("few_states")
def test_a_matcher_at_its_limit_does_not_allow_the_end_of_sequence(compiler: GrammarCompiler) -> None:
    for seed in range(20):
        matcher = compiler.matcher(LONG)
        _, token_ids = follow(compiler, matcher, 2000, seed)
        assert EOS not in token_ids
        (mask,) = compiler.masks_after([(matcher, [])])
        assert isinstance(mask, ValueError)
        assert "<" not in str(mask), "the matcher's state"


@pytest.mark.parametrize(("text", "num_tokens"), [(LONG, 30), (SHORT, 10), (SHORT, 0)])
def test_a_matcher_that_was_given_back_is_as_a_new_one(compiler: GrammarCompiler, text: str, num_tokens: int) -> None:
    used = compiler.matcher(text)
    _, before = follow(compiler, used, num_tokens, seed=1)
    compiler.masks_after([(used, before[-1:])])  # the last of them, too
    compiler.give_back(text, used, num_tokens)
    assert compiler.used_matcher("another") is None
    assert compiler.used_matcher(text) is used
    assert compiler.used_matcher(text) is None
    again, new = follow(compiler, used, 40), follow(compiler, compiler.matcher(text), 40)
    assert again[1] == new[1]
    assert equal(again[0], new[0])


@pytest.mark.usefixtures("few_states")
def test_what_is_kept_is_sound_and_no_more_than_may_be(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = compiler.matcher(LONG)
    follow(compiler, broken, 2000)
    compiler.give_back(LONG, broken, 10)
    compiler.give_back(SHORT, compiler.matcher(SHORT), MAX_REUSED_TOKENS)
    assert compiler.used_matcher(LONG) is None
    assert compiler.used_matcher(SHORT) is None
    matchers = [compiler.matcher(SHORT) for _ in range(MAX_KEPT + 1)]
    for matcher in matchers:
        compiler.give_back(SHORT, matcher, 0)
    kept = [compiler.used_matcher(SHORT) for _ in range(MAX_KEPT + 1)]
    assert kept == [*reversed(matchers[1:]), None]
    monkeypatch.setattr(grammar_compiler, "MAX_KEPT_CHARACTERS", len(SHORT) + len(LONG) - 1)
    compiler.give_back(SHORT, compiler.matcher(SHORT), 0)
    compiler.give_back(LONG, compiler.matcher(LONG), 0)
    assert compiler.used_matcher(SHORT) is None
    assert compiler.used_matcher(LONG) is not None


@pytest.mark.parametrize("text", [LONG, SHORT, build(Job(JsonSchema(SCHEMA)))], ids=["long", "short", "object"])
def test_a_token_is_allowed_before_its_mask_is_made_if_the_mask_will_allow_it(
    compiler: GrammarCompiler, text: str
) -> None:
    """Else what is drawn would depend on which of them comes first."""
    for seed in range(2):
        matcher = compiler.matcher(text)
        behind: list[int] = []
        for _ in range(20):
            asked = [
                compiler.allows(matcher, behind if token_id == 1 else (), token_id)
                for token_id in range(1, VOCAB_SIZE)  # without the end of sequence, which may be refused
            ]
            (mask,) = compiler.masks_after([(matcher, ())])
            assert not isinstance(mask, Exception)
            assert asked == [is_in_mask(mask, token_id) for token_id in range(1, VOCAB_SIZE)]
            behind = [random.Random(f"{seed} {len(behind)}").choice([*np.flatnonzero([False, *asked]), EOS])]
            if EOS in behind or not any(asked):
                break


def test_a_token_that_the_tokenizer_does_not_have_breaks_no_matcher(compiler: GrammarCompiler) -> None:
    """Models may draw more tokens than their tokenizers have."""
    matcher = compiler.matcher(SHORT)
    assert not compiler.allows(matcher, (), VOCAB_SIZE)
    assert is_sound(matcher)
