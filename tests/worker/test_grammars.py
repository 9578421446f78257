"""Grammars in the worker, with the policy and two steps in flight: the tokens are those of a reference that masks the
logits of one request step by step, whatever is late, preempted or beside it."""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from graphgen.calls.structured import Choice, JsonSchema, Regex
from graphgen.capture.buffers import Words
from graphgen.demo import model_folder
from graphgen.ipc.worker_messages import SamplerParams, SlotInit
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.sampling import Sampler, make_sampler, pack_slot
from graphgen.requests.grammar_builder import Job, build
from graphgen.worker.grammar_compiler import MAX_FILLING_THREADS, GrammarCompiler, num_filling_threads
from graphgen.worker.grammars import PATIENCE_S
from graphgen.worker.mask_copies import MaskCopies
from tests.models.driver import Driver
from tests.worker.local_engine import LocalEngine, demo_tokenizer, launch_config

EOS = 0
MAX_TOKENS = 24
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMARS = [build(Job(one)) for one in (JsonSchema(RECORD), Regex("[abc ]{18,60}"), Choice(["yes", "no"]))]
PROMPTS = [[10 + number, 300, 77, 5 * number + 1] * 3 for number in range(6)]
SAMPLERS = [
    SamplerParams(),
    SamplerParams(temperature=0.9, seed=5),
    SamplerParams(temperature=1.0, top_k=8, seed=6),
    SamplerParams(temperature=0.8, top_p=0.9, min_p=0.01, seed=7),
    SamplerParams(frequency_penalty=1.5, presence_penalty=0.2),
    SamplerParams(repetition_penalty=1.3, frequency_penalty=0.5),
]


def open_engine() -> LocalEngine:
    return LocalEngine(launch_config(model_folder(), 128, device="cpu", token_budget=64, num_pages=80))


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    engine = open_engine()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    """By request: prompt, sampler and grammar number i of each list, in turn."""
    reference = Reference()
    return [reference.tokens(prompt, SAMPLERS[number], grammar_of(number)) for number, prompt in enumerate(PROMPTS)]


def grammar_of(number: int) -> str:
    return GRAMMARS[number % len(GRAMMARS)]


class Reference:
    """One token after the other, each under a mask made by a new matcher that has followed all tokens."""

    def __init__(self) -> None:
        spec = load_spec(str(model_folder()))
        self._decoder = load_decoder(model_folder(), spec, torch.float32, torch.device("cpu"))
        self._vocab_size = spec.num_drawable
        self._compiler = GrammarCompiler(spec.num_drawable, (EOS,), demo_tokenizer)
        self._compiler.prepare()

    @torch.inference_mode()
    def tokens(self, prompt: Sequence[int], params: SamplerParams, grammar: str) -> list[int]:
        driver = Driver(self._decoder, page_size=128, num_pages=8)
        sampler, slot = make_sampler(1, self._vocab_size, torch.device("cpu")), torch.zeros(1, dtype=torch.int32)
        row = torch.from_numpy(pack_slot(SlotInit(len(prompt), 0, (), params), self._vocab_size))
        sampler.write_slots(row, slot, torch.ones(1, dtype=torch.int32))
        request, tokens = driver.request(prompt), list(prompt)
        logits = driver.step([(request, len(prompt))])[0][-1:]
        sampler.count_inputs(torch.tensor(prompt), slot.expand(len(prompt)), torch.arange(len(prompt)))
        while True:
            (mask,) = self._compiler.masks_after([(self._compiler.matcher(grammar), tokens[len(prompt) :])])
            assert not isinstance(mask, Exception), mask
            at = torch.tensor([len(tokens)], dtype=torch.int32)
            sampler.write_masks(torch.cat((slot, at, torch.from_numpy(mask))), 1)
            token = int(sampler.sample(logits, slot, torch.tensor([len(tokens)])))
            tokens.append(token)
            request.token_ids.append(token)
            if token == EOS or len(tokens) == len(prompt) + MAX_TOKENS:
                return tokens[len(prompt) :]
            sampler.count_inputs(torch.tensor([token]), slot, torch.tensor([len(tokens) - 1]))
            logits = driver.step(decodes=[request])[0]


