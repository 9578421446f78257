"""What the step log says of a run: planning overlaps execution, decodes never wait, steps stay in the budget."""

from pathlib import Path

import pytest

from graphgen import Engine, SamplingParams
from tests import step_logs

NUM_REQUESTS = 64
TOKEN_BUDGET = 128
NEW_TOKENS = 24


@pytest.mark.alone
def test_plans_arrive_before_the_step_before_them_ends_and_every_token_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    prompts = [[100 + number] * (1 + 3 * number) for number in range(NUM_REQUESTS)]
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with Engine(device="cpu", token_budget=TOKEN_BUDGET, step_log=str(log), cpu_threads=1) as engine:
        engine.generate(prompts, sampling)
        stats = engine.stats()
    steps = step_logs.read(log)
    assert len(steps) == stats.steps
    assert step_logs.share_received_in_time(steps) >= 0.95

    computed = dict.fromkeys(range(NUM_REQUESTS), 0)
    decoding: set[int] = set()
    for step in steps:
        live = step.chunk_tokens + len(step.decodes)
        assert live + step.padding == sum(step.bucket) <= TOKEN_BUDGET
        assert decoding <= set(step.decodes), "a decode was skipped"
        for request, start, length in step.chunks:
            assert start == computed[request], "chunks of a prompt follow each other"
            computed[request] += length
        decoding |= {request for request, _, _ in step.chunks if computed[request] == len(prompts[request])}
        for request in step.decodes:
            computed[request] += 1
            if computed[request] == len(prompts[request]) + NEW_TOKENS - 1:
                decoding.discard(request)
        times = [step.planned_s, step.received_s, step.launched_s]
        assert times == sorted(times)
        assert step.started_s <= step.finished_s
    assert computed == {number: len(prompt) + NEW_TOKENS - 1 for number, prompt in enumerate(prompts)}
