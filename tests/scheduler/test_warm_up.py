"""The steps before the first request: the same path as a request's, and nothing of them left behind."""

import pytest

from graphgen.ipc.codec import pack_int32
from graphgen.ipc.messages import Bucket, StepPlan, StepResult, WorkerCounters
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.warm_up import MAX_TOKENS, PROMPT_LEN, SAMPLERS, warm_up
from tests.scheduler.fake_worker import FakeWorker
from tests.scheduler.harness import make_limits


class Worker:
    """Answers plans in their order; `fails`: its logits are never numbers."""

    def __init__(self, limits: SchedulerLimits, fails: bool = False) -> None:
        self.plans: list[StepPlan] = []
        self._worker = FakeWorker(limits.num_pages, limits.page_size)
        self._results: list[StepResult] = []
        self._fails = fails

    def send(self, plan: StepPlan) -> None:
        tokens, _ = self._worker.execute(plan)
        self.plans.append(plan)
        failed = tuple(range(len(tokens))) if self._fails else ()
        counters = WorkerCounters(graph_replays=len(self.plans))
        self._results.append(
            StepResult(plan.step_id, pack_int32(tokens), 0.0, 0.0, 0.0, 0.0, counters, failed_draws=failed)
        )

    def receive(self) -> StepResult:
        assert self._results, "waited for a result that no plan brings"
        return self._results.pop(0)


def test_prompts_and_decodes_pass_with_every_rule_of_a_draw() -> None:
    limits = make_limits()
    worker = Worker(limits)
    counters = warm_up(limits, worker.send, worker.receive)
    chunks = [chunk for plan in worker.plans for chunk in plan.chunks]
    assert sum(chunk.length for chunk in chunks) == PROMPT_LEN * len(SAMPLERS)
    assert [chunk.init.sampler for chunk in chunks if chunk.init is not None] == list(SAMPLERS)
    assert sum(len(plan.decode_slots) // 4 for plan in worker.plans) == (MAX_TOKENS - 1) * len(SAMPLERS)
    assert counters.graph_replays == len(worker.plans)
    assert worker._results == [], "nothing is in flight when the first request comes"


def test_a_model_without_numbers_starts_too() -> None:
    limits = make_limits()
    worker = Worker(limits, fails=True)
    warm_up(limits, worker.send, worker.receive)
    assert worker._results == []


@pytest.mark.parametrize(
    ("max_model_len", "num_pages", "page_size", "runs"),
    [(MAX_TOKENS, 12, 4, False), (MAX_TOKENS + 1, 12, 4, True), (64, 1, 4, True), (64, 1, MAX_TOKENS, False)],
)
def test_the_smallest_engines_have_room_for_it_or_go_without(
    max_model_len: int, num_pages: int, page_size: int, runs: bool
) -> None:
    limits = make_limits(max_model_len=max_model_len, num_pages=num_pages, page_size=page_size)
    worker = Worker(limits)
    warm_up(limits, worker.send, worker.receive)
    assert bool(worker.plans) == runs


def test_an_engine_of_one_slot_takes_one_after_another() -> None:
    limits = make_limits(max_running=1, buckets=(Bucket(0, 1), Bucket(4, 1)))
    worker = Worker(limits)
    warm_up(limits, worker.send, worker.receive)
    assert all(len(plan.decode_slots) <= 4 for plan in worker.plans)