def generate(engine: LocalEngine, **more: Any) -> list[list[int]]:
    grammars = [grammar_of(number) for number in range(len(PROMPTS))]
    return engine.generate(PROMPTS, MAX_TOKENS, SAMPLERS, (EOS,), grammars=grammars, **more)


def test_tokens_are_those_of_the_reference_that_masks_step_by_step(
    engine: LocalEngine, wanted: list[list[int]]
) -> None:
    assert generate(engine) == wanted
    assert any(tokens[-1] == EOS for tokens in wanted)


def test_a_preempted_request_goes_on_where_its_grammar_was(engine: LocalEngine, wanted: list[list[int]]) -> None:
    for steps in (1, 12):
        before = engine.scheduler.counters.preemptions
        assert generate(engine, preempt_after=steps) == wanted
        assert engine.scheduler.counters.preemptions > before


def test_neighbours_without_a_grammar_get_the_tokens_that_they_get_alone(
    engine: LocalEngine, wanted: list[list[int]]
) -> None:
    """In the slots of those that had one, too."""
    free = engine.generate(PROMPTS, MAX_TOKENS, SAMPLERS, (EOS,))
    for offset in (0, 1):
        grammars = [grammar_of(number) if number % 2 == offset else "" for number in range(len(PROMPTS))]
        mixed = engine.generate(PROMPTS, MAX_TOKENS, SAMPLERS, (EOS,), grammars=grammars)
        assert mixed == [wanted[number] if grammar else free[number] for number, grammar in enumerate(grammars)]
    assert engine.generate(PROMPTS, MAX_TOKENS, SAMPLERS, (EOS,)) == free


