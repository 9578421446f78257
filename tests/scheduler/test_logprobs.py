"""Log-probabilities of prompts: every row once and in order, whatever was cached, preempted or lost. `Harness` checks
what each step is asked, and what each request gets."""

import pytest

from tests.scheduler.harness import Harness, make_limits, make_submit

PROMPT = [(5 * position) % 11 for position in range(23)]


def test_rows_that_others_have_computed_are_computed_again_for_what_they_say() -> None:
    harness = Harness(make_limits())
    harness.add(make_submit(0, PROMPT, 2))
    harness.run()
    harness.add(make_submit(1, PROMPT, 2, prompt_logprobs=1))
    harness.add(make_submit(2, PROMPT, 2))
    harness.run()
    assert harness.senders[1].scored == list(range(len(PROMPT) - 1))
    starts = {request_id: start for step in harness.descriptions[::-1] for request_id, start, _ in step.chunks}
    assert starts[1] == 0
    assert starts[2] > 0, "who asks for none shares them as always"


@pytest.mark.parametrize("num_delivered", [0, 1, 2])
def test_what_comes_twice_after_a_preemption_counts_once(num_delivered: int) -> None:
    """It starts again while rows of it are in flight, with chunks that begin and end elsewhere."""
    harness = Harness(make_limits(steps_in_flight=8, max_scored_rows=5, prefix_cache=False))
    harness.add(make_submit(0, PROMPT, 3, logprobs=2, prompt_logprobs=0))
    for _ in range(3):
        harness.schedule()
    for _ in range(num_delivered):
        harness.deliver()
    life = harness.scheduler._life
    life.preemption.preempt(next(life.running.victims()))
    harness.add(make_submit(1, PROMPT[:6], 1, priority=9))  # leaves it fewer rows of the next step
    harness.run()
    assert harness.senders[0].scored == list(range(len(PROMPT) - 1))


def test_after_a_workers_death_only_what_had_not_arrived_is_asked_again() -> None:
    harness = Harness(make_limits(max_scored_rows=5))
    harness.add(make_submit(0, PROMPT, 3, prompt_logprobs=2))
    while harness.schedule() is not None:
        pass
    harness.die(num_delivered=1)
    num_arrived, num_plans = len(harness.senders[0].scored), len(harness.plans)
    assert num_arrived == 5
    harness.renew()
    harness.run()
    asked = sum(len(plan.scored_rows) // 12 for plan in harness.plans[num_plans:])
    assert asked == len(PROMPT) - 1 - num_arrived
