"""The policy in virtual time: steps take what a table says, two are in flight, and nothing waits for a real clock.

The times are those of an 8 billion parameter model on a large GPU, roughly; what a test asserts is how the policy uses
whatever times it is given.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graphgen.capture.buckets import build_ladder
from graphgen.ipc.attended import Attended
from graphgen.ipc.codec import pack_int32, unpack_int32
from graphgen.ipc.engine_messages import ObjectiveName, Submit
from graphgen.ipc.errors import DeadlineError, OverloadedError
from graphgen.ipc.worker_messages import Bucket, BucketTime, SamplerParams, StepPlan, StepTimeTable
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.policy import Scheduler
from tests.scheduler.harness import tokens_of

TOKEN = 7
DECODE_CONTEXT, PROMPT_START = 1024, 512
MS_PER_POSITION, MS_PER_PAIR = 3.5e-5, 1.2e-6


def full_step_ms(bucket: Bucket) -> float:
    return 4.2 + 0.019 * bucket.num_rows + 0.036 * bucket.decode_rows


def slow_step_ms(bucket: Bucket) -> float:
    """As of a CPU: each row that decodes costs nearly as much as a step of one."""
    return 34.0 + 0.5 * bucket.prefill_rows + 20.0 * bucket.decode_rows


def even_step_ms(bucket: Bucket) -> float:
    """Each row costs as much, of a prompt or of a decode: the smallest step with prompts is long for who decodes."""
    return 4.0 + 0.2 * bucket.num_rows


def table(buckets: Sequence[Bucket], step_ms: Callable[[Bucket], float]) -> StepTimeTable:
    times = tuple(BucketTime(bucket, step_ms(bucket)) for bucket in buckets)
    return StepTimeTable(times, DECODE_CONTEXT, PROMPT_START, MS_PER_POSITION, MS_PER_PAIR, 0.0)


@dataclass
class Served:
    """One request as its sender saw it, in virtual seconds."""

    submit: Submit
    sent_s: float
    times_s: list[float] = field(default_factory=list)
    finished: bool = False
    error: str | None = None
    cached_tokens: int = 0

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1000.0 for a, b in zip(self.times_s, self.times_s[1:], strict=False)]

    @property
    def prompt_len(self) -> int:
        return len(self.submit.prompt_token_ids) // 4

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s


class VirtualEngine:
    """A scheduler, a device that takes its time, and a clock."""

    def __init__(
        self,
        *,
        token_budget: int = 512,
        num_slots: int = 64,
        num_pages: int = 20_000,
        page_size: int = 64,
        noise: float = 0.0,
        max_model_len: int = 40_000,
        max_waiting: int = 10**6,
        max_waiting_tokens: int = 10**9,
        prefix_cache: bool = True,
        objective: ObjectiveName = "balanced",
        step_ms: Callable[[Bucket], float] = full_step_ms,
    ) -> None:
        """noise: relative standard deviation of the steps' durations. step_ms: what a full step of a bucket takes."""
        self.buckets = build_ladder(token_budget, num_slots)
        self.limits = SchedulerLimits(
            buckets=self.buckets,
            num_pages=num_pages,
            page_size=page_size,
            num_slots=num_slots,
            max_chunks=32,
            token_budget=token_budget,
            max_model_len=max_model_len,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
            prefix_cache=prefix_cache,
            objective=objective,
        )
        self.scheduler = Scheduler(self.limits, CostModel(table(self.buckets, step_ms)))
        self._device = CostModel(table(self.buckets, step_ms))
        self._random = random.Random(1)
        self._noise = noise
        self.now_s = 0.0
        self._device_free_s = 0.0
        self._results: deque[tuple[float, float, int, int]] = deque()  # finished_s, ms, step id, tokens
        self.served: dict[int, Served] = {}
        self.plans: list[StepPlan] = []
        self.step_times_ms: list[float] = []

    def send(self, prompt_len: int, output_len: int, prompt: Sequence[int] | None = None, **fields: object) -> Served:
        """Submits a request whose prompt is like no other, unless one is given."""
        request_id = len(self.served)
        tokens = [request_id + 100, *[TOKEN] * (prompt_len - 1)] if prompt is None else prompt
        submit = Submit(
            request_id=request_id,
            prompt_token_ids=pack_int32(tokens),
            max_tokens=output_len,
            min_tokens=0,
            stop_token_ids=(),
            sampler=SamplerParams(seed=request_id),
            arrived_s=self.now_s,
            **fields,  # type: ignore[arg-type]  # fields of Submit, as the test names them
        )
        served = self.served[request_id] = Served(submit, self.now_s)
        try:
            self.scheduler.add(submit)
        except (OverloadedError, DeadlineError) as error:
            served.error = type(error).__name__
        return served

    def run(self, until_s: float = float("inf"), on_end: Callable[[Served], None] | None = None) -> None:
        """Until that time, or until nothing is left to do. `on_end` hears of every request that ends."""
        while True:
            for rejected in self.scheduler.expire(self.now_s):
                self.served[rejected.request_id].error = rejected.error
                if on_end is not None:
                    on_end(self.served[rejected.request_id])
            while (plan := self.scheduler.schedule(self.now_s)) is not None:
                self.scheduler.prepare()
                self._launch(plan)
            if not self._results or self._results[0][0] > until_s:
                self.now_s = max(self.now_s, until_s) if until_s != float("inf") else self.now_s
                return
            self._take_result(on_end)

    def _launch(self, plan: StepPlan) -> None:
        attended = Attended(array_sum(plan.decode_positions)).with_chunks(plan.chunks)
        milliseconds = self._device.predict_ms(plan.bucket, attended)
        assert milliseconds is not None
        milliseconds *= 1.0 + self._random.gauss(0.0, self._noise) if self._noise else 1.0
        self.step_times_ms.append(milliseconds)
        self._device_free_s = max(self._device_free_s, self.now_s) + milliseconds / 1000.0
        self._results.append((self._device_free_s, milliseconds, plan.step_id, plan.num_drawing_rows))
        self.plans.append(plan)

    def _take_result(self, on_end: Callable[[Served], None] | None) -> None:
        self.now_s, milliseconds, step_id, num_tokens = self._results.popleft()
        self.scheduler.step_took(step_id, milliseconds, self.now_s)
        outputs = self.scheduler.update(step_id, [TOKEN] * num_tokens)
        for request_id in tokens_of(outputs):
            self.served[request_id].times_s.append(self.now_s)
        for output in outputs.outputs:
            served = self.served[output.request_id]
            served.cached_tokens = output.cached_tokens
            if output.finish_reason is not None:
                served.finished = True
                if on_end is not None:
                    on_end(served)


def array_sum(packed: bytes) -> int:
    """Positions that decode rows at these positions attend to."""
    return sum(position + 1 for position in unpack_int32(packed))


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100.0))]
