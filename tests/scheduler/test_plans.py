"""Exact plans of small cases, at the edges of buckets, pages and budgets.

A plan is written as `bucket | chunks | decodes`: `8+2 | 0[0:8] 1[0:3]* | 2` computes 8 tokens of request 0 and the
3 of request 1, which then draws, and one decode row of request 2.
"""

import pytest

from graphgen.ipc.attended import Attended
from graphgen.ipc.step_schema import live_entries
from graphgen.ipc.worker_messages import Bucket, StepPlan
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.prompts import MAX_TIMES_PASSED
from tests.scheduler.harness import Harness, make_limits, make_submit


def prompt(length: int, request_id: int = 0) -> list[int]:
    """The prompts of two requests share nothing."""
    return [request_id, *range(1, length)]


def plan_of(harness: Harness) -> str:
    """Makes the next plan and writes it down; "-" for none."""
    plan = harness.schedule()
    if plan is None:
        return "-"
    step = harness.descriptions[-1]
    chunks = " ".join(
        f"{request_id}[{start}:{start + length}]{'*' if chunk.draws else ''}"
        for (request_id, start, length), chunk in zip(step.chunks, plan.chunks, strict=True)
    )
    return f"{plan.bucket} | {chunks} | {' '.join(map(str, sorted(step.decode_request_ids)))}".replace(
        "  ", " "
    ).strip()


def steady(harness: Harness, count: int) -> list[str]:
    """`count` plans, each made as early as steps_in_flight lets it."""
    plans = []
    for _ in range(count):
        plans.append(plan_of(harness))
        if len(harness.results) == harness.limits.steps_in_flight:
            harness.deliver()
    return plans


def new_pages(plan: StepPlan | None) -> list[tuple[int, int]]:
    """(slot, index in its block table) of the pages a plan gives."""
    assert plan is not None
    return [(slot, index) for _, slot, index, _ in live_entries(plan, "new_pages")]


def served(*prompt_lens: int, max_tokens: int = 4, prefix_cache: bool = True, **limits: int) -> Harness:
    harness = Harness(make_limits(prefix_cache=prefix_cache, **limits))  # type: ignore[arg-type]  # all others are ints
    for request_id, length in enumerate(prompt_lens):
        harness.add(make_submit(request_id, prompt(length, request_id), max_tokens))
    return harness


# --- decodes first, chunks fill the rest -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_len", "plans"),
    [
        (1, ["4+2 | 0[0:1]* |", "0+1 | | 0"]),
        (3, ["4+2 | 0[0:3]* |", "0+1 | | 0"]),
        (4, ["4+2 | 0[0:4]* |", "0+1 | | 0"]),
        (5, ["8+2 | 0[0:5]* |", "0+1 | | 0"]),
        (7, ["8+2 | 0[0:7]* |", "0+1 | | 0"]),
        (8, ["8+2 | 0[0:8]* |", "0+1 | | 0"]),
        (9, ["8+2 | 0[0:8] |", "4+2 | 0[8:9]* |", "0+1 | | 0"]),
        (16, ["8+2 | 0[0:8] |", "8+2 | 0[8:16]* |", "0+1 | | 0"]),
        (17, ["8+2 | 0[0:8] |", "8+2 | 0[8:16] |", "4+2 | 0[16:17]* |", "0+1 | | 0"]),
    ],
)
def test_a_prompt_is_split_at_the_budget_and_only_its_last_chunk_draws(prompt_len: int, plans: list[str]) -> None:
    harness = served(prompt_len, max_tokens=2, steps_in_flight=4)
    assert [plan_of(harness) for _ in plans] == plans
    harness.run()


@pytest.mark.parametrize(
    ("prompt_lens", "plan"),
    [
        ((3, 4), "8+2 | 0[0:3]* 1[0:4]* |"),
        ((3, 5), "8+2 | 0[0:3]* 1[0:5]* |"),
        ((3, 6), "8+2 | 0[0:3]* 1[0:5] |"),
        ((8, 1), "8+2 | 0[0:8]* |"),
        ((1, 1, 1, 1), "4+2 | 0[0:1]* 1[0:1]* 2[0:1]* |"),
    ],
)
def test_short_prompts_are_fused_until_rows_or_chunks_run_out(prompt_lens: tuple[int, ...], plan: str) -> None:
    harness = served(*prompt_lens)
    assert plan_of(harness) == plan
    harness.run()


