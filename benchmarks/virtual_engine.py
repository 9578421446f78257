"""An engine in virtual time: the real scheduling policy before a device that takes the time its step-time table says.

Owns the clock and the order of events; decides nothing. Plans come from `graphgen.scheduler.policy`, durations from
`graphgen.scheduler.cost_model`. Called by `benchmarks.simulate`, its device by `benchmarks.simulated_replicas` as well.

What happens when, as in the engine:

    a request arrives or a step ends  ->  the policy takes it, then plans until it has two steps in flight
    a step starts    when the one before it has ended, and no earlier than HOST_DELAY after its plan was made
    a step ends      after the milliseconds that the table has for its bucket and what its rows attend to
    a client sends   its next request HOST_DELAY after the last token of the one before

HOST_DELAY stands for everything between processes: it costs time only where the device would otherwise run, which
with two steps in flight is when a pipeline starts. What is left out: the sampling of tokens beyond greedy, steps that
take longer than measured, and the way of a token to its reader.
"""

import heapq
import math
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from msgspec import Struct

from benchmarks.metrics import Figures, ServedRequest
from benchmarks.report import percentile
from benchmarks.workload import RequestShape
from graphgen.ipc.attended import Attended
from graphgen.ipc.engine_messages import Outputs, Submit
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.worker_messages import SamplerParams, StepPlan
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.policy import Scheduler

HOST_DELAY_S = 0.001
"""Between the end of a step and the start of one planned on its result; 0.9 ms were measured on an H200's host."""

STEP_NOISE = 0.02
"""Spread of a step's time: on an H200 the steps of 368+16 and 352+32 rows differed by 2.5 and 2.0 % from the table."""

_TOKENS = array("i", [0]) * 4096


class VirtualRequest(Struct, frozen=True):
    """A request, what it is called in the figures, and what it asks for."""

    shape: RequestShape
    kind: str
    priority: int = 0
    itl_target_ms: float | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None


class VirtualStep(Struct, frozen=True):
    """A plan on its way through the device."""

    step_id: int
    num_tokens: int  # that it draws
    planned_s: float
    started_s: float
    finished_s: float


class StepSeries:
    """What every step was, column by column: 10^5 requests make some 10^5 steps."""

    def __init__(self) -> None:
        self.started_s, self.finished_s = array("d"), array("d")
        self.live_rows, self.rows = array("l"), array("l")
        self.cpu_us = array("d")
        """CPU time of the policy from the end of a step to its next plan: `step_took`, `update` and `schedule`."""
        self.running, self.waiting = array("l"), array("l")
        """Requests, when that plan was made."""

    def figures(self) -> Figures:
        """Named as `benchmarks.step_log` names those of a real run."""
        times_ms = (np.asarray(self.finished_s) - np.asarray(self.started_s)) * 1000.0
        whole_s = self.finished_s[-1] - self.started_s[0]
        return {
            "steps": len(self.rows),
            "padding_share": 1.0 - sum(self.live_rows) / sum(self.rows),
            "device_idle_share": max(0.0, 1.0 - float(times_ms.sum()) / 1000.0 / whole_s),  # rounding goes below 0
            **{f"p{percent}_step_ms": float(np.percentile(times_ms, percent)) for percent in (50, 95, 99)},
            **{f"p{percent}_policy_us": percentile(self.cpu_us, percent) for percent in (50, 99)},
        }


class VirtualDevice:
    """A scheduler before a device of a table: what was submitted becomes steps, one after another.

    `next_s` is when `end_step` is to be called; infinity while nothing is in flight.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        device: CostModel,
        host_delay_s: float = HOST_DELAY_S,
        step_noise: float = 0.0,
        device_pace: float = 1.0,
        clock_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        """See VirtualEngine."""
        self.steps = StepSeries()
        self.pace = device_pace
        self._scheduler = scheduler
        self._device = device
        self._host_delay_s = host_delay_s
        self._step_noise = step_noise
        self._clock_ns = clock_ns
        self._random = random.Random(0)
        self._in_flight: deque[VirtualStep] = deque()

    @property
    def next_s(self) -> float:
        return self._in_flight[0].finished_s if self._in_flight else math.inf

    def submit(self, submit: Submit, now_s: float) -> None:
        """Raises what the scheduler refuses it with."""
        self._scheduler.add(submit)
        self._launch(self._schedule(now_s), now_s)

    def end_step(self) -> tuple[float, Outputs]:
        """The engine's order: the result, the next plan, and only then the clients."""
        step = self._in_flight.popleft()
        now_s = step.finished_s
        begun_ns = self._clock_ns()
        self._scheduler.step_took(step.step_id, (step.finished_s - step.started_s) * 1000.0, now_s)
        outputs = self._scheduler.update(step.step_id, _TOKENS[: step.num_tokens])
        plans = self._schedule(now_s)
        ended_ns = self._clock_ns()
        if plans:
            self.steps.cpu_us.append((ended_ns - begun_ns) / 1000.0 / len(plans))
            self.steps.running.append(self._scheduler.running)
            self.steps.waiting.append(self._scheduler.waiting)
        self._launch(plans, now_s)
        return now_s, outputs

    def _schedule(self, now_s: float) -> list[StepPlan]:
        plans = []
        while (plan := self._scheduler.schedule(now_s)) is not None:
            plans.append(plan)
        return plans

    def _launch(self, plans: Sequence[StepPlan], now_s: float) -> None:
        for plan in plans:
            free_s = self._in_flight[-1].finished_s if self._in_flight else 0.0
            started_s = max(now_s + self._host_delay_s, free_s)
            pace = self.pace * max(0.5, self._random.gauss(1.0, self._step_noise))
            finished_s = started_s + step_ms(self._device, plan) * pace / 1000.0
            self._in_flight.append(VirtualStep(plan.step_id, plan.num_drawing_rows, now_s, started_s, finished_s))
            self.steps.started_s.append(started_s)
            self.steps.finished_s.append(finished_s)
            self.steps.live_rows.append(plan.num_tokens)
            self.steps.rows.append(plan.bucket.num_rows)
        if plans:
            self._scheduler.prepare()


