"""Decodes of a tenant that has many rest in turns, so that another's tokens come at the rate of its half.

What must hold of any plan in which decodes rest is in `Harness`, and random interleavings of it are in
`test_state_machine`.
"""

from collections.abc import Callable

import pytest

from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.lone_steps import MOST_TENANTS
from graphgen.scheduler.rests import TURN_STEPS
from tests.scheduler.harness import HEAVY_ROW_MS, Harness, make_limits, make_submit
from tests.scheduler.virtual_time import Served, VirtualEngine, even_step_ms, full_step_ms, percentile, slow_step_ms

MORE, LESS = 1.25, 0.75
"""Within a quarter."""

StepMs = Callable[[Bucket], float]
DEVICES = pytest.mark.parametrize(
    ("step_ms", "token_budget", "num_slots"),
    [(full_step_ms, 1024, 256), (even_step_ms, 512, 64), (slow_step_ms, 256, 192), (slow_step_ms, 256, 8)],
    ids=["gpu", "even rows", "cpu", "cpu of 8 slots"],
)
LOADS = pytest.mark.parametrize(
    ("greedy_prompt", "greedy_output"),
    [(40, 3000), (600, 40), (900, 400)],
    ids=["outputs", "prompts and outputs", "long prompts and outputs"],
)


class Shared:
    """A modest tenant's requests, one after another, beside as many of a greedy one as there are slots, and more."""

    def __init__(self, step_ms: StepMs, token_budget: int, num_slots: int, greedy: tuple[int, int] | None) -> None:
        self.engine = VirtualEngine(token_budget=token_budget, num_slots=num_slots, step_ms=step_ms)
        self._greedy = greedy
        for _ in range(0 if greedy is None else num_slots + 20):
            self._send_greedy()
        self.run(4.0)

    def _send_greedy(self) -> None:
        assert self._greedy is not None
        self.engine.send(*self._greedy, tenant="greedy", priority=9)

    def _replace(self, ended: Served) -> None:
        if ended.submit.tenant == "greedy":
            self._send_greedy()

    def run(self, seconds: float) -> None:
        self.engine.run(until_s=self.engine.now_s + seconds, on_end=self._replace)

    def serve_modest(self, prompt_len: int, output_len: int) -> Served:
        served = self.engine.send(prompt_len, output_len, tenant="modest")
        while not served.finished:
            self.run(0.01)
        return served


def middle(served: list[Served]) -> tuple[float, float]:
    """Seconds to the first token, and of a gap."""
    gaps_s = [(one.times_s[-1] - one.times_s[0]) / (len(one.times_s) - 1) for one in served]
    return percentile([one.ttft_s for one in served], 50), percentile(gaps_s, 50)


@DEVICES
@LOADS
@pytest.mark.parametrize("prompt_len", [20, 200])
def test_however_many_others_decode_first_token_and_rate_are_those_of_a_half(
    step_ms: StepMs, token_budget: int, num_slots: int, greedy_prompt: int, greedy_output: int, prompt_len: int
) -> None:
    alone = Shared(step_ms, token_budget, num_slots, None)
    beside = Shared(step_ms, token_budget, num_slots, (greedy_prompt, greedy_output))
    first_s, gap_s = middle([alone.serve_modest(prompt_len, 40) for _ in range(3)])
    served = []
    for _ in range(3):
        served.append(beside.serve_modest(prompt_len, 40))
        beside.run(1.0)
    beside_first_s, beside_gap_s = middle(served)
    # When it comes the steps in flight are the other's alone.
    in_flight_s = 2 * percentile(beside.engine.step_times_ms, 99) / 1000.0
    assert beside_first_s <= MORE * 2 * first_s + in_flight_s
    assert 1 / beside_gap_s >= LESS / gap_s / 2


@DEVICES
def test_decodes_that_rest_take_turns(step_ms: StepMs, token_budget: int, num_slots: int) -> None:
    """And none is left out: each of them gets as many tokens as any other."""
    shared = Shared(step_ms, token_budget, num_slots, (40, 3000))
    before = {number: len(one.times_s) for number, one in shared.engine.served.items() if one.times_s}
    num_plans = len(shared.engine.plans)
    shared.serve_modest(20, 2000)
    rows = [plan.num_decodes for plan in shared.engine.plans[num_plans:]]
    assert percentile(rows, 50) < num_slots, "nobody rested"
    requests = [one.request for one in shared.engine.scheduler._life.running if one.request.request_id in before]
    stayed = [request.request_id for request in requests if not request.num_preemptions]
    gained = [len(shared.engine.served[number].times_s) - before[number] for number in stayed]
    assert min(gained) > 0
    assert max(gained) - min(gained) <= 2 * TURN_STEPS + 0.1 * max(gained)


