"""A request that goes on at another engine gets the tokens and log-probabilities, in float32, that it would have got at
the first one: greedy and seeded, with penalties, grammars and a page pool that is too small."""

import pytest

from graphgen.calls.logprobs import pack
from graphgen.calls.structured import JsonSchema, Regex
from graphgen.demo import model_folder
from graphgen.ipc.step_schema import WORD_BYTES, logprob_words
from graphgen.ipc.worker_messages import SamplerParams
from graphgen.requests.grammar_builder import Job, build
from tests.worker.local_engine import Asks, LocalEngine, launch_config

MAX_TOKENS = 20
SAMPLERS = [
    SamplerParams(),
    SamplerParams(temperature=0.9, seed=5),
    SamplerParams(temperature=1.0, top_k=8, top_p=0.9, seed=6),
    SamplerParams(presence_penalty=0.8, temperature=0.7, seed=8),
    SamplerParams(frequency_penalty=1.5),
    SamplerParams(repetition_penalty=1.3, temperature=0.8, min_p=0.01, seed=7),
    SamplerParams(temperature=0.9, seed=9),
    SamplerParams(),
]
PROMPTS = [[10 + number, 300, 77, 5 * number + 1] * (1 + 5 * number) for number in range(len(SAMPLERS))]
GRAMMARS = [
    "",
    "",
    "",
    "",
    "",
    "",
    *(build(Job(one)) for one in (JsonSchema({"type": "integer"}), Regex("[abc ]{18,60}"))),
]
ASKS: list[Asks] = [(None, None), (2, None), (0, 1), (None, 3), (None, None), (1, None), (None, None), (3, None)]


def make_engine(num_pages: int) -> LocalEngine:
    config = launch_config(
        model_folder(), 256, device="cpu", token_budget=64, page_size=8, num_pages=num_pages, dtype="float32"
    )
    return LocalEngine(config)


def logprobs_of(engine: LocalEngine, first_id: int) -> list[bytes]:
    """Of the tokens of each request, those since its first_id."""
    found = [b""] * len(PROMPTS)
    for output in engine.outputs:
        if output.request_id >= first_id:
            found[output.request_id - first_id] += output.logprobs
    return found


def assert_near(num_top: int | None, whole: bytes, rest: bytes, token_ids: list[int], num_had: int) -> None:
    """rest: log-probabilities of the tokens behind the first num_had; whole: of all of them, by the first engine."""
    if num_top is None:
        assert rest == b""
        return
    num_bytes = num_had * WORD_BYTES * logprob_words(num_top)
    pairs = zip(
        *(pack(num_top, tuple(token_ids[num_had:]), one, no_bytes) for one in (whole[num_bytes:], rest)), strict=True
    )
    for one, other in pairs:
        assert one.rank == other.rank
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [top.token_id for top in one.top] == [top.token_id for top in other.top]


def no_bytes(token_id: int) -> bytes:
    return b""


@pytest.mark.parametrize(("num_pages", "preempt_after"), [(200, None), (40, 9)])
def test_tokens_and_logprobs_are_those_of_an_undisturbed_run(num_pages: int, preempt_after: int | None) -> None:
    first, second = make_engine(200), make_engine(num_pages)
    tokens = first.generate(PROMPTS, MAX_TOKENS, SAMPLERS, (0,), asks=ASKS, grammars=GRAMMARS)
    whole = logprobs_of(first, 0)
    num_had = [min(3 + 2 * number, len(tokens[number]) - 1) for number in range(len(PROMPTS))]
    had = [output[:count] for output, count in zip(tokens, num_had, strict=True)]
    rest = second.generate(
        PROMPTS,
        MAX_TOKENS,
        SAMPLERS,
        (0,),
        preempt_after=preempt_after,
        asks=ASKS,
        grammars=GRAMMARS,
        emitted=had,
    )
    assert [one + more for one, more in zip(had, rest, strict=True)] == tokens
    for number, more in enumerate(logprobs_of(second, 0)):
        assert_near(ASKS[number][0], whole[number], more, tokens[number], num_had[number])
    assert not any(output.prompt_logprobs for output in second.outputs)
    first.close()
    second.close()
