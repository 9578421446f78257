"""Any interleaving of requests, cancels, deadlines, plans and results keeps the promises of the policy.

The promises themselves are in `Harness`: it checks every plan, every row the fake worker computes and every output.
"""

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.worker_messages import Bucket, SamplerParams
from tests.scheduler.fake_worker import VOCABULARY
from tests.scheduler.harness import (
    BUCKETS,
    ESSENTIAL_BUCKETS,
    HEAVY_ROW_MS,
    LIGHT_ROW_MS,
    RARE_BUCKETS,
    Harness,
    Rows,
    make_limits,
    make_submit,
    most_positions,
)

NUM_OPERATIONS = 60_000

MANY_STEPS = 3000
"""In which everything ends that a test has begun."""

WINDOWS = ((None,), (None,), (5,), (None, 1), (None, 6), (None, 3, 3), (9, 2), (None, None))
"""Of page groups: a model without windows, one with nothing else, and layers of several kinds."""

MOST_PAGES = 63
"""Of larger pools some idle pages are made empty ahead of need, which the model of the cache cannot know."""

SAMPLERS = (SamplerParams(), SamplerParams(repetition_penalty=1.1), SamplerParams(presence_penalty=0.5))


def make_prompt(family: int, shared_len: int, own: int, prompt_len: int) -> list[int]:
    """The first `shared_len` tokens are those of the family, the others the request's own."""
    return [
        (7 * family + 3 * position + (own + 1) * (position >= shared_len)) % VOCABULARY
        for position in range(prompt_len)
    ]


def fitting(harness: Harness, prompt_len: int, max_tokens: int) -> tuple[int, int]:
    """Prompt length and max_tokens, cut to what the pool can ever hold."""
    positions = most_positions(harness.limits)
    max_tokens = min(max_tokens, positions)
    return min(prompt_len, positions - max_tokens + 1), max_tokens


MAX_MODEL_LEN = 64


