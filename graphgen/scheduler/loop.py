"""The scheduler's loop: it feeds the pure policy with messages, time and step results.

Owns the clock, and what is measured of steps and losses; requests are the policy's, the worker group is
`graphgen.scheduler.workers`'. A result is answered with the next plan before its outputs go to the senders of its
requests (`graphgen.scheduler.senders`), so that the worker always has a step to launch; what can wait is done last.

A worker group that dies, hangs or sends what cannot be is replaced, and every request goes on where it was: the policy
keeps them all. Made and run by `graphgen.scheduler.process`.
"""

import gc
import logging
import math
import time
from collections.abc import Sequence

import msgspec
import zmq

from graphgen.base.garbage import leave_imports_alone
from graphgen.ipc.engine_messages import (
    Attach,
    Blamed,
    Cancel,
    EngineStats,
    EngineToScheduler,
    Notice,
    Outputs,
    Ready,
    Rejected,
    ReportRequest,
    SenderEnded,
    StatsRequest,
    StepSummary,
    Submit,
)
from graphgen.ipc.errors import DeadlineError, InvalidRequestError, OverloadedError
from graphgen.ipc.step_schema import unpack_columns
from graphgen.ipc.worker_messages import (
    Capture,
    Captured,
    Failed,
    Probe,
    Progress,
    Shutdown,
    StepResult,
    WorkerCounters,
    WorkerReady,
    WorkerToScheduler,
)
from graphgen.scheduler.captures import Captures
from graphgen.scheduler.policy import Scheduler
from graphgen.scheduler.recent_steps import RecentSteps
from graphgen.scheduler.request import Request
from graphgen.scheduler.senders import Senders
from graphgen.scheduler.step_log import StepLog
from graphgen.scheduler.step_times import StepTimes
from graphgen.scheduler.step_watch import LOOK_S, StepWatch, Verdict
from graphgen.scheduler.workers import LAST_RESULTS_S, Loss, State, Workers

logger = logging.getLogger("graphgen.scheduler")

TOLD_S = 0.05
"""Phases of a new worker's start that are told."""

SHOWN_REQUESTS = 20
"""Of those that a line of the log names."""


def _difference(one: WorkerCounters, other: WorkerCounters) -> WorkerCounters:
    names = WorkerCounters.__struct_fields__
    return WorkerCounters(**{name: getattr(one, name) - getattr(other, name) for name in names})


def _names(requests: Sequence[Request]) -> str:
    """For the log: as many as a line holds."""
    shown = ", ".join(request.log_id for request in requests[:SHOWN_REQUESTS])
    more = len(requests) - SHOWN_REQUESTS
    return f"requests {shown or '-'}" + (f" and {more} more" if more > 0 else "")


