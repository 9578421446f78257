"""Among tenants service is fair, whatever they ask for: turns, shares of slots and pages, bounds on steps.

In virtual time a modest tenant is compared with itself alone on the whole engine: its half of the engine would serve it
half as fast.
"""

import random
from collections.abc import Callable

import pytest

from graphgen.ipc.worker_messages import StepPlan
from graphgen.scheduler.request import Request, RunningRequest
from graphgen.scheduler.tenants import BURST_MS, Tenants
from tests.scheduler.harness import make_submit
from tests.scheduler.virtual_time import Served, VirtualEngine, percentile

MORE, LESS = 1.25, 0.75
"""Within a quarter."""
RUN_S = 6.0

Greed = Callable[[VirtualEngine, random.Random], None]
"""Sends one more request of the greedy tenant."""


def send_greedy(engine: VirtualEngine, prompt_len: int, output_len: int, **fields: object) -> Served:
    return engine.send(prompt_len, output_len, None, tenant="greedy", **fields)


def many_long_outputs(engine: VirtualEngine, rng: random.Random) -> None:
    send_greedy(engine, 300, 2000, priority=9)


def many_long_prompts(engine: VirtualEngine, rng: random.Random) -> None:
    send_greedy(engine, 20_000, 4, priority=9)


def many_short_prompts(engine: VirtualEngine, rng: random.Random) -> None:
    send_greedy(engine, 40, 1, priority=9)


def targets_that_nothing_meets(engine: VirtualEngine, rng: random.Random) -> None:
    send_greedy(engine, 2000, 300, priority=9, itl_target_ms=0.1, ttft_target_ms=1.0)


def targets_that_make_steps_long(engine: VirtualEngine, rng: random.Random) -> None:
    send_greedy(engine, 3000, 20, priority=9, ttft_target_ms=rng.choice([200.0, 1000.0, 5000.0]))


def deadlines(engine: VirtualEngine, rng: random.Random) -> None:
    send_greedy(engine, 1500, 200, priority=9, deadline_ms=rng.choice([2000.0, 1e8]))


def all_of_it(engine: VirtualEngine, rng: random.Random) -> None:
    rng.choice([many_long_outputs, many_long_prompts, many_short_prompts, targets_that_nothing_meets, deadlines])(
        engine, rng
    )


GREEDS: list[Greed] = [
    many_long_outputs,
    many_long_prompts,
    many_short_prompts,
    targets_that_nothing_meets,
    targets_that_make_steps_long,
    deadlines,
    all_of_it,
]


def modest_client(
    greed: Greed | None, prompt_len: int, output_len: int, gap_s: float = 0.2
) -> tuple[list[Served], float]:
    """One request after another of a modest tenant, beside one that has always 150 requests open; and for how long it
    finds steps in flight when it comes."""
    engine, rng = VirtualEngine(num_slots=48, num_pages=6000), random.Random(1)
    served: list[Served] = []

    def replace(ended: Served) -> None:
        if greed is not None and ended.submit.tenant == "greedy":
            greed(engine, rng)

    if greed is not None:
        for _ in range(150):
            greed(engine, rng)
    engine.run(until_s=1.0, on_end=replace)
    while engine.now_s < RUN_S:
        served.append(engine.send(prompt_len, output_len, tenant="modest"))
        while not served[-1].finished and engine.now_s < 3 * RUN_S:
            engine.run(until_s=engine.now_s + 0.02, on_end=replace)
        engine.run(until_s=engine.now_s + gap_s, on_end=replace)
    return served, engine.limits.steps_in_flight * percentile(engine.step_times_ms, 99) / 1000.0


def first_token_s(served: list[Served]) -> float:
    return percentile([one.ttft_s for one in served], 50)


def tokens_per_s(served: list[Served]) -> float:
    """While it gets tokens."""
    return sum(len(one.times_s) - 1 for one in served) / sum(one.times_s[-1] - one.times_s[0] for one in served)


