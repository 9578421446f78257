"""The loop of the scheduler process: in which order messages leave, and what becomes of each that comes in."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import msgspec
import pytest

from graphgen.ipc.engine_messages import (
    STEP_BOUNDS_MS,
    Attach,
    Cancel,
    EngineStats,
    EngineToScheduler,
    Outputs,
    Ready,
    Rejected,
    StatsRequest,
    Submit,
)
from graphgen.ipc.worker_messages import (
    Bucket,
    Capture,
    Captured,
    Probe,
    Shutdown,
    StepPlan,
    StepResult,
    WorkerCounters,
)
from graphgen.scheduler import captures
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.loop import SchedulerLoop
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.senders import Senders
from graphgen.scheduler.step_log import StepLog
from graphgen.scheduler.workers import State
from tests.fakes import READY, make_result
from tests.scheduler.harness import ESSENTIAL_BUCKETS, make_limits, make_submit, tokens_of

Sent = tuple[str, object]
TURN, PREPARED = "turn", "prepared"
RARE = (Bucket(0, 1), Bucket(0, 2), Bucket(4, 2))
UNFIT = (Bucket(0, 2),)
"""Of which the fake cannot make a graph."""


class FakeEngine:
    """Says one batch of a script in each turn of the loop, then Shutdown."""

    def __init__(self, script: list[list[EngineToScheduler]], log: list[Sent]) -> None:
        self._script = deque(script)
        self._log = log
        self.receiver, self._writer = os.pipe()
        os.write(self._writer, b"!")  # there is always something to read

    def drain(self) -> Iterator[EngineToScheduler]:
        yield from self._script.popleft() if self._script else [Shutdown()]

    def send(self, message: object) -> None:
        self._log.append(("engine", message))

    def close(self) -> None:
        os.close(self.receiver)
        os.close(self._writer)


class FakeWorkers:
    """A group that answers in each turn the oldest thing it was sent; `answers` says whether it does."""

    state = State.SERVING
    num_restarts = 0
    look_s = None

    def __init__(self, log: list[Sent], answers: Callable[[int], bool]) -> None:
        self._log = log
        self._answers = answers
        self._inbox: deque[StepPlan | Probe | Capture] = deque()
        self._num_turns = 0

    def register(self, poller: object) -> None:
        pass

    def find_loss(self) -> None:
        return None

    def step_succeeded(self) -> None:
        pass

    def send(self, message: StepPlan | Probe | Capture) -> None:
        self._log.append(("worker", message))
        self._inbox.append(message)

    def receive(self, patience_s: float) -> Iterator[StepResult | Probe | Captured]:
        self._log.append((TURN, self._num_turns))
        self._num_turns += 1
        if not self._inbox or not self._answers(self._num_turns):
            return
        match self._inbox.popleft():
            case StepPlan() as plan:
                yield make_result(plan.step_id, [7] * plan.num_drawing_rows, finished_s=0.01)
            case Probe() as probe:
                yield probe
            case Capture() as capture:
                yield Captured(capture.bucket, 0.125, problem="no memory" if capture.bucket in UNFIT else "")


def run_loop(
    script: list[list[EngineToScheduler]],
    limits: SchedulerLimits | None = None,
    answers: Callable[[int], bool] = lambda turn: True,
    ready: Ready = READY,
) -> list[Sent]:
    """What was sent to whom, turn by turn."""
    log: list[Sent] = []
    policy = Scheduler(limits or make_limits())
    prepare = policy.prepare

    def note() -> None:
        log.append((PREPARED, None))
        prepare()

    policy.prepare = note  # type: ignore[method-assign]  # a test looks on
    engine, workers = FakeEngine(script, log), FakeWorkers(log, answers)
    try:
        # Any: the fakes have what is used of a Channel and of Workers.
        loop = SchedulerLoop(
            policy,
            Senders([cast(Any, engine)]),
            cast(Any, workers),
            StepLog(None),
            ready,
            before_requests=WorkerCounters(),
        )
        loop.run()
    finally:
        engine.close()
    return log


def turns_of(log: list[Sent]) -> list[list[Sent]]:
    turns: list[list[Sent]] = []
    for entry in log:
        if entry[0] == TURN:
            turns.append([])
        elif turns:
            turns[-1].append(entry)
    return turns


def sent(log: list[Sent], kind: type) -> list[Any]:  # messages of this kind
    return [message for _, message in log if isinstance(message, kind)]


def place(turn: list[Sent], kind: type) -> int | None:
    return next((index for index, (_, message) in enumerate(turn) if isinstance(message, kind)), None)


NOTHING: list[list[EngineToScheduler]] = [[] for _ in range(12)]


@pytest.fixture(autouse=True)
def _collector_as_it_was() -> Iterator[None]:
    """The loop sets the collector's thresholds for its process."""
    import gc

    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_a_result_is_answered_with_the_next_plan_before_its_outputs_leave() -> None:
    log = run_loop([[make_submit(0, [1, 2], 8), make_submit(1, [3, 4], 8)], *NOTHING])
    both = [turn for turn in turns_of(log) if place(turn, StepPlan) is not None and place(turn, Outputs) is not None]
    assert len(both) >= 5
    for turn in both:
        plan, outputs = place(turn, StepPlan), place(turn, Outputs)
        assert plan is not None
        assert outputs is not None
        assert plan < outputs
    tokens = [tokens_of(outputs) for outputs in sent(log, Outputs)]
    assert sum(len(of_one) for of_one in tokens) == 16, "all of them leave in the end"


