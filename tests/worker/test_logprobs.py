"""Log-probabilities against transformers in float32: of outputs and prompts, at every split, in company, after a
preemption; and asking for them changes no token."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graphgen.calls.logprobs import pack
from graphgen.ipc.step_schema import MAX_SCORED_ROWS, num_scored_rows
from graphgen.ipc.worker_messages import SamplerParams, StepPlan
from graphgen.worker.runner import LaunchedStep
from tests.models import tiny
from tests.worker.local_engine import Asks, LocalEngine, launch_config

NEW_TOKENS = 6
RNG = random.Random(4)
LENGTHS = (1, 2, 16, 17, 47, 90, 331)
PROMPTS = [[RNG.randrange(3, tiny.SMALL["vocab_size"]) for _ in range(length)] for length in LENGTHS]
ASKS: list[Asks] = [(0, 20), (20, 0), (None, 3), (3, None), (None, None), (5, 1), (20, 2)]
SAMPLERS = [
    SamplerParams(),
    SamplerParams(temperature=0.7, top_k=5, seed=1),
    SamplerParams(temperature=1.5, top_p=0.8, seed=2),
    SamplerParams(repetition_penalty=1.3, frequency_penalty=0.5),
    SamplerParams(),
    SamplerParams(temperature=1.0, min_p=0.1, presence_penalty=1.0, seed=3),
    SamplerParams(),
]


def make_engine(folder: Path, token_budget: int, num_pages: int = 200) -> LocalEngine:
    config = launch_config(folder, 400, device="cpu", token_budget=token_budget, num_pages=num_pages, dtype="float32")
    return LocalEngine(config)


def assert_right(logprobs: Tensor, token_ids: list[int], num_top: int | None, packed: bytes) -> None:
    """logprobs: [len(token_ids), V], what transformers says in the place of each."""
    if num_top is None:
        assert packed == b""
        return
    found = pack(num_top, tuple(token_ids), packed, lambda token_id: b"")
    assert len(found.values) == len(token_ids) * 4 * (2 + 2 * num_top)
    for row, one in zip(logprobs, found, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        better = int((row > row[one.token_id] + 1e-4).sum())
        assert better < one.rank <= 1 + int((row > row[one.token_id] - 1e-4).sum())
        assert torch.allclose(torch.tensor([top.logprob for top in one.top]), row.topk(num_top).values, atol=1e-4)
        assert [top.logprob for top in one.top] == pytest.approx(row[[top.token_id for top in one.top]], abs=1e-4)
        if one.rank <= num_top:
            assert (one.token_id, one.logprob) == (one.top[one.rank - 1].token_id, one.top[one.rank - 1].logprob)


def assert_all_right(model: tiny.HuggingFaceModel, engine: LocalEngine, tokens: list[list[int]]) -> None:
    """Of everything that the engine said in its only call."""
    for number, (prompt, (num_top, of_prompt)) in enumerate(zip(PROMPTS, ASKS, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens[number]]]), use_cache=False).logits[0].float()
        logprobs = logits.log_softmax(-1)
        own = [output for output in engine.outputs if output.request_id == number]
        last = len(prompt) - 1
        assert_right(logprobs[:last], prompt[1:], of_prompt, b"".join(one.prompt_logprobs for one in own))
        assert_right(logprobs[last:-1], tokens[number], num_top, b"".join(one.logprobs for one in own))


@pytest.mark.parametrize(
    ("case", "token_budget"),
    [("llama", 16), ("llama", 512), ("gemma2", 48), ("qwen3_moe", 48), ("gpt2", 64)],
)
def test_they_are_those_of_transformers_at_every_split(case: str, token_budget: int, tmp_path: Path) -> None:
    model = tiny.save(case, tmp_path)
    engine = make_engine(tmp_path, token_budget)
    tokens = engine.generate(PROMPTS, NEW_TOKENS, SAMPLERS, asks=ASKS)
    engine.close()
    assert_all_right(model, engine, tokens)


def test_asking_changes_no_token_and_preempted_requests_get_them_all(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path)
    plain = make_engine(tmp_path, 64)
    expected = plain.generate(PROMPTS, NEW_TOKENS, SAMPLERS)
    plain.close()
    assert all(not output.logprobs and not output.prompt_logprobs for output in plain.outputs)
    for preempt_after in (1, 5, 9):
        engine = make_engine(tmp_path, 64, num_pages=36)
        tokens = engine.generate(PROMPTS, NEW_TOKENS, SAMPLERS, asks=ASKS, preempt_after=preempt_after)
        engine.close()
        assert engine.scheduler.counters.preemptions > 0
        assert tokens == expected
        assert_all_right(model, engine, tokens)


def test_a_step_scores_no_more_rows_than_it_may_and_computes_others_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save("llama", tmp_path)
    engine = make_engine(tmp_path, 400)
    steps = []
    launch = engine.runner.launch

    def watched(plan: StepPlan, received_s: float) -> LaunchedStep:
        steps.append((num_scored_rows(plan), sum(chunk.length for chunk in plan.chunks)))
        return launch(plan, received_s)

    monkeypatch.setattr(engine.runner, "launch", watched)
    engine.generate([PROMPTS[6], PROMPTS[5]], 1, asks=[(None, 0), (None, None)])
    engine.close()
    assert steps == [(MAX_SCORED_ROWS, MAX_SCORED_ROWS + 90), (331 - 1 - MAX_SCORED_ROWS, 331 - MAX_SCORED_ROWS)]
