"""What requests get from the policy as a whole, in virtual time: targets, classes, deadlines, life after overload."""

import random

import pytest

from graphgen.scheduler.budget import LEAST_ROWS
from graphgen.scheduler.cost_model import SATURATION_SHARE
from graphgen.scheduler.request import AGEING_S, MAX_PREEMPTIONS, RunningRequest
from tests.scheduler.virtual_time import Served, VirtualEngine, full_step_ms, percentile


def closed_loop(
    engine: VirtualEngine, clients: int, count: int, prompt: int, output: int, itl_target_ms: float | None = None
) -> list[Served]:
    """`clients` that each send their next request when the last one ends; lengths vary by 30 %."""
    rng = random.Random(2)
    first = len(engine.served)
    left = count - clients

    def send() -> None:
        prompt_len = min(max(16, round(rng.gauss(prompt, 0.3 * prompt))), 3 * prompt)
        engine.send(prompt_len, max(4, round(rng.gauss(output, 0.3 * output))), itl_target_ms=itl_target_ms)

    def send_next(ended: Served) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            send()

    for _ in range(clients):
        send()
    engine.run(on_end=send_next)
    return list(engine.served.values())[first:]


def rate(served: list[Served]) -> float:
    """Requests a second."""
    begun, ended = min(one.sent_s for one in served), max(one.times_s[-1] for one in served)
    return len(served) / (ended - begun)


def gaps_ms(served: list[Served]) -> list[float]:
    return [gap for one in served for gap in one.gaps_ms]


# --- the budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_ms", [10.0, 12.0, 14.0])
def test_the_tail_stays_under_the_itl_target_and_uses_what_it_allows(target_ms: float) -> None:
    engine = VirtualEngine(noise=0.01)
    gaps = gaps_ms(closed_loop(engine, 16, 80, 2600, 60, itl_target_ms=target_ms))
    assert percentile(gaps, 95) <= target_ms
    assert percentile(gaps, 95) > 0.8 * target_ms, "a longer step would have been allowed"


def test_a_target_costs_throughput_and_no_target_reaches_the_saturation_point() -> None:
    rates = {}
    for target_ms in (8.0, 12.0, None):
        engine = VirtualEngine(token_budget=2048, num_slots=64)
        rates[target_ms] = rate(closed_loop(engine, 16, 60, 2600, 60, itl_target_ms=target_ms))
    assert rates[8.0] < rates[12.0] < rates[None]
    per_ms: dict[int, float] = {}
    for bucket in engine.buckets:
        if bucket.prefill_rows:
            rows_per_ms = bucket.prefill_rows / full_step_ms(bucket)
            per_ms[bucket.num_rows] = max(rows_per_ms, per_ms.get(bucket.num_rows, 0.0))
    most = max(plan.bucket.num_rows for plan in engine.plans)
    assert most == min(rows for rows, rate in per_ms.items() if rate >= SATURATION_SHARE * max(per_ms.values()))


def test_an_impossible_target_still_lets_prompts_advance() -> None:
    """At least a small bucket for prompts is used: nobody starves for somebody else's latency. The buckets for what is
    left of a prompt are not for a long one."""
    engine = VirtualEngine()
    decoding = engine.send(64, 400, itl_target_ms=1.0)
    engine.run(until_s=0.1)
    late = engine.send(3000, 4)
    engine.run()
    assert decoding.finished
    assert late.finished
    steps = [plan for plan in engine.plans if plan.chunks and plan.decode_slots]
    assert {plan.bucket.num_rows for plan in steps if not plan.chunks[-1].draws} == {LEAST_ROWS}
    assert {plan.bucket.num_rows for plan in steps if plan.chunks[-1].draws} == {32}