class VirtualEngine:
    """One run: made, run once, read."""

    def __init__(
        self,
        scheduler: Scheduler,
        device: CostModel,
        requests: Sequence[VirtualRequest],
        clients: int | None,
        host_delay_s: float = HOST_DELAY_S,
        step_noise: float = 0.0,
        device_pace: float = 1.0,
        clock_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        """clients: of a closed loop, in which a request is sent when a client is free; None is an open loop.
        step_noise: standard deviation of a step's time, as a share of what the device's table says. device_pace: every
        step takes so many times what it says, which the scheduler has to find out. clock_ns: what the policy's own time
        is read from; that of a thread costs a system call, which some virtual machines make dear."""
        self._scheduler = scheduler
        self._device = VirtualDevice(scheduler, device, host_delay_s, step_noise, device_pace, clock_ns)
        self._requests = requests
        self._host_delay_s = host_delay_s
        self._is_closed = clients is not None
        self._unsent: Iterator[int] = iter(range(len(requests)))
        self._arrivals: list[tuple[float, int]] = []  # a heap of (time, request)
        self._sent_s = array("d", bytes(8 * len(requests)))
        self._token_times_s = [array("d") for _ in requests]
        self._errors: dict[int, str] = {}
        for index in self._unsent:
            self._arrivals.append((requests[index].shape.arrival_s, index))
            if clients is not None and index + 1 == clients:
                break
        heapq.heapify(self._arrivals)

    @property
    def steps(self) -> StepSeries:
        return self._device.steps

    def run(self) -> list[ServedRequest]:
        """All requests, in their order, until the last token."""
        device = self._device
        while self._arrivals or device.next_s < math.inf:
            if device.next_s < math.inf and (not self._arrivals or device.next_s <= self._arrivals[0][0]):
                self._give(*device.end_step())
            else:
                self._arrive(*heapq.heappop(self._arrivals))
        if left := self._scheduler.running + self._scheduler.waiting:
            raise RuntimeError(f"{left} requests are left and the policy plans nothing: it would wait forever")
        return [
            ServedRequest(
                request.shape.prompt_len,
                self._sent_s[index],
                tuple(self._token_times_s[index]),
                self._errors.get(index),
            )
            for index, request in enumerate(self._requests)
        ]

    def _arrive(self, now_s: float, index: int) -> None:
        self._sent_s[index] = now_s
        try:
            self._device.submit(submit_of(self._requests[index], index, now_s), now_s)
        except GraphgenError as error:
            self._errors[index] = str(error)
            self._send_next(now_s)

    def _give(self, now_s: float, outputs: Outputs) -> None:
        """The tokens of a step to their clients."""
        for index in (*outputs.request_ids, *(output.request_id for output in outputs.outputs)):
            self._token_times_s[index].append(now_s - self._sent_s[index])
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self._send_next(now_s)

    def _send_next(self, now_s: float) -> None:
        """In a closed loop, the client whose request has ended sends another."""
        if self._is_closed and (index := next(self._unsent, None)) is not None:
            heapq.heappush(self._arrivals, (now_s + self._host_delay_s, index))


def step_ms(device: CostModel, plan: StepPlan) -> float:
    """How long the device takes for a plan. Raises ValueError for a bucket that its table lacks."""
    positions = np.frombuffer(plan.decode_positions, np.int32)
    attended = Attended(int(positions.sum()) + len(positions))  # a row attends to its own position as well
    milliseconds = device.predict_ms(plan.bucket, attended.with_chunks(plan.chunks))
    if milliseconds is None:
        raise ValueError(f"bucket {plan.bucket} has no time in the step-time table: measure it with graphgen tune")
    return milliseconds


def submit_of(request: VirtualRequest, request_id: int, now_s: float) -> Submit:
    """Tokens are zeros but for the first, which no other request has: so none shares a prefix with another."""
    prompt = request_id.to_bytes(4, "little") + bytes(4 * (request.shape.prompt_len - 1))
    return Submit(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=request.shape.output_len,
        min_tokens=0,
        stop_token_ids=(),
        sampler=SamplerParams(),
        arrived_s=now_s,
        priority=request.priority,
        itl_target_ms=request.itl_target_ms,
        ttft_target_ms=request.ttft_target_ms,
        tpot_target_ms=request.tpot_target_ms,
    )