@pytest.mark.parametrize("greed", GREEDS, ids=lambda greed: str(greed.__name__))
@pytest.mark.parametrize(("prompt_len", "output_len"), [(2000, 60), (300, 60)])
def test_a_modest_tenants_first_token_and_rate_are_those_of_its_half(
    greed: Greed, prompt_len: int, output_len: int
) -> None:
    alone, _ = modest_client(None, prompt_len, output_len)
    beside, in_flight_s = modest_client(greed, prompt_len, output_len)
    assert len(beside) >= 5
    assert all(one.finished for one in beside)
    # When it comes the steps in flight are the other's alone.
    assert first_token_s(beside) <= MORE * 2 * first_token_s(alone) + in_flight_s
    assert tokens_per_s(beside) >= LESS * tokens_per_s(alone) / 2


# --- turns -----------------------------------------------------------------------------------------------------


def keep_open(engine: VirtualEngine, until_s: float, **loads: tuple[int, int, int]) -> dict[str, list[Served]]:
    """Tenants that have always so many requests open, of so many prompt and output tokens each."""
    sent: dict[str, list[Served]] = {name: [] for name in loads}

    def send(name: str) -> None:
        _, prompt_len, output_len = loads[name]
        sent[name].append(engine.send(prompt_len, output_len, tenant=name))

    for name, (num_open, _, _) in loads.items():
        for _ in range(num_open):
            send(name)
    engine.run(until_s=until_s, on_end=lambda ended: send(ended.submit.tenant) if ended.submit.tenant in sent else None)
    return sent


def num_finished(served: list[Served]) -> int:
    return sum(one.finished for one in served)


def test_equal_tenants_are_served_equally_and_together_lose_little() -> None:
    load, twice = (24, 1000, 60), (48, 1000, 60)
    lone, shared = VirtualEngine(num_slots=32), VirtualEngine(num_slots=32)
    rate = num_finished(keep_open(lone, 20.0, one=twice)["one"])
    counts = [num_finished(sent) for sent in keep_open(shared, 20.0, one=load, other=load).values()]
    assert max(counts) <= 1.1 * min(counts)
    assert sum(counts) >= 0.85 * rate, "shorter steps cost some of the rate, not more"
    assert shared.scheduler.counters.preemptions <= 0.05 * sum(counts), "slots go from one to the other and back"


def test_a_tenant_that_sends_one_request_after_another_gets_its_turn_and_no_more() -> None:
    """Whoever has just been served and comes back at once is still ahead."""
    engine = VirtualEngine()
    sent = keep_open(engine, 20.0, few=(1, 8000, 1), many=(1, 500, 1))
    num_tokens = {name: num_finished(served) * served[0].prompt_len for name, served in sent.items()}
    assert min(num_tokens.values()) > 0.35 * sum(num_tokens.values())


def test_tenants_that_fight_for_slots_do_not_take_them_back_and_forth() -> None:
    """A slot that becomes free goes to the tenant that has fewer, and not first to the other."""
    engine = VirtualEngine(num_slots=16)
    counts = [num_finished(sent) for sent in keep_open(engine, 20.0, one=(24, 100, 150), other=(24, 400, 150)).values()]
    assert max(counts) <= 1.2 * min(counts)
    assert engine.scheduler.counters.preemptions <= 8 + 0.05 * sum(counts)


def test_idle_time_earns_nothing() -> None:
    """A tenant that comes late does not keep others from their prompts until it has had as much as they."""
    engine = VirtualEngine()
    early = keep_open(engine, 20.0, early=(8, 1000, 4), other=(8, 1000, 4))["early"]
    sent = keep_open(engine, 25.0, late=(30, 1000, 4))["late"]
    assert num_finished(sent) > 100
    assert max(one.times_s[-1] for one in early if one.sent_s > 19.0) < 22.0


def test_whoever_is_ahead_stays_so_while_it_is_away() -> None:
    tenants = Tenants(long_prompt_len=100)

    def come(number: int, name: str) -> Request:
        request = Request(make_submit(number, [1, 2, 3]), number, 0.0, 4, tenants.of(name))
        tenants.opened(request)
        tenants.add(request)
        return request

    def go(request: Request) -> None:
        tenants.remove(request)
        tenants.closed(request)

    staying, leaving = come(0, "staying"), come(1, "leaving")
    tenants.in_turn(tenants.first(2), [])
    leaving.tenant.served += 10 * BURST_MS
    go(leaving)
    assert tenants.is_counting
    come(2, "leaving")
    assert [tenant.name for tenant in tenants.first(2)] == ["staying", "leaving"]
    assert tenants.of("leaving").served == 10 * BURST_MS
    assert tenants.of("stranger").served == 0.0
    go(staying)