def test_the_tightest_target_among_the_decodes_counts_and_only_while_it_decodes() -> None:
    engine = VirtualEngine()
    patient = engine.send(64, 300, itl_target_ms=100.0)
    hasty = engine.send(64, 30, itl_target_ms=8.0)
    engine.run(until_s=0.05)
    engine.send(20_000, 4)
    engine.run()
    until_s = hasty.times_s[-1]
    together = [plan.bucket.num_rows for plan in engine.plans if plan.chunks and len(plan.decode_slots) == 8]
    after = [plan.bucket.num_rows for plan in engine.plans if plan.chunks and len(plan.decode_slots) == 4]
    assert max(together) < max(after)
    assert max(hasty.gaps_ms) <= 8.0
    assert any(time > until_s for time in patient.times_s)


def test_a_late_prompt_makes_steps_grow_beyond_the_saturation_point() -> None:
    largest = {}
    for ttft_target_ms in (None, 380.0, 100_000.0):
        engine = VirtualEngine(token_budget=2048)
        engine.send(64, 400)
        engine.run(until_s=0.05)
        engine.send(14_000, 4, ttft_target_ms=ttft_target_ms)
        engine.run()
        largest[ttft_target_ms] = max(plan.bucket.num_rows for plan in engine.plans)
    assert largest[None] == largest[100_000.0] < largest[380.0]


def test_a_lone_prompt_is_split_evenly_over_the_steps_it_needs() -> None:
    engine = VirtualEngine()
    engine.send(64, 100)
    engine.run(until_s=0.05)
    engine.send(600, 2)
    engine.run()
    lengths = [plan.chunks[0].length for plan in engine.plans if plan.chunks and plan.decode_slots]
    assert len(lengths) == 2, "no step more than it needs"
    assert sum(lengths) == 600
    assert max(lengths) < 400, "496 and 104 would be a long step and a short one"


def test_stated_ttft_targets_are_met_by_serving_first_what_is_due_first() -> None:
    """A queue of seconds in which short prompts are due sooner: in order of arrival they would come too late."""

    def share_in_time(states_targets: bool) -> float:
        engine, rng = VirtualEngine(num_slots=128), random.Random(4)
        lengths = [rng.randint(500, 4500) for _ in range(80)]
        targets_ms = [length / 512 * 1000.0 for length in lengths]
        requests = [
            engine.send(length, 20, ttft_target_ms=target_ms if states_targets else None)
            for length, target_ms in zip(lengths, targets_ms, strict=True)
        ]
        engine.run()
        pairs = zip(requests, targets_ms, strict=True)
        return sum(one.ttft_s * 1000.0 <= target_ms for one, target_ms in pairs) / len(requests)

    assert share_in_time(False) < 0.9
    assert share_in_time(True) > 0.95


# --- long prompts ----------------------------------------------------------------------------------------------


def test_short_prompts_are_not_held_up_by_long_ones() -> None:
    def chat_ttft_s(num_long: int) -> list[float]:
        engine = VirtualEngine()
        for _ in range(num_long):
            engine.send(30_000, 8)
        engine.run(until_s=0.1)
        chats = []
        for number in range(20):
            engine.run(until_s=0.1 + 0.2 * number)
            chats.append(engine.send(200, 20))
        engine.run()
        assert all(one.finished for one in engine.served.values())
        return [one.ttft_s for one in chats]

    alone, beside = chat_ttft_s(0), chat_ttft_s(6)
    # Two steps are in flight when it comes, and one computes it; beside a deep prompt they take up to 25 ms each.
    assert max(beside) < max(alone) + 0.1, "a chat waited for a prompt of 30 000 tokens"


def test_long_prompts_are_computed_one_at_a_time_and_all_in_the_end() -> None:
    engine = VirtualEngine()
    longs = [engine.send(20_000, 4) for _ in range(4)]
    engine.run()
    assert all(one.finished for one in longs)
    firsts = [one.times_s[0] for one in longs]
    assert firsts == sorted(firsts)
    assert firsts[0] < 0.4 * firsts[3], "the first does not wait for the others"


