"""The worker's loop: plans in, results out, over a real channel and a device that computes when a test says so."""

import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import zmq

from graphgen import CheckpointError, EngineConfig
from graphgen.ipc.channel import Channel
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.worker_messages import (
    Bucket,
    Capture,
    Captured,
    Failed,
    Phase,
    Probe,
    Progress,
    SchedulerToWorker,
    Shutdown,
    StepPlan,
    StepResult,
    WorkerCounters,
    WorkerReady,
    WorkerToScheduler,
)
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.processes import EngineProcesses
from graphgen.launch.tokenizer_file import TokenizerPart
from graphgen.models.sampling import NO_TOKEN
from graphgen.requests.core import launch_config
from graphgen.worker import process
from graphgen.worker.ahead import KernelsAhead
from graphgen.worker.background import Background
from graphgen.worker.grammars import Draw, Verdicts
from graphgen.worker.outputs import StepOutputs
from graphgen.worker.runner import LaunchedStep

Message = TypeVar("Message")

SILENCE_S = 0.15
"""Long enough for a message that should not come."""
NAME = "worker-0"
IMPORTS = Phase("imports", 1.5)


class Point:
    """A mark that the test reaches."""

    def __init__(self, at_s: float = 0.0) -> None:
        self._reached = threading.Event()
        self.at_s = at_s
        self.error: Exception | None = None

    def reach(self) -> None:
        self._reached.set()

    def wait(self) -> float:
        assert self._reached.wait(10), "the test never reached it"
        if self.error is not None:
            raise self.error
        return self.at_s


class FakeGrammars:
    """Refuses the second draw of step 50, and gives the first one's grammar up."""

    def judge(self, draws: Sequence[Draw], token_ids: Sequence[int]) -> Verdicts:
        return Verdicts((1,), ((0, "too many states"),)) if token_ids[0] == 50 else Verdicts((), ())


class FakeRunner:
    """The device in a test's hands. A step draws its id and its id + 1, of four places in the host's tokens."""

    def __init__(
        self,
        config: LaunchConfig,
        report: Callable[[Progress], None],
        phases: Sequence[Phase],
        read_tokenizer: Callable[[], TokenizerPart],
        ranks: object = None,
        kernels: KernelsAhead | None = None,
    ) -> None:
        assert kernels is not None, "Triton's kernels are waited for"
        self.phases = tuple(phases)
        self.grammars = FakeGrammars()
        report(Progress("load", 1, 1))

    def describe(self) -> WorkerReady:
        return WorkerReady("fake", "none", False, False, (Bucket(0, 4),), 4, 8, 16, self.phases)

    def launch(self, plan: StepPlan, received_s: float) -> LaunchedStep:
        if plan.step_id < 0:
            raise RuntimeError(f"step {plan.step_id} cannot be launched")
        drawn = NO_TOKEN if plan.step_id == 99 else plan.step_id + 1
        step = LaunchedStep(
            step_id=plan.step_id,
            received_s=received_s,
            launched_s=time.monotonic(),
            started=Point(plan.step_id + 0.25),
            finished=Point(plan.step_id + 0.5),
            fetched=Point(),
            outputs=StepOutputs(
                {"token_ids": np.array([[plan.step_id], [-7], [drawn], [-7]], np.int32)}, live_rows=np.array([0, 2])
            ),
        )
        self.steps.put(step)
        return step

    def capture(self, bucket: Bucket) -> None:
        if bucket.num_rows > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more lines")
        if not bucket.num_rows:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def mark(self) -> Point:
        point = Point()
        self.marks.put(point)
        return point

    def close(self) -> None:
        pass

    # What a test looks at; of the class, because the loop makes the runner.
    steps: "queue.SimpleQueue[LaunchedStep]"
    marks: "queue.SimpleQueue[Point]"
    counters = WorkerCounters(graph_replays=3)


def token_ids(result: StepResult) -> list[int]:
    return unpack_int32(result.drawn.token_ids).tolist()


def reach(step: LaunchedStep) -> None:
    for point in (step.started, step.finished, step.fetched):
        assert isinstance(point, Point)
        point.reach()