@pytest.mark.parametrize("num_tenants", [2, 5, 40])
def test_nobody_starves(num_tenants: int) -> None:
    engine, rng = VirtualEngine(num_slots=16, num_pages=700), random.Random(num_tenants)
    time_s = 0.0
    for _ in range(60):
        time_s += rng.expovariate(40.0)
        engine.run(until_s=time_s)
        prompt_len, priority = rng.choice([30, 500, 3000, 15_000]), rng.choice([0, 0, 9])
        engine.send(prompt_len, rng.randint(1, 200), tenant=str(rng.randrange(num_tenants)), priority=priority)
    engine.run()
    assert all(one.finished for one in engine.served.values())
    assert engine.scheduler.pages_free == engine.scheduler.pages_total


# --- shares of slots and pages ---------------------------------------------------------------------------------


def running_of(engine: VirtualEngine, tenant: str) -> int:
    return sum(running.request.tenant.name == tenant for running in engine.scheduler._life.running)


def test_a_tenant_takes_slots_up_to_its_share_and_keeps_them() -> None:
    engine = VirtualEngine(num_slots=8)
    for _ in range(20):
        engine.send(100, 4000, tenant="greedy", priority=9)
    engine.run(until_s=0.5)
    assert running_of(engine, "greedy") == 8
    for _ in range(20):
        engine.send(100, 4000, tenant="modest")
    engine.run(until_s=1.0)
    assert (running_of(engine, "greedy"), running_of(engine, "modest")) == (4, 4)
    engine.run(until_s=5.0)
    assert engine.scheduler.counters.preemptions == 4, "nobody took anything back"
    third = engine.send(100, 10, tenant="third")
    engine.run(until_s=5.5)
    assert third.finished
    assert min(running_of(engine, "greedy"), running_of(engine, "modest")) >= 3


def test_nobody_takes_more_than_its_share_and_nobody_gives_of_its_own() -> None:
    engine = VirtualEngine(num_slots=8)
    for tenant, count in (("greedy", 6), ("modest", 2)):
        for _ in range(count):
            engine.send(100, 3000, tenant=tenant)
        engine.run(until_s=engine.now_s + 0.3)
    for _ in range(6):
        engine.send(100, 3000, tenant="third")
    engine.run(until_s=engine.now_s + 0.5)
    assert [running_of(engine, tenant) for tenant in ("greedy", "modest", "third")] == [4, 2, 2]


def test_more_tenants_than_slots_wait_for_one_to_become_free() -> None:
    engine = VirtualEngine(num_slots=4)
    for tenant in "abcd":
        engine.send(100, 500, tenant=tenant)
    engine.run(until_s=0.3)
    fifth = engine.send(100, 5, tenant="e")
    engine.run(until_s=1.0)
    assert engine.scheduler.counters.preemptions == 0
    engine.run()
    assert fifth.finished


def test_what_one_tenant_does_not_want_is_the_others() -> None:
    engine = VirtualEngine(num_slots=8)
    engine.send(100, 3000, tenant="modest")
    for _ in range(20):
        engine.send(100, 3000, tenant="greedy")
    engine.run(until_s=1.0)
    assert running_of(engine, "greedy") == 7


def test_a_tenant_takes_pages_up_to_its_share() -> None:
    engine = VirtualEngine(num_pages=100)
    for _ in range(4):
        engine.send(64 * 24, 64 * 4, tenant="greedy")
    engine.run(until_s=0.3)
    assert running_of(engine, "greedy") >= 3
    modest = engine.send(64 * 20, 20, tenant="modest")
    engine.run(until_s=0.6)
    assert modest.ttft_s < 0.2
    engine.run()
    assert all(one.finished for one in engine.served.values())


def test_growing_outputs_take_pages_of_the_tenant_that_holds_most() -> None:
    engine = VirtualEngine(num_pages=64)
    for _ in range(6):
        engine.send(64 * 4, 64 * 12, tenant="greedy", priority=9)
    engine.run(until_s=0.1)
    for _ in range(4):
        engine.send(64, 64 * 3, tenant="modest")
    preempted: list[str] = []
    preempt = engine.scheduler._life.preemption.preempt

    def note(running: RunningRequest) -> None:
        preempted.append(running.request.tenant.name)
        preempt(running)

    engine.scheduler._life.preemption.preempt = note  # type: ignore[method-assign]  # a test looks on
    engine.run()
    assert set(preempted) == {"greedy"}
    assert all(one.finished for one in engine.served.values())