# --- classes, deadlines ----------------------------------------------------------------------------------------


def test_under_twice_the_load_the_high_class_keeps_its_targets_and_the_low_class_ends() -> None:
    """Arrivals at twice the rate that the engine can serve, one in four of the high class."""
    capacity = rate(closed_loop(VirtualEngine(), 32, 100, 1000, 60))
    engine = VirtualEngine()
    rng = random.Random(3)
    high, low = [], []
    time_s = 0.0
    while time_s < 10.0:
        time_s += rng.expovariate(2.0 * capacity)
        engine.run(until_s=time_s)
        if rng.random() < 0.25:
            high.append(engine.send(1000, 60, priority=5, itl_target_ms=20.0))
        else:
            low.append(engine.send(1000, 60))
    engine.run()
    kept = [one for one in high if one.ttft_s <= 1000 / 512 and percentile(one.gaps_ms, 95) <= 20.0]
    assert len(kept) >= 0.95 * len(high)
    assert all(one.finished for one in low)
    # A low request is passed only by what arrived until so long after it; then it waits for the queue as it was.
    backlog_s = (len(high) + len(low)) / capacity
    assert max(one.ttft_s for one in low) <= 5 * AGEING_S + backlog_s


def test_nothing_that_arrives_after_the_starvation_bound_is_served_before() -> None:
    """A stream of the highest class that alone fills the engine cannot hold up a low request for ever."""
    capacity = rate(closed_loop(VirtualEngine(), 32, 60, 2000, 10))
    engine = VirtualEngine(num_slots=8)
    low = engine.send(2000, 10)
    others: list[Served] = []
    time_s = -0.001
    while low.error is None and not low.finished and time_s < 60.0:
        time_s += 1.0 / (2.0 * capacity)
        engine.run(until_s=max(0.0, time_s))
        others.append(engine.send(2000, 10, priority=1))
    engine.run()
    assert low.finished
    before = [one for one in others if one.times_s[0] < low.times_s[0]]
    assert len(before) > 10, "the higher class was served first"
    assert max(one.sent_s for one in before) <= AGEING_S + 0.2


def test_a_higher_class_takes_slots_and_pages_and_the_others_lose_no_token() -> None:
    engine = VirtualEngine(num_slots=8, num_pages=600)
    low = [engine.send(1500, 200) for _ in range(8)]
    engine.run(until_s=1.0)
    high = engine.send(2000, 20, priority=3)
    engine.run()
    assert high.ttft_s < 0.2
    assert [len(one.times_s) for one in low] == [200] * 8
    assert engine.scheduler.counters.preemptions >= 1


def test_what_cannot_meet_its_deadline_is_refused_and_the_rest_is_served_in_time() -> None:
    engine = VirtualEngine(num_slots=32)
    requests = [engine.send(1000, 100, deadline_ms=4000.0) for _ in range(200)]
    engine.run()
    refused = [one for one in requests if one.error == "OverloadedError"]
    missed = [one for one in requests if one.error == "DeadlineError"]
    served = [one for one in requests if one.finished]
    assert len(refused) + len(missed) + len(served) == 200
    assert len(served) > 20
    assert len(missed) <= 0.1 * len(served), "what was accepted should have been served"
    assert max(one.times_s[-1] for one in served) <= 4.0 + 0.1
    assert max(one.times_s[-1] for one in served) > 2.0, "far more would have fitted"


def test_only_a_deadline_that_an_idle_engine_could_meet_is_worth_another_try() -> None:
    alone = VirtualEngine()
    served = alone.send(2000, 100)
    alone.run()
    needed_ms = served.times_s[-1] * 1000.0
    for crowd in (0, 60):
        engine = VirtualEngine(num_slots=32)
        for _ in range(crowd):
            engine.send(2000, 100)
        possible, impossible = (engine.send(2000, 100, deadline_ms=share * needed_ms) for share in (1.1, 0.9))
        assert impossible.error == "DeadlineError"
        assert possible.error == ("OverloadedError" if crowd else None)
        assert engine.scheduler.counters.refused == (2 if crowd else 1)
        engine.run()
        assert possible.finished == (not crowd)


