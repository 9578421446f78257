"""The scheduler process: the loop that feeds the pure policy with messages, time and step results.

Owns the two channels, the clock and the step log. A result is answered with the next plan before anything else is
done with it, so that the worker always has a step to launch; the outputs go to the Engine after that, and what can wait
is done last.
"""

import gc
import math
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import zmq

from graphgen.base.descriptors import raise_descriptor_limit
from graphgen.ipc.channel import Channel
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.errors import DeadlineError, InvalidRequestError, OverloadedError
from graphgen.ipc.messages import (
    Attach,
    Cancel,
    EngineStats,
    EngineToScheduler,
    Failed,
    Outputs,
    Phase,
    Probe,
    Progress,
    Ready,
    Rejected,
    SchedulerToEngine,
    SchedulerToWorker,
    Shutdown,
    StatsRequest,
    StepResult,
    Submit,
    WorkerCounters,
    WorkerReady,
    WorkerToScheduler,
)
from graphgen.launch.config import LaunchConfig
from graphgen.launch.processes import end_with_parent
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.step_log import StepLog
from graphgen.scheduler.step_times import StepTimes
from graphgen.scheduler.warm_up import warm_up

EngineChannel = Channel[SchedulerToEngine, EngineToScheduler]
WorkerChannel = Channel[SchedulerToWorker, WorkerToScheduler]


def main(folder: Path, parent_pid: int) -> None:
    """Runs until Shutdown, the worker's failure, or the end of the parent."""
    end_with_parent(parent_pid, folder)
    raise_descriptor_limit()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    engine: EngineChannel = Channel(context, folder, "engine", "lower", EngineToScheduler)
    worker: WorkerChannel = Channel(context, folder, "worker", "upper", WorkerToScheduler)
    try:
        config = LaunchConfig.read(folder)
        ready = _wait_for_worker(engine, worker)
        if ready is not None:
            limits = _limits(config, ready)
            begun_s = time.monotonic()
            before_requests = warm_up(limits, worker.send, partial(_next_result, worker))
            ready = msgspec.structs.replace(ready, phases=(*ready.phases, Phase("warm-up", time.monotonic() - begun_s)))
            serves = Ready(ready, config.max_running, config.token_budget)
            with StepLog.open(config.step_log) as step_log:
                policy = Scheduler(limits, CostModel(ready.step_times))
                SchedulerLoop(policy, engine, worker, step_log, serves, before_requests).run()
        failed = None
    except WorkerFailedError as error:
        failed = error.failed  # as the worker said it: the Engine makes the exception of it that its user knows
    except BaseException as error:
        traceback.print_exc()
        failed = Failed("scheduler", type(error).__name__, str(error) or repr(error))
    if failed is not None:
        engine.send(failed)
    worker.send(Shutdown())
    worker.close(linger_s=1.0)
    engine.close(linger_s=1.0)
    context.term()
    sys.exit(0 if failed is None else 1)


class WorkerFailedError(Exception):
    """The worker said that it cannot go on."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(f"{failed.error}: {failed.message}")
        self.failed = failed


def _limits(config: LaunchConfig, ready: WorkerReady) -> SchedulerLimits:
    return SchedulerLimits(
        buckets=ready.buckets,
        num_pages=ready.num_pages,
        page_size=ready.page_size,
        max_running=config.max_running,
        max_chunks=ready.max_chunks,
        token_budget=config.token_budget,
        max_model_len=config.max_model_len,
        prefix_cache=config.prefix_cache,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        max_long_prompts=config.max_long_prompts,
        pads=ready.graphs,
    )


def _next_result(worker: WorkerChannel) -> StepResult:
    """Waits for it. Whoever wants to stop the start meanwhile ends this process."""
    while True:
        match worker.receive():
            case StepResult() as result:
                return result
            case Failed() as failed:
                raise WorkerFailedError(failed)


def _wait_for_worker(engine: EngineChannel, worker: WorkerChannel) -> WorkerReady | None:
    """Passes the worker's progress on until it is ready; None when the Engine wants to stop before that."""
    poller = zmq.Poller()
    poller.register(engine.receiver, zmq.POLLIN)
    poller.register(worker.receiver, zmq.POLLIN)
    while True:
        poller.poll()
        for message in worker.drain():
            match message:
                case Progress():
                    engine.send(message)
                case WorkerReady():
                    return message
                case Failed():
                    raise WorkerFailedError(message)
        # The Engine submits nothing before Ready.
        if any(isinstance(message, Shutdown) for message in engine.drain()):
            return None