def test_what_can_wait_is_done_when_everything_has_left() -> None:
    log = run_loop([[make_submit(0, [1, 2], 8)], *NOTHING])
    for turn in turns_of(log)[:-1]:
        assert turn[-1][0] == PREPARED
        assert sum(entry[0] == PREPARED for entry in turn) == 1


def test_two_steps_are_in_flight_before_a_result_is_there() -> None:
    log = run_loop([[make_submit(0, [1, 2], 8)], [], []], answers=lambda turn: False)
    assert [plan.step_id for plan in sent(log, StepPlan)] == [0, 1]
    assert not sent(log, Outputs)


def test_a_probe_comes_back_from_the_device_and_not_from_here() -> None:
    """Behind the steps in flight: while the worker says nothing, there is no answer."""
    script: list[list[EngineToScheduler]] = [[make_submit(0, [1, 2], 8)], [Probe(5)], [], []]
    silent = run_loop(script, answers=lambda turn: False)
    assert ("engine", Probe(5)) not in silent
    to_worker = [message for who, message in silent if who == "worker"]
    assert isinstance(to_worker[0], StepPlan)
    assert [message for message in to_worker if isinstance(message, Probe)] == [Probe(1)], "its number here"
    answering = run_loop([*script, *NOTHING])
    assert answering.index(("worker", Probe(1))) < answering.index(("engine", Probe(5)))
    assert sent(answering, Probe) == [Probe(1), Probe(5)]


def test_whatever_cannot_be_served_is_rejected_with_its_reason_and_the_rest_goes_on() -> None:
    limits = make_limits(max_waiting=1)
    late = make_submit(4, [1], 4, deadline_ms=1.0)
    log = run_loop([[make_submit(0, [1, 2], 3), make_submit(1, [1], 1), make_submit(2, [], 1), late], *NOTHING], limits)
    rejected = {one.request_id: one for one in sent(log, Rejected)}
    assert {number: one.error for number, one in rejected.items()} == {
        1: "OverloadedError",
        2: "InvalidRequestError",
        4: "OverloadedError",
    }
    assert rejected[1].retry_after_s > 0
    assert rejected[2].retry_after_s is None
    assert sum(len(outputs) for outputs in sent(log, Outputs)) == 3


def test_a_deadline_that_passes_is_told_after_the_plan_that_does_without_the_request() -> None:
    log = run_loop([[make_submit(0, [1, 2], 30, deadline_ms=0.001, arrived_s=0.0), make_submit(1, [5], 6)], *NOTHING])
    turn = next(turn for turn in turns_of(log) if place(turn, Rejected) is not None)
    (rejected,) = sent(log, Rejected)
    assert (rejected.request_id, rejected.error) == (0, "DeadlineError")
    plan, told = place(turn, StepPlan), place(turn, Rejected)
    assert plan is not None
    assert told is not None
    assert plan < told
    assert {number for outputs in sent(log, Outputs) for number in tokens_of(outputs)} == {1}


def test_an_engine_that_takes_anothers_place_ends_its_requests() -> None:
    log = run_loop([[make_submit(0, [1, 2], 30), make_submit(1, [3], 30)], [], [], [Attach()], [StatsRequest()], []])
    (stats,) = sent(log, EngineStats)
    assert (stats.running, stats.waiting, stats.finished) == (0, 0, 0)
    assert stats.pages_free == stats.pages_total
    attached = max(index for index, (_, message) in enumerate(log) if isinstance(message, Ready))
    assert not sent(log[attached:], StepPlan)


def test_a_cancelled_request_is_in_no_later_plan() -> None:
    log = run_loop([[make_submit(0, [1, 2], 30)], [], [Cancel(0)], *NOTHING])
    cancelled = next(index for index, entry in enumerate(log) if entry == (TURN, 2))
    assert not sent(log[cancelled:], StepPlan)
    assert not sent(log[cancelled:], Rejected)


def test_no_plan_leaves_after_the_order_to_end() -> None:
    log = run_loop([[make_submit(0, [1, 2], 30)], [], [Shutdown()]])
    assert not sent(turns_of(log)[-1], StepPlan)
    assert isinstance(log[0][1], Ready), "the first thing that is said"
    assert all(not isinstance(message, Submit) for _, message in log)