class AnyInterleaving(RuleBasedStateMachine):
    harness: Harness

    @initialize(
        num_pages=st.integers(6, 20),
        page_size=st.sampled_from([1, 2, 4]),
        windows=st.sampled_from(WINDOWS),
        num_slots=st.integers(1, 4),
        max_chunks=st.integers(1, 3),
        token_budget=st.sampled_from([8, 10, 12]),
        steps_in_flight=st.integers(1, 3),
        prefix_cache=st.booleans(),
        bounds_pages=st.booleans(),
        prepares_at_once=st.booleans(),
        row_ms=st.sampled_from([LIGHT_ROW_MS, HEAVY_ROW_MS]),
        buckets=st.sampled_from([BUCKETS, ESSENTIAL_BUCKETS]),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        windows: tuple[int | None, ...],
        num_slots: int,
        max_chunks: int,
        token_budget: int,
        steps_in_flight: int,
        prefix_cache: bool,
        bounds_pages: bool,
        prepares_at_once: bool,
        row_ms: float,
        buckets: tuple[Bucket, ...],
    ) -> None:
        self.harness = Harness(
            make_limits(
                buckets=buckets,
                num_pages=num_pages if len(windows) == 1 else min(3 * num_pages, MOST_PAGES),
                page_size=page_size,
                windows=windows,
                num_slots=num_slots,
                max_chunks=max_chunks,
                token_budget=token_budget,
                steps_in_flight=steps_in_flight,
                prefix_cache=prefix_cache,
                max_chunk_pages=-(-MAX_MODEL_LEN // page_size) if bounds_pages else None,
                max_model_len=MAX_MODEL_LEN,
            ),
            prepares_at_once=prepares_at_once,
            row_ms=row_ms,
        )

    @rule(
        prompt_len=st.integers(1, 30),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 4),
        stops=st.booleans(),
        family=st.integers(0, 2),
        shared_len=st.integers(0, 20),
        priority=st.sampled_from([0, 0, 1, 9]),
        salt=st.sampled_from(["", "", "tenant"]),
        tenant=st.sampled_from(["", "", "one", "other"]),
        deadline_ms=st.sampled_from([None, None, 1000.0, 5000.0]),
        sampler=st.sampled_from(SAMPLERS),
        kills_in=st.sampled_from([None] * 9 + ["any", "chunks", "decodes"]),
        logprobs=st.sampled_from([None, None, 0, 2]),
        prompt_logprobs=st.sampled_from([None, None, 0, 1]),
        moved_with=st.sampled_from([None] * 5 + [0, 1, 2, 5]),
    )
    def add(
        self,
        prompt_len: int,
        max_tokens: int,
        min_tokens: int,
        stops: bool,
        family: int,
        shared_len: int,
        priority: int,
        salt: str,
        tenant: str,
        deadline_ms: float | None,
        sampler: SamplerParams,
        kills_in: Rows | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        moved_with: int | None,
    ) -> None:
        """moved_with: tokens of its output that another engine has emitted."""
        prompt_len, max_tokens = fitting(self.harness, prompt_len, max_tokens)
        request_id = len(self.harness.senders)
        submit = make_submit(
            request_id,
            make_prompt(family, shared_len, request_id, prompt_len),
            max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            stop=tuple(range(0, VOCABULARY, 4)) if stops else (),
            sampler=sampler,
            arrived_s=self.harness.now_s,
            priority=priority,
            cache_salt=salt,
            tenant=tenant,
            deadline_ms=deadline_ms,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        if moved_with is None:
            self.harness.add(submit)
        else:
            self.harness.add_moved(submit, moved_with)
        if request_id in self.harness.senders:
            self.harness.senders[request_id].kills_in = kills_in

    @precondition(lambda self: self.harness.senders)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.harness.cancel(data.draw(st.integers(0, len(self.harness.senders)), label="request_id"))

    @rule(seconds=st.sampled_from([0.1, 1.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.harness.now_s += seconds
        self.harness.expire()

    @rule(num_delivered=st.integers(0, 3))
    def die(self, num_delivered: int) -> None:
        """The worker group dies, perhaps while the one before has not begun to serve."""
        self.harness.die(num_delivered)

    @precondition(lambda self: not self.harness.is_dead)
    @rule(bucket=st.sampled_from(RARE_BUCKETS))
    def capture(self, bucket: Bucket) -> None:
        """The worker says so, perhaps only when requests are there again."""
        if bucket not in self.harness.captured:
            self.harness.capture(bucket)

    @precondition(lambda self: self.harness.is_dead)
    @rule()
    def renew(self) -> None:
        self.harness.renew()

    @rule(times=st.integers(1, 3))
    def schedule(self, times: int) -> None:
        for _ in range(times):
            in_flight = self.harness.scheduler.steps_in_flight
            if self.harness.schedule() is None:
                scheduler = self.harness.scheduler
                idle = self.harness.is_dead or (not scheduler.running and not scheduler.waiting)
                assert in_flight or idle, "there is work, nothing is in flight, and nothing was planned"
            assert self.harness.scheduler.steps_in_flight <= self.harness.limits.steps_in_flight

    @precondition(lambda self: self.harness.results)
    @rule()
    def deliver(self) -> None:
        """The oldest step in flight ends, or the worker ends of it."""
        if self.harness.fatal_steps()[0]:
            self.harness.die()
        else:
            self.harness.deliver()

    @rule(times=st.integers(1, 6))
    def serve(self, times: int) -> None:
        """The usual rhythm: as many plans as may be in flight, then one result."""
        for _ in range(times):
            while self.harness.schedule() is not None:
                pass
            if self.harness.results:
                self.deliver()

    @invariant()
    def every_page_has_the_holders_it_should(self) -> None:
        self.harness.check_page_owners()

    @invariant()
    def every_tenant_is_counted_right(self) -> None:
        self.harness.check_tenants()

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        for _ in range(MANY_STEPS):
            if self.harness.is_dead:
                self.harness.renew()
            while self.harness.schedule() is not None:
                pass
            if not self.harness.results:
                break
            self.deliver()
        self.harness.check_all_ended()
        for sender in self.harness.senders.values():
            assert sender.reason is None or sender.kills_in not in ("any", "chunks"), (
                "it ends every worker, and ended well"
            )


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(
    max_examples=120, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)


def any_submit(rng: random.Random, harness: Harness, tenants: Sequence[str]) -> Submit:
    prompt_len, max_tokens = fitting(harness, rng.randint(1, 40), rng.randint(1, 12))
    request_id = len(harness.senders)
    return make_submit(
        request_id,
        make_prompt(rng.randrange(3), rng.randrange(30), request_id, prompt_len),
        max_tokens,
        min_tokens=min(rng.choice([0, 0, 3]), max_tokens),
        stop=tuple(range(0, VOCABULARY, 4)) if rng.random() < 0.5 else (),
        sampler=rng.choice([SAMPLERS[0], SAMPLERS[0], *SAMPLERS]),
        arrived_s=harness.now_s,
        priority=rng.choice([0, 0, 0, 1, 9]),
        cache_salt=rng.choice(["", "", "tenant"]),
        tenant=rng.choice(tenants),
        deadline_ms=rng.choice([None, None, 100.0, 200.0]),
        itl_target_ms=rng.choice([None, 7.0, 30.0]),
        ttft_target_ms=rng.choice([None, 20.0]),
        tpot_target_ms=rng.choice([None, None, 3.0]),
    )


@pytest.mark.parametrize(
    ("seed", "tenants", "windows"),
    [
        (0, ("",), (None,)),
        (1, ("",), (None, 6)),
        (2, ("one", "other"), (None,)),
        (3, tuple("abcde"), (None, 3, 3)),
    ],
)
def test_tens_of_thousands_of_operations_lose_nothing(
    seed: int, tenants: tuple[str, ...], windows: tuple[int | None, ...]
) -> None:
    """Crowded pools of few pages, most of them shared, for as long as CI can spare."""
    rng = random.Random(seed)
    shared = copied = preempted = expired = refused = died = poisoned = rested = captured = 0
    left = NUM_OPERATIONS // 4
    while left > 0:
        harness = Harness(
            make_limits(
                buckets=rng.choice([BUCKETS, ESSENTIAL_BUCKETS]),
                num_pages=rng.randint(8, 40) if len(windows) == 1 else rng.randint(24, MOST_PAGES),
                page_size=rng.choice([2, 4]),
                windows=windows,
                num_slots=4,
                steps_in_flight=rng.choice([1, 2, 2, 3]),
                prefix_cache=rng.random() < 0.9,
            ),
            prepares_at_once=rng.random() < 0.5,
            row_ms=rng.choice([LIGHT_ROW_MS, HEAVY_ROW_MS]),
        )
        for _ in range(500):
            left -= 1
            harness.now_s += 0.001
            if rng.random() < 0.02 and (rare := [one for one in RARE_BUCKETS if one not in harness.captured]):
                harness.capture(rng.choice(rare))
                captured += 1
            match rng.choice(["add", "cancel", "schedule", "schedule", "schedule", "deliver", "deliver", "deliver"]):
                case "add" if harness.scheduler.waiting < 12:
                    harness.add(any_submit(rng, harness, tenants))
                case "cancel" if rng.random() < 0.2 and harness.senders:
                    harness.cancel(rng.randrange(len(harness.senders)))
                case "deliver" if harness.results:
                    harness.deliver()
                case "schedule" if rng.random() < 0.01:
                    harness.die(rng.randrange(3))
                    died += 1
                    harness.renew()
                case _:
                    expired += len(harness.expire())
                    harness.schedule()
            if left % 10 == 0:
                harness.check_page_owners()
                harness.check_tenants()
        harness.run()
        shared += harness.pages.num_hits
        copied += harness.pages.num_copies
        preempted += harness.scheduler.counters.preemptions
        refused += harness.scheduler.counters.refused
        poisoned += harness.scheduler.counters.poisoned
        rested += harness.num_rests
    assert (rested >= 10) == (len(tenants) > 1)
    assert min(shared, copied, preempted, expired, refused, died, captured) >= 10, (
        "the operations were meant to reach all of it"
    )


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_crowded_pool_preempts_often_and_loses_nothing(steps_in_flight: int) -> None:
    harness = Harness(make_limits(num_pages=10, page_size=2, steps_in_flight=steps_in_flight))
    for request_id in range(12):
        prompt = [(5 * request_id + position) % VOCABULARY for position in range(1 + request_id % 7)]
        harness.add(make_submit(request_id, prompt, max_tokens=9 + request_id % 5))
    harness.run()
    assert harness.scheduler.counters.preemptions >= 5
