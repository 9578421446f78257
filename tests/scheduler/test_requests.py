"""How requests end: stop tokens, limits, cancels, late tokens, and requests that are refused."""

import pytest

from graphgen.ipc.engine_messages import FinishReason
from graphgen.ipc.errors import ConfigError, InvalidRequestError
from graphgen.ipc.worker_messages import Bucket, SamplerParams
from graphgen.scheduler.policy import Scheduler
from tests.scheduler.harness import Harness, make_limits, make_sender, make_submit, tokens_of

STOP = 7


def feed(scheduler: Scheduler, draw: list[int]) -> list[tuple[int, FinishReason | None]]:
    """Serves one request whose device draws the tokens of `draw`, one step at a time."""
    got: list[tuple[int, FinishReason | None]] = []
    tokens = iter(draw)
    while (plan := scheduler.schedule(0.0)) is not None:
        drawn = [next(tokens) for _ in range(plan.num_drawing_rows)]
        got += tokens_of(scheduler.update(plan.step_id, drawn)).values()
    return got


# --- finish reasons --------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_request_and_is_part_of_its_output() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(0, [1, 2], 5, stop=[STOP]))
    assert feed(scheduler, [3, 4, STOP, 5]) == [(3, None), (4, None), (STOP, "stop")]
    assert scheduler.counters.finished == 1


def test_a_request_ends_at_max_tokens() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(0, [1, 2], 3, stop=[STOP]))
    assert feed(scheduler, [3, 4, 5, 6]) == [(3, None), (4, None), (5, "length")]


def test_a_stop_token_at_max_tokens_is_a_stop() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(0, [1, 2], 2, stop=[STOP]))
    assert feed(scheduler, [3, STOP])[-1] == (STOP, "stop")


@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_min_tokens_counts_output_and_not_the_prompt(min_tokens: int) -> None:
    """Comparing it with prompt and output together would end this request at its first token."""
    scheduler = Scheduler(make_limits(max_model_len=128, num_pages=32))
    scheduler.add(make_submit(0, [1] * 50, 16, min_tokens=min_tokens, stop=[STOP]))
    got = feed(scheduler, [STOP] * 16)
    assert got == [(STOP, None)] * min_tokens + [(STOP, "stop")]


def test_the_device_is_told_where_stop_tokens_begin() -> None:
    harness = Harness(make_limits())
    harness.add(make_submit(0, [1, 2, 3], 4, min_tokens=2, stop=[STOP, 8]))
    plan = harness.schedule()
    assert plan is not None
    init = plan.chunks[0].init
    assert init is not None
    assert (init.prompt_len, init.min_length, init.stop_token_ids) == (3, 5, (STOP, 8))
    harness.run()


def test_times_are_copied_from_the_plan_of_the_first_chunk() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(0, list(range(10)), 2))
    plans = [scheduler.schedule(now_s) for now_s in (2.5, 3.5)]
    assert [plan.planned_s for plan in plans if plan is not None] == [2.5, 3.5]
    scheduler.update(0, [])
    (output,) = scheduler.update(1, [4]).outputs
    assert output.started_s == 2.5


# --- tokens that arrive late -----------------------------------------------------------------------------------


def stopping_early(request_id: int) -> Harness:
    """One slot, and a request whose first token is a stop token, which a second step is planned behind."""
    harness = Harness(make_limits(num_slots=1))
    prompt = [request_id, 2, 3]
    first = make_sender(make_submit(request_id, prompt, 1)).drawn[0]
    harness.add(make_submit(request_id, prompt, 6, stop=[first]))
    harness.schedule()
    harness.schedule()
    return harness


def test_the_row_behind_a_stop_token_is_dropped_and_never_reaches_the_slots_new_owner() -> None:
    harness = stopping_early(0)
    harness.add(make_submit(1, [9, 8], 3))
    (output,) = harness.deliver().outputs
    assert output.finish_reason == "stop"
    assert harness.schedule() is not None  # request 1, in the same slot
    assert harness.plans[2].chunks[0].slot == harness.plans[0].chunks[0].slot
    assert not harness.deliver()  # the wasted row of request 0
    harness.run()


