"""The gap between a request's first two tokens, which is all that a moving average has yet."""

import itertools

import numpy as np
import pytest

from graphgen.ipc.attended import Attended
from graphgen.ipc.worker_messages import Bucket, StepPlan
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.budget import StepBudget, StepLoad
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.decodes import DecodeSet
from graphgen.scheduler.objectives import OBJECTIVES
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.tenants import Tenant
from tests.scheduler.harness import make_submit
from tests.scheduler.virtual_time import VirtualEngine, full_step_ms, table

PROMPT_LEN = 40


NUM_DECODES, POSITIONS = 16, 16 * 1024


def budget_of(token_budget: int = 1024) -> tuple[StepBudget, BucketTable, CostModel]:
    buckets = VirtualEngine(token_budget=token_budget, num_slots=16).buckets
    model = CostModel(table(buckets, full_step_ms))
    by_rows = BucketTable(buckets, token_budget)
    return StepBudget(by_rows, model, 2, OBJECTIVES["balanced"]), by_rows, model


def load_of(num_decodes: int, target_ms: float, first_gap_ms: float | None) -> StepLoad:
    return StepLoad(num_decodes, num_decodes * 1024, target_ms, first_gap_ms, None, None, (), 10**6, False)


def bounds_ms(model: CostModel, bucket: Bucket) -> tuple[float, float]:
    """What 95 and 99.9 % of its steps stay within."""
    attended = Attended(POSITIONS).with_chunk(0, bucket.prefill_rows)
    usual_ms, sure_ms = (model.bound_ms(bucket, attended, is_sure=is_sure) for is_sure in (False, True))
    assert usual_ms is not None
    assert sure_ms is not None
    return usual_ms, sure_ms


def test_it_is_judged_by_a_bound_that_hardly_any_step_exceeds() -> None:
    budget, buckets, model = budget_of()
    sizes = buckets.mixed(NUM_DECODES)[3:]
    assert len(sizes) >= 3
    for smaller, bucket in itertools.pairwise(sizes):
        usual_ms, sure_ms = bounds_ms(model, bucket)
        assert budget.choose(load_of(NUM_DECODES, usual_ms, None)) == bucket
        assert budget.choose(load_of(NUM_DECODES, usual_ms, usual_ms)) == smaller
        assert budget.choose(load_of(NUM_DECODES, sure_ms, sure_ms)) == bucket
        looser_ms = 1.001 * sure_ms
        assert budget.choose(load_of(NUM_DECODES, usual_ms, looser_ms)) == bucket, "another's target is the tighter one"


@pytest.mark.parametrize("token_budget", [64, 256, 1024])
@pytest.mark.parametrize("num_decodes", [1, 4, 16])
def test_it_makes_no_step_longer(token_budget: int, num_decodes: int) -> None:
    """Where no step keeps the bound, which is where a smaller one would be chosen that breaks the target anyway."""
    budget, *_ = budget_of(token_budget)
    for target_ms in np.arange(4.0, 30.0, 0.01):
        usual = budget.choose(load_of(num_decodes, target_ms, None))
        sure = budget.choose(load_of(num_decodes, target_ms, target_ms))
        assert usual is not None
        assert sure is not None
        assert sure.num_rows <= usual.num_rows, target_ms


def joined(decodes: DecodeSet, number: int, target_ms: float | None, num_output: int = 0) -> RunningRequest:
    """One that decodes from the next plan on, when it has that many tokens besides the one that is drawn."""
    submit = make_submit(number, [1] * PROMPT_LEN, 100, itl_target_ms=target_ms)
    request = Request(submit, number, 0.0, 16, Tenant("", 1000))
    running = RunningRequest(request, number, [], PROMPT_LEN, is_reserved=False, is_long=False)
    decodes.join(running, PROMPT_LEN + num_output)
    return running


def test_it_is_known_for_the_one_plan_that_draws_the_second_token() -> None:
    decodes = DecodeSet(16)
    assert decodes.first_gap_target_ms is None
    joined(decodes, 0, 20.0)
    assert decodes.first_gap_target_ms == 20.0
    decodes.advance()
    assert decodes.first_gap_target_ms is None


def test_its_target_is_the_tightest_of_those_that_have_one() -> None:
    """Whoever decodes already, goes on after a preemption, or leaves before the plan, has none."""
    decodes = DecodeSet(16)
    joined(decodes, 0, 10.0)
    decodes.advance()
    joined(decodes, 1, None)
    assert decodes.first_gap_target_ms is None
    joined(decodes, 2, 30.0)
    joined(decodes, 3, 5.0, num_output=4)
    assert decodes.first_gap_target_ms == 30.0
    tight = joined(decodes, 4, 20.0)
    assert decodes.first_gap_target_ms == 20.0
    decodes.leave(tight)
    assert decodes.first_gap_target_ms == 30.0


def loads_of_plans(engine: VirtualEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepLoad, StepPlan]]:
    """What the policy asked of each step with prompts, and what it became."""
    loads: list[StepLoad] = []
    choose = StepBudget.choose

    def choose_noted(budget: StepBudget, load: StepLoad) -> Bucket | None:
        loads.append(load)
        return choose(budget, load)

    monkeypatch.setattr(StepBudget, "choose", choose_noted)
    engine.run()
    return list(zip(loads, [plan for plan in engine.plans if plan.chunks], strict=False))


def test_the_policy_asks_for_it_in_just_those_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine(num_slots=8)
    for _ in range(40):
        engine.send(1200, 20, itl_target_ms=14.0)
    found = loads_of_plans(engine, monkeypatch)
    first_gaps = [1200 in np.frombuffer(plan.decode_positions, np.int32) for _, plan in found]
    assert [load.first_gap_ms is not None for load, _ in found] == first_gaps
    assert 10 < sum(first_gaps) < len(found)


def test_of_several_tenants_it_asks_for_no_more_than_the_target_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tenant may ask of the steps of others is bounded (`step_bounds`)."""
    engine = VirtualEngine(num_slots=8)
    for number in range(60):
        engine.send(600, 20, itl_target_ms=5.0 if number % 2 else 10.0, tenant=f"tenant {number % 2}")
    found = [load for load, _ in loads_of_plans(engine, monkeypatch) if load.first_gap_ms is not None]
    assert any(load.itl_target_ms is not None and load.itl_target_ms > 5.0 for load in found)
    for load in found:
        assert load.itl_target_ms is not None
        assert load.first_gap_ms is not None
        assert load.first_gap_ms >= load.itl_target_ms