@DEVICES
def test_a_tenant_that_is_alone_again_decodes_in_every_plan(step_ms: StepMs, token_budget: int, num_slots: int) -> None:
    shared = Shared(step_ms, token_budget, num_slots, (40, 3000))
    shared.serve_modest(20, 40)
    shared.run(3.0)
    running = shared.engine.scheduler._life.running
    assert not running.resting
    assert len(running.decodes) + len(running.begun) == len(running)


@DEVICES
def test_nobody_rests_where_tenants_have_as_many_decodes(step_ms: StepMs, token_budget: int, num_slots: int) -> None:
    engine = VirtualEngine(token_budget=token_budget, num_slots=num_slots, step_ms=step_ms)
    for number in range(num_slots):
        engine.send(20, 60, tenant="one" if number % 2 else "other")
    while len(engine.scheduler._life.running.decodes) < num_slots:
        engine.run(until_s=engine.now_s + 0.01)
        assert engine.scheduler._life.running.begun or not engine.scheduler._life.running.resting
    engine.run(until_s=engine.now_s + 1.0)
    assert not engine.scheduler._life.running.resting


def test_beside_very_many_tenants_nobody_rests() -> None:
    """A step is never so long as many times another: and a plan does not look at each of them."""
    shared = Shared(slow_step_ms, 256, 8, (40, 3000))
    shared.engine.send(20, 300, tenant="modest")
    while not shared.engine.scheduler._life.running.resting:
        shared.run(0.01)
    for number in range(MOST_TENANTS):
        shared.engine.send(20, 300, tenant=str(number))
    shared.run(1.0)
    assert not shared.engine.scheduler._life.running.resting


# --- what may happen to a request that rests -------------------------------------------------------------------


def with_rests(num_pages: int = 40, deadline_ms: float | None = None) -> Harness:
    """Three decodes of one tenant and one of another; some of the first rest."""
    harness = Harness(make_limits(num_pages=num_pages), row_ms=HEAVY_ROW_MS)
    for number in range(3):
        harness.add(make_submit(number, [number, 5, 6], 30, tenant="greedy", deadline_ms=deadline_ms))
    harness.add(make_submit(3, [9, 8, 7], 30, tenant="modest"))
    while not resting(harness):
        harness.schedule()
        harness.deliver()
    return harness


def resting(harness: Harness) -> list[int]:
    return [one.request.request_id for one in harness.scheduler._life.running.resting]


def test_a_request_that_rests_can_be_cancelled() -> None:
    harness = with_rests()
    harness.cancel(resting(harness)[0])
    harness.check_page_owners()
    harness.check_tenants()
    harness.run()


def test_a_request_that_rests_can_miss_its_deadline() -> None:
    harness = with_rests(deadline_ms=1000.0)
    harness.now_s = 2.0
    assert harness.expire() == [0, 1, 2]
    harness.check_page_owners()
    harness.check_tenants()
    harness.run()


def test_a_token_that_cannot_be_drawn_ends_a_request_that_rests_by_then() -> None:
    harness = with_rests()
    tenant = harness.scheduler._requests[0].tenant
    while not (found := [number for number in resting(harness) if number in draws(harness)]):
        if harness.schedule() is None:
            harness.deliver()
    place = draws(harness).index(found[0])
    (rejected,) = harness.scheduler.fail_draws(harness.results[0][0], [place])
    assert rejected.request_id == found[0]
    harness.senders[found[0]].cancelled = True
    assert tenant.num_all_decodes == 2
    harness.check_page_owners()
    harness.check_tenants()
    harness.run()


def draws(harness: Harness) -> list[int]:
    """The requests that the oldest step in flight draws for."""
    if not harness.results:
        return []
    record = harness.scheduler._life.in_flight.find(harness.results[0][0])
    return [request.request_id for request in record.drawing]


def test_a_request_that_rests_outlives_its_worker() -> None:
    harness = with_rests()
    harness.die()
    assert not resting(harness)
    harness.renew()
    harness.run()


def test_a_request_that_rests_can_be_preempted_and_loses_no_token() -> None:
    """Pages run out while it rests; its token may be in flight."""
    for num_pages in range(9, 20):
        harness = with_rests(num_pages)
        harness.run()
        if harness.scheduler.counters.preemptions:
            break
    assert harness.scheduler.counters.preemptions
    assert harness.num_rests > 10


def test_a_request_that_rested_computes_and_shares_what_it_would_have_without() -> None:
    """The pages that it enters into the prefix cache hold its tokens: the next turn of a chat finds them."""
    harness = with_rests()
    harness.run()
    for number in range(3):
        sender = harness.senders[number]
        harness.add(make_submit(10 + number, [*sender.prompt, *sender.received, 1], 2, tenant="greedy"))
    harness.run()
    assert harness.pages.num_hits >= 3