def test_the_rest_of_a_split_prompt_is_first_in_line() -> None:
    harness = served(3, 6, 2, max_tokens=3)
    assert plan_of(harness) == "8+2 | 0[0:3]* 1[0:5] |"
    assert plan_of(harness) == "4+2 | 1[5:6]* 2[0:2]* | 0"
    harness.run()


def test_decodes_never_wait_for_a_prompt() -> None:
    harness = served(2, 2, 2, max_tokens=8)
    assert plan_of(harness) == "8+2 | 0[0:2]* 1[0:2]* 2[0:2]* |"
    harness.add(make_submit(3, prompt(20, 3), 2))
    assert plan_of(harness) == "8+4 | 3[0:8] | 0 1 2"
    harness.deliver()
    assert plan_of(harness) == "8+4 | 3[8:16] | 0 1 2"
    harness.deliver()
    assert plan_of(harness) == "4+4 | 3[16:20]* | 0 1 2"
    harness.deliver()
    assert plan_of(harness) == "0+4 | | 0 1 2 3"
    harness.run()


@pytest.mark.parametrize(("num_decodes", "bucket"), [(1, "0+1"), (2, "0+2"), (3, "0+4"), (4, "0+4")])
def test_without_prompts_the_smallest_decode_bucket_is_used(num_decodes: int, bucket: str) -> None:
    harness = served(*[1] * num_decodes, max_tokens=6, max_chunks=4)
    harness.schedule()
    assert plan_of(harness) == f"{bucket} | | {' '.join(map(str, range(num_decodes)))}"
    harness.run()


def test_padding_is_counted() -> None:
    harness = served(3, max_tokens=2)
    harness.run()
    # 4+2 with 3 tokens, then 0+1 with 1.
    assert (
        harness.scheduler.counters.padding_rows,
        harness.scheduler.counters.total_rows,
        harness.scheduler.counters.steps,
    ) == (3, 7, 2)


# --- steps in flight -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_plans_are_made_ahead_of_their_tokens_up_to_the_limit(steps_in_flight: int) -> None:
    harness = served(2, max_tokens=9, steps_in_flight=steps_in_flight)
    ahead = ["4+2 | 0[0:2]* |", "0+1 | | 0", "0+1 | | 0"]
    assert [plan_of(harness) for _ in range(steps_in_flight + 1)] == [*ahead[:steps_in_flight], "-"]
    harness.run()


def test_no_row_is_planned_past_max_tokens() -> None:
    harness = served(2, max_tokens=2, steps_in_flight=4)
    assert [plan_of(harness) for _ in range(3)] == ["4+2 | 0[0:2]* |", "0+1 | | 0", "-"]
    harness.run()


def test_the_slot_of_a_planned_last_token_serves_the_next_plan() -> None:
    harness = served(2, 3, max_tokens=1, num_slots=1)
    assert [plan_of(harness) for _ in range(2)] == ["4+2 | 0[0:2]* |", "4+2 | 1[0:3]* |"]
    assert {chunk.slot for plan in harness.plans for chunk in plan.chunks} == {0}
    harness.run()


def test_nothing_to_do_is_no_plan() -> None:
    harness = served()
    assert plan_of(harness) == "-"
    assert harness.scheduler.counters.steps == 0


# --- pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_len", "first", "growth"),
    [
        (3, [(0, 0)], [[], [(0, 1)], []]),
        (4, [(0, 0)], [[(0, 1)], [], []]),
        (5, [(0, 0), (0, 1)], [[], [], []]),
        (8, [(0, 0), (0, 1)], [[(0, 2)], [], []]),
    ],
)
def test_a_prompt_gets_all_its_pages_at_once_and_a_decode_one_when_it_crosses_a_border(
    prompt_len: int, first: list[tuple[int, int]], growth: list[list[tuple[int, int]]]
) -> None:
    harness = served(prompt_len, max_tokens=4, steps_in_flight=4)
    assert new_pages(harness.schedule()) == first
    assert [new_pages(harness.schedule()) for _ in range(3)] == growth
    harness.run()


def test_a_split_prompt_gets_its_pages_with_its_first_chunk_only() -> None:
    harness = served(10, max_tokens=1)
    assert new_pages(harness.schedule()) == [(0, 0), (0, 1), (0, 2)]
    assert new_pages(harness.schedule()) == []
    assert [[chunk.init is not None for chunk in plan.chunks] for plan in harness.plans] == [[True], [False]]
    harness.run()