class SchedulerLoop:
    """Messages in, plans and outputs out, for as long as the engine lives."""

    def __init__(
        self,
        policy: Scheduler,
        engine: EngineChannel,
        worker: WorkerChannel,
        step_log: StepLog,
        ready: Ready,
        before_requests: WorkerCounters,
    ) -> None:
        """before_requests: what the worker had counted when the first request could come."""
        self._policy = policy
        self._before_requests = before_requests
        self._ready = ready
        self._engine = engine
        self._worker = worker
        self._step_log = step_log
        self._step_times = StepTimes()
        self._counters = before_requests
        self._running = True

    def run(self) -> None:
        """Says Ready when nothing is left to do that the first request would wait for."""
        # Requests and messages make no cycles, so collections find nothing; a full one would hold up a plan.
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        poller = zmq.Poller()
        poller.register(self._engine.receiver, zmq.POLLIN)
        poller.register(self._worker.receiver, zmq.POLLIN)
        self._engine.send(self._ready)
        while self._running:
            poller.poll(self._patience_ms())
            answers = [answer for message in self._worker.drain() for answer in self._take_from_worker(message)]
            for engine_message in self._engine.drain():
                self._take_from_engine(engine_message)
            expired = self._policy.expire(time.monotonic())
            self._send_plans()
            for answer in (*answers, *expired):
                self._engine.send(answer)
            self._policy.prepare()

    def _patience_ms(self) -> int | None:
        """How long nothing may arrive before a deadline passes; None: for ever."""
        deadline_s = self._policy.next_deadline_s
        return None if deadline_s is None else max(0, math.ceil((deadline_s - time.monotonic()) * 1000.0))

    def _send_plans(self) -> None:
        """Keeps as many steps in flight as the policy allows."""
        while self._running and (plan := self._policy.schedule(time.monotonic())) is not None:
            self._worker.send(plan)

    def _take_from_worker(self, message: WorkerToScheduler) -> Sequence[Outputs | Rejected]:
        """What a step gave to its requests."""
        match message:
            case StepResult() as result:
                return self._take_result(result)
            case Failed() as failed:
                raise WorkerFailedError(failed)
            case Probe() as probe:
                self._engine.send(probe)
                return ()
            case Progress() | WorkerReady():
                return ()

    def _take_result(self, result: StepResult) -> Sequence[Outputs | Rejected]:
        if self._step_log.is_open:
            self._step_log.write(self._policy.describe_step(result.step_id), result)
        self._step_times.add(result.started_s, result.finished_s)
        self._policy.step_took(result.step_id, (result.finished_s - result.started_s) * 1000.0)
        self._counters = result.counters
        failed = self._policy.fail_draws(result.step_id, result.failed_draws) if result.failed_draws else []
        outputs = self._policy.update(result.step_id, unpack_int32(result.token_ids))
        return [outputs, *failed] if outputs else failed

    def _take_from_engine(self, message: EngineToScheduler) -> None:
        match message:
            case Submit() as submit:
                try:
                    self._policy.add(submit)
                except OverloadedError as error:
                    self._engine.send(
                        Rejected(submit.request_id, "OverloadedError", error.message, error.retry_after_s)
                    )
                except DeadlineError as error:
                    self._engine.send(Rejected(submit.request_id, "DeadlineError", str(error)))
                except InvalidRequestError as error:
                    self._engine.send(Rejected(submit.request_id, "InvalidRequestError", str(error)))
            case Cancel() as cancel:
                self._policy.cancel(cancel.request_id)
            case StatsRequest():
                self._step_log.flush()
                self._engine.send(self._stats())
            case Probe() as probe:
                self._worker.send(probe)
            case Attach():
                for request_id in self._policy.request_ids:
                    self._policy.cancel(request_id)
                self._engine.send(self._ready)
            case Shutdown():
                self._running = False

    def _stats(self) -> EngineStats:
        policy, counters, before = self._policy, self._policy.counters, self._before_requests
        p50, p95, p99, most = self._step_times.summary_ms()
        return EngineStats(
            running=policy.running,
            waiting=policy.waiting,
            pages_free=policy.pages_free,
            pages_total=policy.pages_total,
            steps=counters.steps,
            graph_replays=self._counters.graph_replays - before.graph_replays,
            eager_steps=self._counters.eager_steps - before.eager_steps,
            recompilations=self._counters.recompilations - before.recompilations,
            padding_share=counters.padding_rows / counters.total_rows if counters.total_rows else 0.0,
            preemptions=counters.preemptions,
            finished=counters.finished,
            step_ms_p50=p50,
            step_ms_p95=p95,
            step_ms_p99=p99,
            step_ms_max=most,
            pages_cached=policy.pages_cached,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            refused=counters.refused,
            deadline_misses=counters.deadline_misses,
            numerical_errors=counters.numerical_errors,
        )