def test_reserved_requests_of_a_tenant_do_not_keep_its_slots_from_another() -> None:
    """Requests that were preempted three times keep their slots within their tenant, which can preempt its own."""
    engine = VirtualEngine(num_slots=4)
    low = [engine.send(100, 3000, tenant="greedy") for _ in range(4)]
    for _ in range(10):
        engine.run(until_s=engine.now_s + 0.1)
        for _ in range(4):
            engine.send(100, 2, tenant="greedy", priority=9)
    engine.run(until_s=engine.now_s + 1.0)
    assert sum(running.is_reserved for running in engine.scheduler._life.running) == 4
    modest = engine.send(100, 10, tenant="modest")
    engine.run(until_s=engine.now_s + 0.5)
    assert modest.finished
    assert modest.ttft_s < 0.1
    engine.run()
    assert all(len(one.times_s) == 3000 for one in low), "every request ends"


def test_a_request_that_needs_nearly_all_pages_is_served_beside_a_stream_of_small_ones() -> None:
    engine = VirtualEngine(num_pages=100)
    giant = engine.send(64 * 90, 10, tenant="giant")

    def replace(ended: Served) -> None:
        if not giant.finished and ended is not giant:
            engine.send(64 * 8, 40, tenant="small")

    for _ in range(8):
        engine.send(64 * 8, 40, tenant="small")
    engine.run(until_s=60.0, on_end=replace)
    assert giant.finished


# --- who is refused --------------------------------------------------------------------------------------------


def test_a_deadline_is_judged_by_the_tenants_share_and_not_by_the_others_queue() -> None:
    engine = VirtualEngine(num_slots=16)
    for _ in range(500):
        engine.send(2000, 500, tenant="greedy", priority=9)
    engine.run(until_s=0.5)
    modest = engine.send(500, 50, tenant="modest", deadline_ms=3000.0)
    hopeless = engine.send(500, 50, tenant="greedy", deadline_ms=3000.0)
    assert (modest.error, hopeless.error) == (None, "OverloadedError")
    engine.run(until_s=4.0)
    assert modest.finished


@pytest.mark.parametrize(("max_waiting", "max_waiting_tokens"), [(10, 10**9), (10**6, 3000)])
def test_a_full_queue_still_takes_a_tenant_that_has_less_than_its_share_of_it(
    max_waiting: int, max_waiting_tokens: int
) -> None:
    engine = VirtualEngine(num_slots=2, max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens)
    greedy = [engine.send(300, 50, tenant="greedy") for _ in range(20)]
    modest = [engine.send(300, 50, tenant="modest") for _ in range(20)]
    assert sum(one.error is None for one in greedy) == 10
    assert sum(one.error is None for one in modest) == 5
    engine.run()
    assert all(one.finished for one in engine.served.values() if one.error is None)


# --- one tenant, many tenants ----------------------------------------------------------------------------------


def test_tenants_are_forgotten() -> None:
    engine = VirtualEngine()
    for number in range(200):
        engine.send(100 + number, 3, tenant=str(number))
        if number % 7 == 0:
            engine.run()
    engine.run()
    tenants = engine.scheduler._tenants
    assert (len(tenants), len(tenants._away), len(tenants._turns)) == (0, 0, 0)


def test_a_lone_tenant_is_planned_for_as_if_there_were_none() -> None:
    def plans(name: str) -> list[StepPlan]:
        engine, rng = VirtualEngine(num_slots=8, num_pages=400), random.Random(3)
        for _ in range(60):
            engine.run(until_s=engine.now_s + rng.expovariate(20.0))
            priority, target_ms = rng.choice([0, 3]), rng.choice([None, 12.0])
            length = rng.choice([50, 3000])
            engine.send(length, rng.randint(2, 200), tenant=name, priority=priority, itl_target_ms=target_ms)
        engine.run()
        return engine.plans

    assert plans("") == plans("somebody")