@pytest.mark.parametrize(
    ("num_pages", "plan"), [(6, "8+2 | 0[0:7]* |"), (7, "8+2 | 0[0:7]* 1[0:1] |"), (8, "8+2 | 0[0:7]* 1[0:1] |")]
)
def test_admission_leaves_a_page_for_those_that_run(num_pages: int, plan: str) -> None:
    harness = served(7, 16, num_pages=num_pages)  # two pages and four
    assert plan_of(harness) == plan
    harness.run()


def test_a_lone_request_may_fill_the_pool() -> None:
    harness = served(24, max_tokens=1, num_pages=6)
    assert plan_of(harness) == "8+2 | 0[0:8] |"
    assert harness.scheduler.pages_free == 0
    harness.run()


def test_a_small_prompt_passes_a_big_one_that_does_not_fit() -> None:
    harness = served(12, 16, 2, num_pages=6, max_tokens=4)
    assert plan_of(harness) == "8+2 | 0[0:8] |"
    assert plan_of(harness) == "8+2 | 0[8:12]* 2[0:2]* |"
    harness.run()


def test_nothing_passes_a_big_prompt_after_the_age_limit() -> None:
    # Request 0 runs on and on; request 1 needs nearly the whole pool; small ones keep coming.
    harness = Harness(make_limits(num_pages=80, page_size=4, max_model_len=400))
    harness.add(make_submit(0, prompt(4, 0), 200))
    harness.schedule()
    harness.add(make_submit(1, prompt(315, 1), 2))
    passed = 0
    for request_id in range(2, 150):
        harness.add(make_submit(request_id, prompt(3, request_id), 1))
        while harness.schedule() is not None:
            passed += sum(entry[0] > 1 for entry in harness.descriptions[-1].chunks)
        harness.deliver()
    assert passed == MAX_TIMES_PASSED
    harness.run()
    order = [entry[0] for step in harness.descriptions for entry in step.chunks if entry[1] == 0]
    assert order.index(1) == 1 + MAX_TIMES_PASSED
    assert order[1:] == [*range(2, 2 + MAX_TIMES_PASSED), 1, *range(2 + MAX_TIMES_PASSED, 150)]


def test_waiting_alone_does_not_age_a_request() -> None:
    harness = Harness(make_limits(num_pages=80, max_model_len=400))
    harness.add(make_submit(0, prompt(4, 0), 200))
    harness.schedule()
    harness.add(make_submit(1, prompt(315, 1), 2))
    steady(harness, 2 * MAX_TIMES_PASSED)
    harness.add(make_submit(2, prompt(3, 2), 1))
    assert steady(harness, 1) == ["4+2 | 2[0:3]* | 0"]
    harness.run()


@pytest.mark.parametrize(("num_big", "passes"), [(7, True), (8, True), (9, False)])
def test_only_so_many_big_prompts_may_be_passed_in_a_plan(num_big: int, passes: bool) -> None:
    harness = served(40, *[40] * num_big, 1, num_pages=13, max_tokens=12)
    steady(harness, 8)
    started = {request_id for step in harness.descriptions for request_id, _, _ in step.chunks}
    assert started == ({0, num_big + 1} if passes else {0})
    harness.run()


# --- preemption ------------------------------------------------------------------------------------------------


def test_the_youngest_gives_its_pages_to_an_older_one_and_is_replayed_with_its_tokens() -> None:
    harness = served(4, 8, num_pages=5, max_tokens=8, prefix_cache=False)
    assert steady(harness, 5) == [
        "8+2 | 0[0:4]* 1[0:4] |",
        "4+2 | 1[4:8]* | 0",
        "0+2 | | 0 1",
        "0+2 | | 0 1",
        "0+2 | | 0 1",
    ]
    assert harness.scheduler.pages_free == 0
    assert len(harness.results) == 1  # the token of request 1 in it is still in flight
    assert steady(harness, 3) == ["0+1 | | 0"] * 3  # position 8 of request 0 needs a page
    assert (harness.scheduler.counters.preemptions, harness.scheduler.waiting) == (1, 1)
    # Four tokens of output had been drawn: prompt and output are computed again, then the fifth is drawn.
    assert steady(harness, 3) == ["8+2 | 1[0:8] |", "4+2 | 1[8:12]* |", "0+1 | | 1"]
    replay = harness.plans[8].chunks[0]
    first = harness.plans[0].chunks[1]
    assert replay.init == first.init
    assert replay.init is not None
    assert replay.init.prompt_len == 8
    harness.run()