class SchedulerLoop:
    """Messages in, plans and outputs out, for as long as the engine lives."""

    def __init__(
        self,
        policy: Scheduler,
        senders: Senders,
        workers: Workers,
        step_log: StepLog,
        ready: Ready,
        before_requests: WorkerCounters,
    ) -> None:
        """ready: what the first worker group said; the ones after it have as many pages. before_requests: what it had
        counted when the first request could come."""
        self._policy = policy
        self._before_requests = before_requests
        self._ready = ready
        self._senders = senders
        self._workers = workers
        self._step_log = step_log
        self._step_times = StepTimes()
        self._captures = Captures(ready.worker.rare, len(ready.worker.buckets), time.monotonic())
        self._recent_steps = [RecentSteps() for _ in range(len(senders))]
        self._watch = StepWatch(time.monotonic(), steps_compile=ready.worker.compiled and not ready.worker.graphs)
        self._shows_stacks = False  # the worker was asked for them
        self._counters = before_requests
        self._probes: dict[int, tuple[int, Probe]] = {}  # on their way to the device, and whose each is
        self._num_probes = 0
        self._lost_s: float | None = None  # when the group that is being replaced was lost
        self._last_loss = ""
        self._last_pause_s = 0.0
        self._running = True

    def run(self) -> None:
        """Says Ready when nothing is left to do that the first request would wait for."""
        # Requests and messages make no cycles, so collections find nothing.
        leave_imports_alone()
        gc.set_threshold(100_000, 50, 100)
        poller = self._make_poller()
        self._senders.tell(self._ready)
        while self._running:
            poller.poll(self._patience_ms())
            answers = self._hear_workers()
            for sender, engine_message in self._senders.drain():
                self._take_from_engine(sender, engine_message)
            expired = self._policy.expire(time.monotonic())
            self._send_plans()
            self._ask_for_capture()
            for answer in (*answers, *expired):
                self._senders.answer(answer)
            self._policy.prepare()
            if self._workers.look_s is not None and self._follow_workers():
                poller = self._make_poller()

    def _make_poller(self) -> zmq.Poller:
        """Wakes for the senders' messages and for whatever happens to the worker group of this moment."""
        poller = zmq.Poller()
        self._senders.register(poller)
        self._workers.register(poller)
        return poller

    def _patience_ms(self) -> int | None:
        """How long nothing may arrive before there is something to look at; None: for ever."""
        now_s = time.monotonic()
        capture_s = self._captures.due_s if self._policy.is_idle else None
        at_s = (self._policy.next_deadline_s, self._workers.look_s, capture_s)
        times_s = [when_s - now_s for when_s in at_s if when_s is not None]
        if len(self._watch):
            times_s.append(LOOK_S)
        return max(0, math.ceil(min(times_s) * 1000.0)) if times_s else None

    def _send_plans(self) -> None:
        """Keeps as many steps in flight as the policy allows."""
        while self._running and (plan := self._policy.schedule(time.monotonic())) is not None:
            self._workers.send(plan)
            self._watch.sent(self._policy.predict_ms(plan.step_id), plan.num_tokens)

    def _ask_for_capture(self) -> None:
        """Of one more bucket, when nothing has run or waited for a while."""
        if self._running and (bucket := self._captures.next(self._policy.is_idle, time.monotonic())) is not None:
            self._workers.send(Capture(bucket))

    # --- the worker group ------------------------------------------------------------------------------------

    def _hear_workers(self) -> list[Outputs | Rejected]:
        """What has arrived of the group, and the end of it if it has ended or cannot go on."""
        loss = self._workers.find_loss()
        answers: list[Outputs | Rejected] = []
        try:
            for message in self._workers.receive(0.0 if loss is None else LAST_RESULTS_S):
                if isinstance(message, Failed):
                    said = f"{message.message}\n{self._workers.last_words(message.where)}"
                    loss = Loss(f"the {message.where} failed with {message.error}", said, message)
                elif self._workers.state is State.SERVING:
                    answers += self._take_from_worker(message)
        except (msgspec.MsgspecError, ValueError, KeyError) as error:
            loss = Loss(f"the worker sent what cannot be ({error})", self._workers.last_words())
        loss = loss or self._find_hang()
        if loss is not None:
            answers += self._lose(loss)
        return answers

    def _find_hang(self) -> Loss | None:
        verdict = self._watch.look(time.monotonic())
        if verdict is Verdict.FINE:
            self._shows_stacks = False
            return None
        if verdict is Verdict.LATE:
            if not self._shows_stacks:
                logger.warning("a step takes far longer than it should: the worker's stacks are in its output")
                self._workers.processes.show_stacks()
                self._shows_stacks = True
            return None
        return Loss("the worker hung: a step did not end", self._workers.last_words())

    def _lose(self, loss: Loss) -> list[Outputs | Rejected]:
        """The group is gone or has to go. Every request waits for the next one; who fails of it is returned."""
        if self._workers.state is State.SERVING:
            self._lost_s = time.monotonic()
        self._captures.worker_lost()
        suspects = self._policy.suspects()
        poisoned = self._policy.worker_lost()
        self._watch.forget()
        self._before_requests = _difference(self._before_requests, self._counters)  # the next one counts from 0
        self._counters = WorkerCounters()
        self._last_loss = loss.reason
        notice = f"{loss.reason}; {self._policy.waiting} requests wait for the worker that replaces it"
        logger.warning("%s. Its last words:\n%s", notice, loss.last_words)
        logger.warning("it computed %s", _names(suspects))
        if poisoned:
            logger.error("given up, since workers die of them: %s", _names(poisoned))
        self._senders.tell(Notice(notice))
        blamed = [request for request in suspects if request not in poisoned]
        if blamed:
            counts = tuple(request.num_fruitless_deaths for request in blamed)
            self._senders.answer(Blamed(tuple(request.request_id for request in blamed), counts))
        self._workers.replace(loss, self._ready.worker)
        return [self._policy.fail_poisoned(request, loss.last_words) for request in poisoned]

    def _follow_workers(self) -> bool:
        """The way from a dead group to one that serves; whether there are other processes to watch than before."""
        if self._workers.advance():
            return True
        ready = self._workers.take_ready()
        if ready is not None:
            self._renew(ready)
        return False

    def _renew(self, ready: WorkerReady) -> None:
        """The requests go on with the new group."""
        self._policy.renew(ready.step_times)
        self._captures.restart(time.monotonic())
        assert self._lost_s is not None, "a group that replaces another"
        self._last_pause_s = time.monotonic() - self._lost_s
        start = ", ".join(f"{phase.name} {phase.seconds:.1f}" for phase in ready.phases if phase.seconds >= TOLD_S)
        notice = (
            f"a new worker serves after {self._last_pause_s:.1f} s ({start or 'no phase of its start took long'});"
            f" {self._policy.waiting} requests go on"
        )
        logger.warning("%s", notice)
        self._senders.tell(Notice(notice))
        for number in self._probes:
            self._workers.send(Probe(number))
        self._send_plans()

    def _take_from_worker(self, message: WorkerToScheduler) -> Sequence[Outputs | Rejected]:
        """What a step gave to its requests."""
        match message:
            case StepResult() as result:
                return self._take_result(result)
            case Probe() as came:
                self._senders.send(*self._probes.pop(came.probe_id))
                return ()
            case Captured() as captured:
                self._captures.answered(captured)
                if not captured.problem:
                    self._policy.bucket_captured(captured.bucket, captured.milliseconds)
                return ()
            case Failed() | Progress() | WorkerReady():
                return ()

    def _take_result(self, result: StepResult) -> Sequence[Outputs | Rejected]:
        columns = unpack_columns(result.drawn)
        if self._step_log.is_open:
            self._step_log.write(self._policy.describe_step(result.step_id), result)
        self._step_times.add(result.started_s, result.finished_s)
        milliseconds = (result.finished_s - result.started_s) * 1000.0
        for recent in self._recent_steps:
            if recent.are_kept:
                recent.add(self._policy.find_step(result.step_id), milliseconds, result.finished_s)
        self._policy.step_took(result.step_id, milliseconds, result.finished_s)
        self._counters = result.counters
        self._watch.answered(milliseconds)
        self._workers.step_succeeded()
        failed = self._fail_draws(result) if result.failed_draws else []
        if result.failed_grammars:
            failed += self._policy.fail_grammars(result.step_id, result.failed_grammars)
        outputs = self._policy.update(
            result.step_id, columns["token_ids"], result.logprobs, result.prompt_logprobs, result.refused_draws
        )
        return [outputs, *failed] if outputs else failed

    def _fail_draws(self, result: StepResult) -> list[Rejected]:
        drawing = self._policy.find_step(result.step_id).drawing
        logger.error("no token could be drawn for %s", _names([drawing[place] for place in result.failed_draws]))
        return self._policy.fail_draws(result.step_id, result.failed_draws)

    def _take_from_engine(self, sender: int, message: EngineToScheduler) -> None:
        match message:
            case Submit() as submit:
                self._take_request(sender, submit)
            case Cancel() as cancel:
                if self._senders.owns(sender, cancel.request_id):
                    self._policy.cancel(cancel.request_id)
            case StatsRequest() as question:
                self._step_log.flush()
                steps = self._recent_steps[sender].take(time.monotonic()) if question.steps else ()
                self._senders.send(sender, self._stats(steps))
            case ReportRequest():
                self._senders.send(sender, self._policy.report(sender))
            case Probe() as probe:
                self._num_probes += 1
                self._probes[self._num_probes] = sender, probe
                if self._workers.state is State.SERVING:
                    self._workers.send(Probe(self._num_probes))
            case Attach():
                self._end_requests(sender)
                self._senders.send(sender, self._ready)
            case SenderEnded() as ended:
                self._end_requests(sender, ended.below)
            case Shutdown():
                self._running = False

    def _take_request(self, sender: int, submit: Submit) -> None:
        try:
            if not self._senders.owns(sender, submit.request_id):
                raise InvalidRequestError(
                    f"request id {submit.request_id} is not one of sender {sender} of {len(self._senders)}: count by"
                    f" {len(self._senders)} from {sender} on"
                )
            self._policy.add(submit)
        except OverloadedError as error:
            rejected = Rejected(submit.request_id, "OverloadedError", error.message, error.retry_after_s)
        except DeadlineError as error:
            rejected = Rejected(submit.request_id, "DeadlineError", str(error))
        except InvalidRequestError as error:
            rejected = Rejected(submit.request_id, "InvalidRequestError", str(error))
        else:
            return
        self._senders.send(sender, rejected)

    def _end_requests(self, sender: int, below: float = math.inf) -> None:
        """Those of a sender that is gone, without a word."""
        for request_id in self._policy.request_ids:
            if request_id < below and self._senders.owns(sender, request_id):
                self._policy.cancel(request_id)

    def _stats(self, recent_steps: tuple[StepSummary, ...]) -> EngineStats:
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
            ttft_targets_met=counters.ttft_targets_met,
            ttft_targets_missed=counters.ttft_targets_missed,
            tpot_targets_met=counters.tpot_targets_met,
            tpot_targets_missed=counters.tpot_targets_missed,
            numerical_errors=counters.numerical_errors,
            worker_restarts=self._workers.num_restarts,
            worker_loss=self._last_loss,
            worker_pause_s=self._last_pause_s,
            buckets_captured=self._captures.num_captured,
            buckets_total=self._captures.num_buckets,
            capture_ms_max=self._captures.longest_ms,
            poisoned=counters.poisoned,
            total_rows=counters.total_rows,
            padding_rows=counters.padding_rows,
            decode_rows=counters.decode_rows,
            waiting_by_class=policy.waiting_by_class,
            buckets=counters.buckets,
            steps_within_ms=tuple(counters.steps_within),
            recent_steps=recent_steps,
        )
