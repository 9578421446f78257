"""A row whose logits are not numbers ends its request, and nothing it computed reaches another one."""

from collections import deque
from collections.abc import Sequence

import pytest

from graphgen.ipc.engine_messages import Rejected
from graphgen.scheduler.policy import Scheduler
from tests.scheduler.fake_worker import FakeWorker
from tests.scheduler.harness import make_limits, make_submit, tokens_of

PROMPT = list(range(1, 11))  # two full pages of 4 and half of a third
OTHER = list(range(21, 28))


class Steps:
    """A scheduler and a worker, with two steps in flight; rows of the bad requests fail to draw."""

    def __init__(self, bad: Sequence[int], num_pages: int = 12, after: int = 0) -> None:
        """bad: ids of requests whose draws fail once they have got `after` tokens."""
        self.scheduler = Scheduler(make_limits(num_pages=num_pages))
        self._worker = FakeWorker(num_pages, 4)
        self._bad = set(bad)
        self._after = after
        self._in_flight: deque[tuple[int, list[int], list[int]]] = deque()
        self.received: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.rejected: list[Rejected] = []
        self.shared: dict[int, int] = {}

    def run(self) -> None:
        while True:
            while (plan := self.scheduler.schedule(0.0)) is not None:
                step = self.scheduler.describe_step(plan.step_id)
                tokens, _ = self._worker.execute(plan)
                drawing = [
                    entry[0] for entry, chunk in zip(step.chunks, plan.chunks, strict=True) if chunk.draws
                ] + list(step.decode_request_ids)
                self._in_flight.append((plan.step_id, tokens, drawing))
                self.scheduler.prepare()
            if not self._in_flight:
                return
            step_id, tokens, drawing = self._in_flight.popleft()
            failed = [
                place
                for place, request_id in enumerate(drawing)
                if request_id in self._bad and len(self.received.get(request_id, ())) >= self._after
            ]
            self.rejected += self.scheduler.fail_draws(step_id, failed)
            outputs = self.scheduler.update(step_id, [0 if n in failed else t for n, t in enumerate(tokens)])
            for output in outputs.outputs:
                self.shared[output.request_id] = output.cached_tokens
            for request_id, (token_id, reason) in tokens_of(outputs).items():
                self.received.setdefault(request_id, []).append(token_id)
                if reason is not None:
                    self.reasons[request_id] = reason


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_failed_draw_ends_its_request_alone_and_frees_its_pages(after: int) -> None:
    alone = Steps([])
    alone.scheduler.add(make_submit(2, OTHER, 6))
    alone.run()
    steps = Steps([1], after=after)
    steps.scheduler.add(make_submit(1, PROMPT, 8))
    steps.scheduler.add(make_submit(2, OTHER, 6))
    steps.run()
    assert [(one.request_id, one.error) for one in steps.rejected] == [(1, "NumericalError")]
    assert f"after {after} of at most 8 tokens" in steps.rejected[0].message
    assert len(steps.received.get(1, [])) == after
    assert steps.received[2] == alone.received[2], "the neighbour in the same steps"
    scheduler = steps.scheduler
    assert (scheduler.running, scheduler.waiting, scheduler.pages_free) == (0, 0, 12)
    assert (scheduler.counters.numerical_errors, scheduler.counters.finished) == (1, 1)


@pytest.mark.parametrize("max_tokens", [1, 8])  # with 1 its pages were given back when its plan was made
def test_what_a_failed_request_computed_is_never_shared(max_tokens: int) -> None:
    steps = Steps([1])
    steps.scheduler.add(make_submit(1, PROMPT, max_tokens))
    steps.run()
    assert steps.scheduler.pages_cached == 0
    for request_id in (2, 3):
        steps.scheduler.add(make_submit(request_id, PROMPT, 8))
        steps.run()
    assert (steps.shared[2], steps.shared[3]) == (0, 9), "computed anew once, then shared again"
    assert steps.received[2] == steps.received[3]


def test_pages_that_it_had_from_others_are_not_shared_further() -> None:
    """They may be what is wrong: else every later request with this prefix would fail as well."""
    steps = Steps([2])
    steps.scheduler.add(make_submit(1, PROMPT, 2))
    steps.run()
    unrelated = steps.scheduler.pages_cached
    steps.scheduler.add(make_submit(3, OTHER, 2))
    steps.run()
    unrelated = steps.scheduler.pages_cached - unrelated
    steps.scheduler.add(make_submit(2, PROMPT, 2))
    steps.run()
    assert [one.request_id for one in steps.rejected] == [2]
    assert steps.scheduler.pages_cached == unrelated > 0, "other prompts keep theirs"
    steps.scheduler.add(make_submit(4, PROMPT, 2))
    steps.run()
    assert steps.shared[4] == 0


def test_a_request_that_was_preempted_meanwhile_ends_where_it_waits() -> None:
    steps = Steps([1])
    scheduler = steps.scheduler
    scheduler.add(make_submit(1, PROMPT, 8))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    while not any(chunk.draws for chunk in plan.chunks):
        scheduler.update(plan.step_id, [])
        plan = scheduler.schedule(0.0)
        assert plan is not None
    scheduler.prepare()
    scheduler._life.preemption.preempt(next(iter(scheduler._life.running)))  # as a request of a higher class would
    assert scheduler.waiting == 1
    assert [one.request_id for one in scheduler.fail_draws(plan.step_id, [0])] == [1]
    assert len(scheduler.update(plan.step_id, [0])) == 0
    assert (scheduler.running, scheduler.waiting, scheduler.pages_cached, scheduler.pages_free) == (0, 0, 0, 12)