def test_draws_whose_masks_come_too_late_are_repeated_and_nobody_waits(
    engine: LocalEngine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks_after, calls = GrammarCompiler.masks_after, []

    def slow(self: GrammarCompiler, rows: Sequence[tuple[Any, Sequence[int]]]) -> list[Words | Exception]:
        calls.append(threading.current_thread().name)
        time.sleep(0.0 if len(calls) % 3 else 1.4 * PATIENCE_S)
        return masks_after(self, rows)

    monkeypatch.setattr(GrammarCompiler, "masks_after", slow)
    (free,) = engine.generate(PROMPTS[:1], MAX_TOKENS, SAMPLERS[:1], (EOS,))
    before = engine.num_refused
    grammars = ["", *(grammar_of(number) for number in range(len(PROMPTS)))]
    found = engine.generate([PROMPTS[0], *PROMPTS], MAX_TOKENS, [SAMPLERS[0], *SAMPLERS], (EOS,), grammars=grammars)
    assert found == [free, *wanted]
    assert engine.num_refused > before
    assert not [name for name in calls if not name.startswith("grammar-")]


def test_masks_overtake_the_steps_that_were_launched_without_them(
    engine: LocalEngine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps last longer than masks: hardly a draw is refused."""
    sample, nums_refused = Sampler.sample, []

    def long(self: Sampler, *arguments: Any) -> Tensor:
        time.sleep(0.1)
        return sample(self, *arguments)

    monkeypatch.setattr(Sampler, "sample", long)
    for sends in (True, False):
        if not sends:
            monkeypatch.setattr(MaskCopies, "send_late", lambda self, masks: None)
            engine = open_engine()
        before = engine.num_refused
        assert generate(engine) == wanted
        nums_refused.append(engine.num_refused - before)
    engine.close()
    assert nums_refused[0] < nums_refused[1] / 2


def test_the_masks_that_follow_from_one_step_are_made_together(
    engine: LocalEngine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks_after, nums_rows = GrammarCompiler.masks_after, []

    def counting(self: GrammarCompiler, rows: Sequence[tuple[Any, Sequence[int]]]) -> list[Words | Exception]:
        nums_rows.append(len(rows))
        return masks_after(self, rows)

    monkeypatch.setattr(GrammarCompiler, "masks_after", counting)
    assert generate(engine) == wanted
    assert max(nums_rows) > 1


def test_masks_made_together_are_those_made_alone_and_one_that_cannot_go_on_spoils_no_other() -> None:
    compiler = GrammarCompiler(load_spec(str(model_folder())).num_drawable, (EOS,), demo_tokenizer)
    compiler.prepare()
    one, other = GRAMMARS[0], GRAMMARS[1]
    a, brace = (next(iter(_ids_of(text))) for text in ("a", "{"))
    cases = [(one, []), (other, [a]), (one, [a]), (other, [a, a]), (one, [brace]), (other, [a, brace])]
    alone = [compiler.masks_after([(compiler.matcher(text), ids)])[0] for text, ids in cases]
    together = compiler.masks_after([(compiler.matcher(text), ids) for text, ids in cases])
    assert [isinstance(mask, Exception) for mask in alone] == [False, False, True, False, False, True]
    for mask, same in zip(together, alone, strict=True):
        if isinstance(same, Exception):
            assert str(mask) == str(same)
        else:
            assert not isinstance(mask, Exception)
            assert mask.tolist() == same.tolist()


def _ids_of(text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_str(demo_tokenizer().backend).encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (16, 8), (192, 16)])
def test_masks_leave_half_the_cores_to_others(num_cores: int, num_threads: int) -> None:
    assert num_filling_threads(num_cores) == num_threads <= MAX_FILLING_THREADS


def test_the_tokenizer_of_grammars_is_made_before_ready_and_never_after(engine: LocalEngine) -> None:
    """Making one holds the interpreter, and with it every step."""
    assert "grammars" in [phase.name for phase in engine.runner.describe().phases]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrammarCompiler, "_make_tokenizer", lambda *_: pytest.fail("made while requests are served"))
        (tokens,) = engine.generate(PROMPTS[2:3], MAX_TOKENS, SAMPLERS[:1], (EOS,), grammars=[GRAMMARS[2]])
    assert tokens


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(
    engine: LocalEngine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, masks_after = GrammarCompiler.matcher, GrammarCompiler.masks_after
    begun: dict[int, bool] = {}  # matchers of the second request's grammar: whether one has made its first mask

    def noting(self: GrammarCompiler, text: str) -> Any:
        made = make(self, text)
        if text == grammar_of(1):
            begun[id(made)] = False
        return made

    def failing(self: GrammarCompiler, rows: Sequence[tuple[Any, Sequence[int]]]) -> list[Words | Exception]:
        found = masks_after(self, rows)
        for row, (matcher, _) in enumerate(rows):
            if begun.get(id(matcher)):
                found[row] = ValueError("too many states")
            elif id(matcher) in begun:
                begun[id(matcher)] = True
        return found

    monkeypatch.setattr(GrammarCompiler, "matcher", noting)
    monkeypatch.setattr(GrammarCompiler, "used_matcher", lambda self, text: None)
    monkeypatch.setattr(GrammarCompiler, "masks_after", failing)
    grammars = [grammar_of(number) for number in range(3)]
    found = engine.generate(PROMPTS[:3], MAX_TOKENS, SAMPLERS[:3], (EOS,), grammars=grammars)
    (rejected,) = engine.rejected
    assert rejected.error == "InvalidRequestError"
    said = re.fullmatch(r"after ([1-3]) tokens of output its grammar cannot go on: too many states", rejected.message)
    assert said, rejected.message
    assert [found[0], found[2]] == [wanted[0], wanted[2]]
    assert found[1] == wanted[1][: int(said[1])]
    monkeypatch.undo()
    found = engine.generate(PROMPTS[:1], MAX_TOKENS, SAMPLERS[:1], (EOS,), grammars=["start: nothing"])
    assert found == [[]]
    assert "unknown name" in engine.rejected[1].message
    assert engine.scheduler.pages_free == engine.scheduler.pages_total