class Loop:
    """`run` in a thread, and the scheduler's end of its channel."""

    def __init__(self, runner: type[FakeRunner]) -> None:
        self.runner = runner
        self.processes = EngineProcesses(modules=())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.channel: Channel[SchedulerToWorker, WorkerToScheduler] = Channel(
            self._context, self.processes.folder, NAME, "upper", WorkerToScheduler
        )
        launch_config(EngineConfig(device="cpu", step_times="off")).write(self.processes.folder)
        self.exit_code: object = "still running"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            context, kernels = Background("context", lambda: 0.0), KernelsAhead([sys.executable, "-c", ""])
            process.run(self.processes.folder, NAME, IMPORTS, context, kernels)
            self.exit_code = 0
        except SystemExit as end:
            self.exit_code = end.code

    def plan(self, step_id: int) -> None:
        self.channel.send(StepPlan(step_id=step_id, bucket=Bucket(0, 4), planned_s=0.0))

    def expect(self, kind: type[Message]) -> Message:
        message = self.channel.receive(5.0)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def becomes_ready(self) -> WorkerReady:
        """After its first word and what the runner reports."""
        assert [self.expect(Progress).phase for _ in range(2)] == ["device", "load"]
        return self.expect(WorkerReady)

    def is_silent(self) -> bool:
        return self.channel.receive(SILENCE_S) is None

    def launched(self) -> LaunchedStep:
        return self.runner.steps.get(timeout=5)

    def ends_with(self) -> object:
        """The exit code."""
        self.thread.join(5)
        return self.exit_code

    def close(self) -> None:
        self.channel.send(Shutdown())
        self.thread.join(5)
        self.channel.close()
        self._context.term()
        self.processes.stop(0.0)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    loop = start(monkeypatch, FakeRunner)
    loop.becomes_ready()
    yield loop
    loop.close()


def start(monkeypatch: pytest.MonkeyPatch, kind: type[FakeRunner]) -> Loop:
    runner = type("Runner", (kind,), {"steps": queue.SimpleQueue(), "marks": queue.SimpleQueue()})
    monkeypatch.setattr(process, "ModelRunner", runner)
    return Loop(runner)


def test_the_next_plan_is_launched_while_a_step_computes(loop: Loop) -> None:
    """What graphgen's overlap of planning and computing rests on: the loop waits for no step."""
    loop.plan(1)
    loop.plan(2)
    first, second = loop.launched(), loop.launched()
    assert (first.step_id, second.step_id) == (1, 2)
    assert loop.is_silent(), "no step has ended"
    reach(first)
    assert loop.expect(StepResult).step_id == 1
    reach(second)
    assert loop.expect(StepResult).step_id == 2


def test_results_come_in_the_order_of_the_plans(loop: Loop) -> None:
    for step_id in (1, 2, 3):
        loop.plan(step_id)
    first, second, third = (loop.launched() for _ in range(3))
    reach(third)
    reach(second)
    assert loop.is_silent()
    reach(first)
    assert [loop.expect(StepResult).step_id for _ in range(3)] == [1, 2, 3]


def test_a_result_is_sent_when_its_tokens_are_on_the_host_and_not_before(loop: Loop) -> None:
    loop.plan(4)
    step = loop.launched()
    assert isinstance(step.started, Point)
    assert isinstance(step.finished, Point)
    step.started.reach()
    step.finished.reach()
    assert loop.is_silent(), "the copy of its tokens is on its way"
    reach(step)
    assert token_ids(loop.expect(StepResult)) == [4, 5]


def test_a_result_carries_the_draws_that_were_asked_for_its_times_and_the_counters(loop: Loop) -> None:
    sent_s = time.monotonic()
    loop.plan(4)
    step = loop.launched()
    reach(step)
    result = loop.expect(StepResult)
    assert token_ids(result) == [4, 5]
    assert (result.started_s, result.finished_s) == (4.25, 4.5)
    assert sent_s <= result.received_s <= result.launched_s <= time.monotonic()
    assert result.counters == WorkerCounters(graph_replays=3)
    assert result.failed_draws == ()


def test_a_bucket_is_captured_when_the_scheduler_asks_and_plans_wait_for_it(loop: Loop) -> None:
    loop.channel.send(Capture(Bucket(0, 3)))
    loop.plan(5)
    captured = loop.expect(Captured)
    assert (captured.bucket, captured.milliseconds, captured.problem) == (Bucket(0, 3), None, "")
    reach(loop.launched())
    assert loop.expect(StepResult).step_id == 5


def test_a_bucket_without_memory_is_given_up_and_the_worker_serves_on(loop: Loop) -> None:
    loop.channel.send(Capture(Bucket(500, 12)))
    assert loop.expect(Captured).problem == "CUDA out of memory. Tried to allocate 20 GiB"
    loop.plan(5)
    reach(loop.launched())
    assert loop.expect(StepResult).step_id == 5


def test_any_other_failure_of_a_capture_ends_the_worker(loop: Loop) -> None:
    loop.channel.send(Capture(Bucket(0, 0)))
    assert "illegal memory access" in loop.expect(Failed).message
    assert loop.ends_with() == 1


def test_a_draw_that_failed_is_told_by_its_place(loop: Loop) -> None:
    loop.plan(99)
    reach(loop.launched())
    result = loop.expect(StepResult)
    assert (token_ids(result), result.failed_draws) == ([99, 0], (1,))


