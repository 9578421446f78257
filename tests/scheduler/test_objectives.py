"""What each objective makes of the same requests, beside plans that were recorded before there were objectives."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulated_machine import H200_STEP_TIMES
from graphgen.capture.buckets import build_ladder
from graphgen.ipc.attended import Attended
from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.ipc.worker_messages import Bucket, BucketTime, StepTimeTable
from graphgen.launch.config import EngineConfig
from graphgen.launch.step_times_store import StepTimesFile
from graphgen.scheduler.buckets import BucketTable
from graphgen.scheduler.budget import StepBudget, StepLoad
from graphgen.scheduler.cost_model import SATURATION_NOISE, CostModel
from graphgen.scheduler.large_steps import RATE_SHARE, LargeSteps
from graphgen.scheduler.objectives import OBJECTIVES
from tests.scheduler.recorded import FILE, WORKLOADS, plans_of
from tests.scheduler.virtual_time import VirtualEngine

RECORDED = json.loads(FILE.read_text())
H200 = StepTimesFile.read(H200_STEP_TIMES).table


def test_every_objective_of_the_configuration_is_defined() -> None:
    (choices,) = [field.type.__args__ for field in msgspec.structs.fields(EngineConfig) if field.name == "objective"]
    assert set(choices) == set(OBJECTIVES)
    assert EngineConfig().objective == "balanced"


# --- latency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_latency_makes_the_plans_that_were_made_before_there_were_objectives(name: str) -> None:
    assert plans_of(WORKLOADS[name], "latency") == RECORDED[name]


@pytest.mark.parametrize("objective", ["balanced", "throughput"])
def test_the_recordings_tell_objectives_apart(objective: ObjectiveName) -> None:
    name = "nothing asked, a long queue"
    assert plans_of(WORKLOADS[name], objective) != RECORDED[name]


# --- beside the decodes that run -----------------------------------------------------------------------------------


NUM_DECODES, BEGUN_S = 16, 0.2


def judged(table: StepTimeTable, token_budget: int, most_rows: int) -> LargeSteps:
    buckets = BucketTable([time.bucket for time in table.times], token_budget)
    large = LargeSteps(buckets, CostModel(table))
    large.judge_all(most_rows)
    return large


def test_on_an_h200_the_size_that_is_worth_its_length_grows_with_the_decodes() -> None:
    large = judged(H200, 2048, 512)
    rows = [large.beside(num_decodes)[-1].num_rows for num_decodes in (16, 64, 128, 256)]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1] == 2048
    assert judged(H200, 512, 512).beside(64) == ()


@pytest.mark.parametrize("token_budget", [1024, 2048])
def test_on_an_h200_512_rows_are_saturated_however_few_decodes_large_steps_hold(token_budget: int) -> None:
    """Those that hold fewer compute more rows a second: at least, less time goes to what their decodes read."""
    times = {time.bucket: time.milliseconds for time in H200.times if time.bucket.num_rows <= token_budget}
    for rows in (1024, 1536):
        if rows <= token_budget:
            read_ms = 32 * H200.decode_context * H200.ms_per_decode_position
            times.setdefault(Bucket(rows - 32, 32), times[Bucket(rows - 64, 64)] - read_ms)
    table = msgspec.structs.replace(H200, times=tuple(map(BucketTime, times, times.values())))
    assert CostModel(table).saturation_rows(times) == 512


@pytest.mark.parametrize("error", [0.92, 0.96, 1.0, 1.04])
@pytest.mark.parametrize("objective", ["balanced", "throughput"])
def test_what_a_start_has_wrong_of_the_largest_steps_moves_no_saturation_point(
    objective: ObjectiveName, error: float
) -> None:
    """On a card steps of 2048 rows timed a few percent too short made 1024 rows the least that an engine took."""
    times = [
        BucketTime(time.bucket, time.milliseconds * (error if time.bucket.num_rows > 1024 else 1.0))
        for time in H200.times
    ]
    table = msgspec.structs.replace(H200, times=tuple(times))
    buckets = BucketTable([time.bucket for time in times], 2048)
    budget = StepBudget(buckets, CostModel(table), 2, OBJECTIVES[objective])
    for _ in range(2):
        saturated = budget.saturated(16)
        assert saturated is not None
        assert saturated.num_rows == 512
        budget.review(16, 16 * 1024)


@settings(max_examples=60)
@given(st.data())
def test_the_largest_step_is_the_smallest_near_the_best_rate_beside_the_decodes(data: st.DataObject) -> None:
    """Against every bucket one by one, whatever the times are."""
    buckets = build_ladder(1024, 128)
    times = data.draw(st.lists(st.floats(1.0, 60.0), min_size=len(buckets), max_size=len(buckets)))
    table = StepTimeTable(tuple(map(BucketTime, buckets, times)), 1024, 512, 1e-5, 1e-6, 1e-4)
    most_rows = data.draw(st.sampled_from([128, 256, 512, 768, 1024]))
    num_decodes = data.draw(st.integers(0, 128))
    num_positions = num_decodes * data.draw(st.integers(1, 4000))
    large, model = judged(table, 1024, most_rows), CostModel(table)
    large.judge_all(None)
    large.judge(most_rows, num_decodes, num_positions)
    mixed = BucketTable(buckets, 1024).mixed(num_decodes)
    efficient = [bucket for bucket in mixed if bucket.num_rows <= most_rows] or [mixed[0]]
    candidates = [efficient[-1], *mixed[len(efficient) :]]

    def rate(bucket: Bucket) -> float:
        milliseconds = model.predict_ms(bucket, Attended(num_positions).with_chunk(512, bucket.prefill_rows))
        assert milliseconds is not None
        return bucket.prefill_rows / milliseconds

    least = RATE_SHARE * max(map(rate, candidates))
    # Steps do not grow for what may be noise.
    near = rate(candidates[0]) >= least * (1.0 - SATURATION_NOISE)
    enough = candidates[0] if near else next(bucket for bucket in candidates if rate(bucket) >= least)
    found = large.beside(num_decodes)
    assert (found[-1] if found else candidates[0]) == enough
    assert list(found) == sorted(found, key=lambda bucket: bucket.num_rows)
    assert sorted(map(rate, found)) == list(map(rate, found))


H200_MS = {time.bucket: time.milliseconds for time in H200.times}


def h200_ms(bucket: Bucket) -> float:
    """The table is older than the buckets for short prompts, and than those of large steps beside few decodes."""
    near = Bucket(bucket.num_rows - 64, 64)
    return H200_MS.get(bucket, H200_MS.get(near, 5.6))


def make_engine(objective: ObjectiveName) -> VirtualEngine:
    return VirtualEngine(token_budget=2048, num_slots=256, objective=objective, step_ms=h200_ms)


def serve(objective: ObjectiveName, num_prompts: int, ttft_target_ms: float | None = None) -> VirtualEngine:
    """Sixteen requests decode, then so many prompts of 2000 tokens come."""
    engine = make_engine(objective)
    for _ in range(NUM_DECODES):
        engine.send(64, 1500)
    engine.run(until_s=BEGUN_S)
    for _ in range(num_prompts):
        engine.send(2000, 8, ttft_target_ms=ttft_target_ms)
    engine.run()
    return engine


def most_rows(engine: VirtualEngine) -> int:
    """Of a step beside a decode."""
    return max(plan.bucket.num_rows for plan in engine.plans if plan.decode_slots)


@pytest.mark.parametrize("objective", ["balanced", "throughput"])
def test_steps_grow_for_a_long_queue_and_stay_larger_until_it_is_short(objective: ObjectiveName) -> None:
    saturated = most_rows(serve("latency", 100))
    numbers = OBJECTIVES[objective]
    assert numbers.num_backlog_steps is not None
    engine = serve(objective, 100)
    left, is_grown = 100 * 2000, False
    fewest = numbers.num_backlog_steps  # steps that the queue filled when a larger one was planned
    for plan in engine.plans:
        if plan.bucket.num_rows > saturated:
            num_steps = left // plan.bucket.prefill_rows
            assert num_steps >= (numbers.num_kept_steps if is_grown else numbers.num_backlog_steps)
            fewest = min(fewest, num_steps)
        is_grown = plan.bucket.num_rows > saturated
        left -= len(plan.chunk_token_ids) // 4 if plan.planned_s >= BEGUN_S else 0
    assert fewest == numbers.num_kept_steps


@pytest.mark.parametrize("objective", ["balanced", "throughput"])
@pytest.mark.parametrize("asks_between", [False, True], ids=["", "a question between"])
def test_a_queue_that_keeps_steps_large_does_not_make_them_large(objective: ObjectiveName, asks_between: bool) -> None:
    numbers = OBJECTIVES[objective]
    grow, keep = numbers.num_backlog_steps, numbers.num_kept_steps
    assert grow is not None
    buckets = BucketTable([time.bucket for time in H200.times], 1024)
    budget = StepBudget(buckets, CostModel(H200), 2, numbers)
    small, large = Bucket(480, 32), Bucket(704, 64)

    def bucket_for(num_steps: int, tokens: int = 0) -> Bucket | None:
        pending = num_steps * large.prefill_rows + tokens
        if asks_between:
            budget.usual(32, 32 * 1024, 100 * pending)
        return budget.choose(StepLoad(32, 32 * 1024, None, None, None, None, (), pending, False))

    assert bucket_for(grow, -1) == small
    assert bucket_for(grow) == large
    assert bucket_for(keep) == large
    assert bucket_for(keep, -1) == small
    assert bucket_for(grow, -1) == small


def test_a_queue_that_ended_at_once_keeps_no_steps_large() -> None:
    """Its clients leave while steps are grown; the next queue is one that would keep them so."""
    saturated = most_rows(serve("latency", 100))
    engine = make_engine("balanced")
    for _ in range(NUM_DECODES):
        engine.send(64, 1500)
    engine.run(until_s=BEGUN_S)
    left = [engine.send(2000, 8) for _ in range(100)]
    engine.run(until_s=1.0)
    assert engine.plans[-1].bucket.num_rows > saturated
    for one in left:
        engine.scheduler.cancel(one.submit.request_id)
    engine.run(until_s=1.5)
    begun = len(engine.plans)
    for _ in range(10):
        engine.send(2000, 8)
    engine.run()
    assert max(plan.bucket.num_rows for plan in engine.plans[begun:]) == saturated


def test_balanced_keeps_its_long_steps_within_thirty_milliseconds() -> None:
    balanced, throughput = serve("balanced", 100), serve("throughput", 100)
    assert 25.0 < max(balanced.step_times_ms) <= 30.0
    assert max(throughput.step_times_ms) > 30.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_target_wins_over_every_objective(objective: ObjectiveName) -> None:
    engine = make_engine(objective)
    decoding = engine.send(64, 1000, itl_target_ms=12.0)
    engine.run(until_s=0.05)
    for _ in range(100):
        engine.send(2000, 8, itl_target_ms=100.0)
    engine.run()
    assert max(decoding.gaps_ms) <= 12.0


# --- first tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["balanced", "throughput"])
def test_who_asks_for_a_first_token_and_nothing_of_the_gaps_gets_it_early(objective: ObjectiveName) -> None:
    """In time is not early: latency keeps gaps short as long as no target would be missed."""

    def last_first_token_s(objective: ObjectiveName) -> float:
        engine = serve(objective, 6, ttft_target_ms=500.0)
        return max(one.ttft_s for one in list(engine.served.values())[NUM_DECODES:])

    assert last_first_token_s(objective) < 0.95 * last_first_token_s("latency") < 0.5


def test_a_first_token_that_is_late_already_is_still_hurried_for() -> None:
    patient, late = (serve("balanced", 6, ttft_target_ms=target_ms) for target_ms in (100_000.0, 1.0))
    assert most_rows(late) > most_rows(patient)