def test_steps_are_kept_only_while_somebody_asks_for_them() -> None:
    """And each is told once: rows by kind, in order."""
    watch = StatsRequest(steps=True)
    log = run_loop([[make_submit(0, [1, 2, 3], 6), StatsRequest()], *NOTHING[:2], [watch], *NOTHING[:3], [watch], []])
    first, before, after = sent(log, EngineStats)
    assert not first.recent_steps
    assert not before.recent_steps, "nobody had asked"
    steps = after.recent_steps
    assert [step.step_id for step in steps] == list(range(steps[0].step_id, steps[-1].step_id + 1))
    assert steps[0].step_id > 0
    assert {(step.chunk_rows, step.decode_rows, step.padding_rows) for step in steps} == {(0, 1, 0)}


def test_statistics_count_rows_by_kind_and_steps_by_bucket() -> None:
    log = run_loop([[make_submit(0, [1, 2, 3], 2)], *NOTHING, [StatsRequest()], []])
    (stats,) = sent(log, EngineStats)
    # 4+2 with 3 tokens of the prompt, then 0+1 with a decode; a step of the fake takes 10 ms.
    assert (stats.total_rows, stats.padding_rows, stats.decode_rows) == (7, 3, 1)
    assert [(str(one.bucket), one.steps, one.milliseconds) for one in stats.buckets] == [("0+1", 1, 10), ("4+2", 1, 10)]
    (within,) = [bound for bound, count in zip(STEP_BOUNDS_MS, stats.steps_within_ms, strict=False) if count]
    assert (within, sum(stats.steps_within_ms)) == (10, 2)


def test_statistics_say_how_many_wait_in_each_class() -> None:
    submits = [make_submit(number, [1], 30, priority=priority) for number, priority in enumerate((0, 0, 0, 3, 9, 3))]
    (stats,) = sent(run_loop([[*submits, StatsRequest()], []]), EngineStats)
    assert stats.waiting_by_class == (3, 0, 0, 2, 0, 0, 0, 0, 0, 1)


# --- buckets that are captured later -----------------------------------------------------------------------------


def run_with_rare_buckets(
    script: list[list[EngineToScheduler]],
    monkeypatch: pytest.MonkeyPatch,
    answers: Callable[[int], bool] = lambda turn: True,
) -> list[Sent]:
    """An engine that may capture as soon as it is idle."""
    monkeypatch.setattr(captures, "QUIET_S", 0.0)
    buckets = (*RARE, *ESSENTIAL_BUCKETS)
    ready = msgspec.structs.replace(READY, worker=msgspec.structs.replace(READY.worker, buckets=buckets, rare=RARE))
    return run_loop(script, make_limits(buckets=ESSENTIAL_BUCKETS), answers, ready)


def test_rare_buckets_are_captured_one_at_a_time_while_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    log = run_with_rare_buckets(
        [*NOTHING[:3], [make_submit(0, [1, 2], 4)], *NOTHING, [StatsRequest()], []], monkeypatch
    )
    asked = [index for index, (_, message) in enumerate(log) if isinstance(message, Capture)]
    assert [log[index][1] for index in asked] == [Capture(bucket) for bucket in reversed(RARE)]
    turns = [index for index, (who, _) in enumerate(log) if who == TURN]
    assert all(any(one < turn < other for turn in turns) for one, other in pairwise(asked))
    steps = [index for index, (_, message) in enumerate(log) if isinstance(message, StepPlan | Outputs)]
    assert not any(steps[0] < index < steps[-1] for index in asked), "a step waited for a capture"
    (stats,) = sent(log, EngineStats)
    assert (stats.buckets_captured, stats.buckets_total, stats.capture_ms_max) == (6, 7, 125.0), "one found no memory"


def test_a_step_uses_a_bucket_when_the_worker_has_said_that_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes while a bucket is on its way is planned at once, for what there is."""
    answering = [False] * 3 + [True] * 40
    script: list[list[EngineToScheduler]] = [[], [make_submit(0, [1, 2], 6)], *NOTHING, [make_submit(1, [1], 3)]]
    log = run_with_rare_buckets([*script, *NOTHING], monkeypatch, answers=lambda turn: answering[turn])
    plans = sent(log, StepPlan)
    assert [str(plan.bucket) for plan in plans[:2]] == ["4+4", "0+4"], "planned before the answer"
    assert str(plans[-1].bucket) == "0+1"
    captured = [index for index, entry in enumerate(log) if entry == ("worker", Capture(Bucket(4, 2)))]
    first_plan = log.index(("worker", plans[0]))
    assert captured[0] < first_plan
    assert sum(len(outputs) for outputs in sent(log, Outputs)) == 9