def test_tokens_in_flight_of_a_cancelled_request_are_dropped() -> None:
    harness = Harness(make_limits(num_slots=1))
    harness.add(make_submit(0, [1, 2], 6))
    harness.add(make_submit(1, [3, 4], 6))
    harness.schedule()
    harness.schedule()
    harness.cancel(0)
    assert harness.scheduler.pages_free == harness.scheduler.pages_total
    assert not harness.deliver()
    assert harness.schedule() is not None
    assert harness.descriptions[-1].chunks == ((1, 0, 2),)
    assert not harness.deliver()
    harness.run()


def test_a_request_id_may_be_used_again_while_tokens_of_its_last_owner_are_in_flight() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(0, [1, 2], 6))
    scheduler.schedule(0.0)
    scheduler.cancel(0)
    scheduler.add(make_submit(0, [3, 4], 6))
    scheduler.schedule(0.0)
    assert not scheduler.update(0, [40])
    assert tokens_of(scheduler.update(1, [41])) == {0: (41, None)}


def test_cancelling_is_the_end_wherever_the_request_is() -> None:
    harness = Harness(make_limits(num_slots=2))
    for request_id in range(4):
        harness.add(make_submit(request_id, [request_id] * 6, 1 if request_id == 0 else 5))
    harness.schedule()  # 0 computed with nothing left to plan, 1 partly computed, 2 and 3 waiting
    assert (harness.scheduler.running, harness.scheduler.waiting) == (2, 2)
    for request_id in (3, 0, 1):
        harness.cancel(request_id)
    assert (harness.scheduler.running, harness.scheduler.waiting) == (0, 1)
    assert harness.scheduler.pages_free == harness.scheduler.pages_total
    harness.run()
    assert harness.senders[2].reason == "length"


def test_unknown_ids_and_second_cancels_are_ignored() -> None:
    harness = Harness(make_limits())
    harness.add(make_submit(0, [1], 2))
    harness.cancel(99)
    harness.cancel(0)
    harness.cancel(0)
    assert harness.schedule() is None
    assert harness.scheduler.counters.finished == 0


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "fits"), [(40, 9, True), (48, 1, True), (40, 10, False), (49, 1, False)]
)
def test_a_request_bigger_than_the_pool_is_refused(prompt_len: int, max_tokens: int, fits: bool) -> None:
    harness = Harness(make_limits(num_pages=12, page_size=4))  # 48 positions; the last token needs none
    submit = make_submit(0, [1] * prompt_len, max_tokens)
    if fits:
        harness.add(submit)
        harness.run()
    else:
        with pytest.raises(InvalidRequestError, match=r"13 pages of 4 positions, the KV cache has 12; .*num_pages"):
            harness.add(submit)
        assert harness.scheduler.waiting == 0


@pytest.mark.parametrize(("max_tokens", "fits"), [(23, True), (24, True), (25, False)])
def test_a_request_longer_than_the_context_is_refused(max_tokens: int, fits: bool) -> None:
    harness = Harness(make_limits(num_pages=30, max_model_len=64))
    submit = make_submit(0, [1] * 40, max_tokens)
    if fits:
        harness.add(submit)
        harness.run()
    else:
        with pytest.raises(InvalidRequestError, match="max_tokens is 25, max_model_len is 64: shorten"):
            harness.add(submit)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"), [([], 1, "prompt has 0 tokens"), ([1], 0, "max_tokens is 0")]
)
def test_an_empty_request_is_refused(prompt: list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Scheduler(make_limits()).add(make_submit(0, prompt, max_tokens))


def test_a_request_id_in_use_is_refused_and_its_owner_is_untouched() -> None:
    harness = Harness(make_limits())
    harness.add(make_submit(0, [1, 2], 3))
    with pytest.raises(InvalidRequestError, match="request id 0 is in use"):
        harness.scheduler.add(make_submit(0, [5], 1))
    harness.run()


@pytest.mark.parametrize(
    "name", ["num_pages", "page_size", "num_slots", "max_chunks", "token_budget", "steps_in_flight"]
)
def test_a_limit_of_zero_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        make_limits(**{name: 0})  # type: ignore[arg-type]  # the sizes among the limits are all ints


def test_more_slots_than_the_buckets_serve_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_slots is 5, the buckets within token_budget 12 serve at most 4"):
        Scheduler(make_limits(num_slots=5))


# --- results that do not match ---------------------------------------------------------------------------------


def test_a_result_out_of_order_or_of_another_size_changes_nothing() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(0, [1, 2], 3))
    with pytest.raises(ValueError, match="result of step 0 arrived, none is next"):
        scheduler.update(0, [5])
    scheduler.schedule(0.0)
    scheduler.schedule(0.0)
    with pytest.raises(ValueError, match="result of step 1 arrived, step 0 is next"):
        scheduler.update(1, [5])
    with pytest.raises(ValueError, match="step 0 returned 2 tokens, its plan has 1 drawing row"):
        scheduler.update(0, [5, 6])
    assert tokens_of(scheduler.update(0, [5])) == {0: (5, None)}


