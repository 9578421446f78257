"""The gap between a request's first two tokens, which is all that a moving average has yet."""

import itertools

import numpy as np
import pytest

from graphgen.ipc.messages import Bucket
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.budget import StepBudget, StepLoad
from graphgen.scheduler.cost_model import CostModel, prompt_pairs
from graphgen.scheduler.decodes import DecodeSet
from graphgen.scheduler.objectives import OBJECTIVES
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.tenants import Tenant
from tests.scheduler.harness import make_submit
from tests.scheduler.virtual_time import VirtualEngine, full_step_ms, table

PROMPT_LEN = 40


@pytest.mark.parametrize("is_first_gap", [False, True])
def test_it_is_judged_by_a_bound_that_hardly_any_step_exceeds(is_first_gap: bool) -> None:
    buckets = BucketTable(VirtualEngine(token_budget=1024).buckets, 1024)
    model = CostModel(table(VirtualEngine(token_budget=1024).buckets, full_step_ms))
    budget = StepBudget(buckets, model, 2, OBJECTIVES["balanced"])
    num_decodes, positions = 16, 16 * 1024

    def chosen(target_ms: float | None) -> Bucket | None:
        load = StepLoad(num_decodes, positions, target_ms, is_first_gap, None, None, (), 10**6, False)
        return budget.choose(load)

    sizes = buckets.mixed(num_decodes)[3:]
    assert len(sizes) >= 3
    for smaller, bucket in itertools.pairwise(sizes):
        pairs = prompt_pairs(0, bucket.prefill_rows)
        usual_ms, sure_ms = (model.bound_ms(bucket, positions, pairs, is_sure=is_sure) for is_sure in (False, True))
        assert usual_ms is not None
        assert sure_ms is not None
        assert chosen(sure_ms) == bucket
        assert chosen(usual_ms) == (smaller if is_first_gap else bucket)


def joined(decodes: DecodeSet, number: int, target_ms: float | None, num_output: int = 0) -> RunningRequest:
    """One that decodes from the next plan on, when it has that many tokens besides the one that is drawn."""
    submit = make_submit(number, [1] * PROMPT_LEN, 100, itl_target_ms=target_ms)
    request = Request(submit, number, 0.0, 16, Tenant("", 1000))
    running = RunningRequest(request, number, [], PROMPT_LEN, is_reserved=False, is_long=False)
    decodes.join(running, PROMPT_LEN + num_output)
    return running


def test_it_is_known_for_the_one_plan_that_draws_the_second_token() -> None:
    decodes = DecodeSet(16)
    assert not decodes.has_first_gap
    joined(decodes, 0, 20.0)
    assert decodes.has_first_gap
    decodes.advance()
    assert not decodes.has_first_gap


@pytest.mark.parametrize(
    ("target_ms", "num_output", "expected"),
    [(20.0, 0, True), (10.0, 0, True), (30.0, 0, False), (None, 0, False), (20.0, 5, False)],
    ids=["as tight", "tighter", "looser", "no target", "it goes on after a preemption"],
)
def test_only_one_with_the_tightest_target_counts(target_ms: float | None, num_output: int, expected: bool) -> None:
    decodes = DecodeSet(16)
    joined(decodes, 0, 20.0)
    decodes.advance()
    joined(decodes, 1, target_ms, num_output)
    assert decodes.has_first_gap is expected


def test_the_policy_asks_for_it_in_just_those_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine(num_slots=8)
    said: list[bool] = []
    choose = StepBudget.choose

    def choose_noted(budget: StepBudget, load: StepLoad) -> Bucket | None:
        said.append(load.is_first_gap)
        return choose(budget, load)

    monkeypatch.setattr(StepBudget, "choose", choose_noted)
    for _ in range(40):
        engine.send(1200, 20, itl_target_ms=14.0)
    engine.run()
    with_prompts = [plan for plan in engine.plans if plan.chunks]
    expected = [1200 in np.frombuffer(plan.decode_positions, np.int32) for plan in with_prompts]
    assert said[: len(expected)] == expected
    assert 10 < sum(expected) < len(expected)