def test_a_request_that_needs_a_page_is_preempted_itself_when_it_is_the_youngest() -> None:
    harness = served(4, 4, num_pages=5, max_tokens=12)
    assert steady(harness, 5) == ["8+2 | 0[0:4]* 1[0:4]* |", *["0+2 | | 0 1"] * 4]
    assert harness.scheduler.pages_free == 1  # both cross a page border in the next plan
    assert steady(harness, 1) == ["0+1 | | 0"]
    assert (harness.scheduler.counters.preemptions, harness.scheduler.pages_free) == (1, 2)
    harness.run()


def test_a_preempted_request_is_admitted_before_younger_ones() -> None:
    harness = served(4, 4, num_pages=5, max_tokens=12, prefix_cache=False)
    steady(harness, 5)
    harness.add(make_submit(2, prompt(20, 2), 1))
    harness.add(make_submit(3, prompt(20, 3), 1))
    harness.run()
    assert harness.scheduler.counters.preemptions == 1
    admitted = [request_id for step in harness.descriptions for request_id, start, _ in step.chunks if start == 0]
    assert admitted == [0, 1, 1, 2, 3]


def test_a_plan_that_preempts_admits_nobody() -> None:
    harness = served(4, 4, num_pages=5, max_tokens=12, steps_in_flight=1)
    steady(harness, 5)
    harness.add(make_submit(2, prompt(1, 2), 1))
    # Request 1 gave two pages back: one page for request 2 and one for the growth of request 0 are free.
    assert steady(harness, 2) == ["0+1 | | 0", "4+2 | 2[0:1]* | 0"]
    assert harness.scheduler.counters.preemptions == 1
    harness.run()


def test_a_preempted_request_returns_only_when_its_tokens_have_arrived() -> None:
    harness = served(4, 4, num_pages=5, max_tokens=12, steps_in_flight=3, prefix_cache=False)
    steady(harness, 5)
    assert plan_of(harness) == "0+1 | | 0"
    assert harness.scheduler.counters.preemptions == 1
    harness.cancel(0)
    harness.add(make_submit(2, prompt(1, 2), 1))
    harness.deliver()
    assert plan_of(harness) == "-"  # every page is free, but a token of request 1 is in flight
    harness.deliver()
    assert plan_of(harness) == "8+2 | 1[0:8] |"
    harness.run()


def test_a_preempted_request_can_be_cancelled() -> None:
    harness = served(4, 4, num_pages=5, max_tokens=12)
    steady(harness, 6)
    assert harness.scheduler.waiting == 1
    harness.cancel(1)
    assert harness.scheduler.waiting == 0
    harness.run()


def test_without_padding_a_plan_has_the_rows_that_hold_a_token_and_no_others() -> None:
    scheduler = Scheduler(make_limits(pads=False))
    scheduler.add(make_submit(1, range(5), 3))
    rows = []
    while (plan := scheduler.schedule(0.0)) is not None:
        rows.append(plan.bucket)
        description = scheduler.describe_step(plan.step_id)
        assert (description.bucket, description.padding_rows) == (plan.bucket, 0)
        scheduler.update(plan.step_id, [40])
    assert rows == [Bucket(5, 0), Bucket(0, 1), Bucket(0, 1)]
    assert (scheduler.counters.total_rows, scheduler.counters.padding_rows) == (7, 0)


@pytest.mark.parametrize(("prompt_len", "is_known"), [(4, False), (8, True)])
def test_without_padding_only_a_step_that_fills_its_bucket_says_how_long_it_takes(
    prompt_len: int, is_known: bool
) -> None:
    model = CostModel()
    scheduler = Scheduler(make_limits(pads=False, num_slots=2, buckets=(Bucket(0, 4), Bucket(8, 2))), model)
    scheduler.add(make_submit(1, range(prompt_len), 1))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.step_took(plan.step_id, 5.0, 0.005)
    assert (model.predict_ms(Bucket(8, 2), Attended()) is not None) == is_known


def test_a_step_that_says_little_of_its_bucket_lets_a_swing_of_the_clock_fade() -> None:
    model, bucket = CostModel(), Bucket(8, 2)
    for milliseconds in (5.0, 6.0):
        model.correct(bucket, Attended(), milliseconds)

    def room() -> float:
        bound_ms, predicted_ms = model.bound_ms(bucket, Attended()), model.predict_ms(bucket, Attended())
        assert bound_ms is not None
        assert predicted_ms is not None
        return bound_ms / predicted_ms

    before = room()
    scheduler = Scheduler(make_limits(pads=False, num_slots=2, buckets=(Bucket(0, 4), bucket)), model)
    scheduler.add(make_submit(1, range(2), 1))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.step_took(plan.step_id, 1.0, 0.001)
    assert room() < before - 0.02