def test_a_probe_is_answered_by_the_device_behind_what_was_launched_before_it(loop: Loop) -> None:
    loop.plan(1)
    loop.channel.send(Probe(7))
    step, mark = loop.launched(), loop.runner.marks.get(timeout=5)
    mark.reach()
    assert loop.is_silent(), "the step before it has not ended"
    reach(step)
    assert loop.expect(StepResult).step_id == 1
    assert loop.expect(Probe) == Probe(7)


def test_a_probe_waits_for_an_idle_device_too(loop: Loop) -> None:
    """A device that hangs answers nothing, also when nothing was launched."""
    loop.channel.send(Probe(8))
    mark = loop.runner.marks.get(timeout=5)
    assert loop.is_silent()
    mark.reach()
    assert loop.expect(Probe) == Probe(8)


def test_a_shutdown_sends_what_has_ended_and_closes_the_device(loop: Loop) -> None:
    loop.plan(1)
    reach(loop.launched())
    loop.channel.send(Shutdown())
    assert loop.expect(StepResult).step_id == 1
    assert loop.ends_with() == 0
    assert loop.is_silent(), "an end that was asked for is no failure"


def test_the_device_is_closed_behind_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Closing(FakeRunner):
        def close(self) -> None:
            closed.append(True)

    loop = start(monkeypatch, Closing)
    loop.becomes_ready()
    loop.channel.send(Shutdown())
    assert loop.ends_with() == 0
    assert closed == [True]
    loop.close()


def test_a_plan_that_cannot_be_launched_ends_the_process_with_its_reason(loop: Loop) -> None:
    loop.plan(-1)
    assert loop.expect(Failed) == Failed("worker", "RuntimeError", "step -1 cannot be launched")
    assert loop.ends_with() == 1


def test_a_step_that_ends_after_the_process_has_failed_adds_no_words(
    loop: Loop, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An operator reads the last lines, which are to be those of the failure."""
    loop.plan(1)
    step = loop.launched()
    loop.plan(-1)
    assert loop.expect(Failed).message == "step -1 cannot be launched"
    assert loop.ends_with() == 1
    assert "step -1 cannot be launched" in caplog.text
    capfd.readouterr()
    caplog.clear()
    reach(step)
    for thread in [one for one in threading.enumerate() if one.name == "collector"]:
        thread.join(1.0)
    assert capfd.readouterr().err == ""
    assert not caplog.records


@pytest.mark.parametrize("error", [RuntimeError("an illegal address"), ValueError()])
def test_a_step_that_fails_is_told_once_and_no_result_follows(loop: Loop, error: Exception) -> None:
    loop.plan(1)
    loop.plan(2)
    first, second = loop.launched(), loop.launched()
    assert isinstance(first.fetched, Point)
    first.fetched.error = error
    reach(second)
    reach(first)
    assert loop.expect(Failed) == Failed("worker", type(error).__name__, f"a step failed: {str(error) or repr(error)}")
    assert loop.is_silent(), "what a broken device says is not to be believed"


def test_what_grammars_say_of_a_step_is_in_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = start(monkeypatch, FakeRunner)
    loop.becomes_ready()
    results = []
    for step_id in (49, 50):
        loop.plan(step_id)
        reach(loop.launched())
        results.append(loop.expect(StepResult))
    assert [result.refused_draws for result in results] == [(), (1,)]
    assert [result.failed_grammars for result in results] == [(), ((0, "too many states"),)]
    loop.close()


def test_a_start_that_fails_says_why_by_the_class_of_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeRunner):
        def __init__(self, *arguments: Any) -> None:
            raise CheckpointError("no weights")

    loop = start(monkeypatch, Broken)
    assert loop.expect(Progress) == Progress("device", 0, 0), "the first word, before anything that may hang"
    assert loop.expect(Failed) == Failed("worker", "CheckpointError", "no weights")
    assert loop.ends_with() == 1
    loop.close()


def test_the_start_tells_its_progress_and_then_its_phases_from_the_imports_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = start(monkeypatch, FakeRunner)
    ready = loop.becomes_ready()
    assert [phase.name for phase in ready.phases] == ["imports", "config", "context"]
    assert ready.phases[0] == IMPORTS
    assert ready.step_times is None
    loop.close()


def test_steps_run_in_inference_mode_and_with_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start had switched the collector off: a process that never collects grows."""
    gc.disable()
    try:
        seen: list[tuple[bool, bool]] = []

        class Watching(FakeRunner):
            def launch(self, plan: StepPlan, received_s: float) -> LaunchedStep:
                seen.append((gc.isenabled(), torch.is_inference_mode_enabled()))
                return super().launch(plan, received_s)

        loop = start(monkeypatch, Watching)
        loop.becomes_ready()
        loop.plan(1)
        reach(loop.launched())
        loop.expect(StepResult)
        loop.close()
    finally:
        gc.enable()
    assert seen == [(True, True)]