def test_a_request_whose_deadline_passes_ends_wherever_it_is() -> None:
    engine = VirtualEngine(num_slots=2)
    decoding = engine.send(500, 100, deadline_ms=900.0)
    waiting = engine.send(500, 100, deadline_ms=2500.0)
    engine.run(until_s=0.3)
    # They were accepted; now others come first, for longer than they have.
    for _ in range(8):
        engine.send(3000, 300, priority=9)
    engine.run(until_s=2.6)
    assert decoding.times_s
    assert (decoding.error, waiting.error) == ("DeadlineError", "DeadlineError")
    assert engine.scheduler.counters.deadline_misses == 2
    engine.run()
    assert engine.scheduler.pages_free == engine.scheduler.pages_total


@pytest.mark.parametrize("limit", ["max_waiting", "max_waiting_tokens"])
def test_the_queue_is_bounded_and_says_when_to_come_back(limit: str) -> None:
    bounded = VirtualEngine(num_slots=2, max_waiting=10), VirtualEngine(num_slots=2, max_waiting_tokens=10 * 300)
    engine = bounded[limit == "max_waiting_tokens"]
    requests = [engine.send(300, 50) for _ in range(40)]
    refused = [one for one in requests if one.error == "OverloadedError"]
    assert len(refused) == 30
    assert engine.scheduler.counters.refused == 30
    engine.run()
    assert all(one.finished for one in requests if one.error is None)


# --- overload and what comes after -----------------------------------------------------------------------------


def test_after_an_overload_of_four_times_the_pool_throughput_returns() -> None:
    def burst(engine: VirtualEngine, count: int) -> None:
        for _ in range(count):
            engine.send(400, 1200)
        engine.run()

    engine = VirtualEngine(num_pages=400, num_slots=64)
    before = rate(closed_loop(engine, 12, 60, 800, 100))
    # Each of these grows to 25 pages: together they want four times the pool.
    burst(engine, 64)
    preemptions = engine.scheduler.counters.preemptions
    assert preemptions > 0
    after = rate(closed_loop(engine, 12, 60, 800, 100))
    assert after >= 0.95 * before
    assert all(one.finished for one in engine.served.values())


def test_an_overloaded_pool_spends_few_rows_on_computing_tokens_again() -> None:
    engine = VirtualEngine(num_pages=400, num_slots=64)
    served = closed_loop(engine, 64, 160, 400, 1200)
    computed = sum(chunk.length for plan in engine.plans for chunk in plan.chunks)
    computed += sum(plan.num_decodes for plan in engine.plans)
    wanted = sum(len(one.submit.prompt_token_ids) // 4 + one.submit.max_tokens - 1 for one in served)
    assert engine.scheduler.counters.preemptions > 20
    assert computed <= 1.2 * wanted


def test_no_request_is_preempted_more_than_three_times() -> None:
    engine = VirtualEngine(num_pages=120, num_slots=32)
    counts: dict[int, int] = {}
    preempt = engine.scheduler._life.preemption.preempt

    def count(running: RunningRequest) -> None:
        counts[running.request.request_id] = counts.get(running.request.request_id, 0) + 1
        preempt(running)

    engine.scheduler._life.preemption.preempt = count  # type: ignore[method-assign]  # a test looks on
    rng = random.Random(5)
    for number in range(60):
        engine.run(until_s=0.05 * number)
        engine.send(rng.randint(100, 1500), rng.randint(200, 2500), priority=rng.choice([0, 0, 1, 2]))
    engine.run()
    assert all(one.finished for one in engine.served.values())
    assert max(counts.values()) == MAX_PREEMPTIONS