def test_only_steps_in_flight_are_described() -> None:
    scheduler = Scheduler(make_limits())
    scheduler.add(make_submit(3, [1, 2], 3))
    scheduler.schedule(0.0)
    step = scheduler.describe_step(0)
    assert (step.bucket, step.chunks, step.decode_request_ids, step.padding_rows) == (Bucket(4, 2), ((3, 0, 2),), (), 4)
    scheduler.update(0, [5])
    with pytest.raises(KeyError, match="step 0 is not in flight"):
        scheduler.describe_step(0)


# --- defects of DeepSpeed-MII that must not come back ----------------------------------------------------------


def test_a_preempted_request_keeps_its_output_and_its_prompt_length() -> None:
    """MII returned one token and a prompt length of 17 for the second of these."""
    harness = Harness(make_limits(num_pages=7))
    for request_id in range(2):
        harness.add(make_submit(request_id, [request_id + 1] * 6, 12))
    harness.run()
    assert harness.scheduler.counters.preemptions > 0
    assert [len(sender.received) for sender in harness.senders.values()] == [12, 12]
    inits = [chunk.init for plan in harness.plans for chunk in plan.chunks if chunk.init is not None]
    assert len(inits) == 2 + harness.scheduler.counters.preemptions
    assert {init.prompt_len for init in inits} == {6}


@pytest.mark.parametrize("num_pages", [5, 6, 7, 8])
def test_a_prompt_that_does_not_fit_yet_waits(num_pages: int) -> None:
    """MII asserted when the second prompt met the pages of the first, though each fits alone."""
    harness = Harness(make_limits(num_pages=num_pages))
    for request_id in range(2):
        harness.add(make_submit(request_id, [request_id + 1] * 18, 3))
    harness.run()


def test_a_prompt_bigger_than_the_pool_leaves_the_others_alone() -> None:
    harness = Harness(make_limits(num_pages=8))
    harness.add(make_submit(0, [1] * 18, 3))
    with pytest.raises(InvalidRequestError):
        harness.scheduler.add(make_submit(1, [2] * 40, 3))
    harness.add(make_submit(2, [3] * 18, 3))
    harness.run()


def test_requests_with_different_sampling_and_stop_tokens_share_a_step() -> None:
    """MII died on a batch in which one request had top_k or more stop strings than another."""
    samplers = [SamplerParams(), SamplerParams(temperature=1.0, top_k=5, seed=3), SamplerParams(top_p=0.5, seed=4)]
    stops: list[list[int]] = [[], [10], [11, 12, 13]]
    harness = Harness(make_limits())
    for request_id, (sampler, stop) in enumerate(zip(samplers, stops, strict=True)):
        harness.add(make_submit(request_id, [request_id, 2], 6, sampler=sampler, stop=stop))
    plan = harness.schedule()
    assert plan is not None
    inits = [chunk.init for chunk in plan.chunks if chunk.init is not None]
    assert [init.sampler for init in inits] == samplers
    assert [list(init.stop_token_ids) for init in inits] == stops
    harness.run()
