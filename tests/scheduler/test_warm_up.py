"""The steps before the first request: the same path as a request's, and nothing of them left behind."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import EngineStats, EngineToScheduler, Ready, SchedulerToEngine, StatsRequest
from graphgen.ipc.senders import engine_channel
from graphgen.ipc.worker_messages import Bucket, Shutdown, StepPlan, StepResult, WorkerCounters
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.loop import SchedulerLoop
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.senders import Senders
from graphgen.scheduler.step_log import StepLog
from graphgen.scheduler.warm_up import MAX_TOKENS, PROMPT_LEN, SAMPLERS, warm_up
from graphgen.scheduler.workers import Workers
from tests.fakes import READY, make_result
from tests.scheduler.fake_processes import FakeProcesses
from tests.scheduler.fake_worker import FakeWorker
from tests.scheduler.harness import make_limits


class Worker:
    """Answers plans in their order; `fails`: its logits are never numbers."""

    def __init__(self, limits: SchedulerLimits, fails: bool = False) -> None:
        self.plans: list[StepPlan] = []
        self._worker = FakeWorker(limits.num_pages, limits.page_size, limits.windows)
        self._results: list[StepResult] = []
        self._fails = fails

    def send(self, plan: StepPlan) -> None:
        tokens, _ = self._worker.execute(plan)
        self.plans.append(plan)
        failed = tuple(range(len(tokens))) if self._fails else ()
        counters = WorkerCounters(graph_replays=len(self.plans))
        self._results.append(make_result(plan.step_id, tokens, counters=counters, failed_draws=failed))

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
    assert sum(plan.num_decodes for plan in worker.plans) == (MAX_TOKENS - 1) * len(SAMPLERS)
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
    limits = make_limits(num_slots=1, buckets=(Bucket(0, 1), Bucket(4, 1)))
    worker = Worker(limits)
    warm_up(limits, worker.send, worker.receive)
    assert all(len(plan.decode_slots) <= 4 for plan in worker.plans)


@pytest.fixture
def collector() -> Iterator[None]:
    """The garbage collector as it was: the loop is its process's last word on it."""
    before = gc.get_threshold()
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class WatchedChannel(Channel[SchedulerToEngine, EngineToScheduler]):
    """Notes how many objects are out of the collector's sight when the engine is ready."""

    frozen_at_ready = 0

    def send(self, message: SchedulerToEngine) -> None:
        if isinstance(message, Ready):
            self.frozen_at_ready = gc.get_freeze_count()
        super().send(message)


def test_ready_is_said_when_nothing_is_left_to_do_and_counters_count_from_there(
    tmp_path: Path, collector: None
) -> None:
    """The policy exists before the loop does; what is left of a start, the collector's last run, comes before Ready."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    engine = WatchedChannel(context, tmp_path, engine_channel(), "lower", EngineToScheduler)
    user: Channel[EngineToScheduler, SchedulerToEngine] = Channel(
        context, tmp_path, engine_channel(), "upper", SchedulerToEngine
    )
    workers = Workers(tmp_path, 0, context, FakeProcesses(tmp_path))
    before = WorkerCounters(graph_replays=7, eager_steps=1, recompilations=2)
    loop = SchedulerLoop(Scheduler(make_limits()), Senders([engine]), workers, StepLog(None), READY, before)
    user.send(StatsRequest())
    user.send(Shutdown())
    loop.run()
    received = [user.receive(5.0), user.receive(5.0)]
    engine.close()
    user.close()
    workers.end(0.0)
    context.term()
    assert engine.frozen_at_ready > 0
    assert received[0] == READY
    stats = received[1]
    assert isinstance(stats, EngineStats)
    assert (stats.graph_replays, stats.eager_steps, stats.recompilations) == (0, 0, 0)
