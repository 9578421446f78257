"""What does planning cost? CPU time of one step of the scheduling policy, without a GPU and without processes.

    python -m benchmarks.scheduler --running 1 64 256 --waiting 100 1000 10000 --round-trip --json scheduler.json

A step is what the scheduler does between a result and the next plan: `update()` with the tokens of the oldest step,
then `schedule()`, two steps in flight. The *whole* step has also what it does once the plan has left, `prepare()`: no
device waits for that as long as the whole is shorter than a step. Requests of random lengths run on the real bucket
ladder; one that ends is replaced by a new one at the end of the queue, so both counts stay what the row says. Tokens
are made up. With --round-trip also what its messages cost: see `benchmarks.round_trip`.
"""

import gc
import random
import time
from array import array
from collections import deque
from collections.abc import Sequence
from statistics import fmean

from msgspec import Struct

from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from benchmarks.round_trip import channel_rows, codec_rows
from graphgen.capture.buckets import build_ladder
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.worker_messages import Bucket, BucketTime, SamplerParams, StepPlan, StepTimeTable
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.policy import Scheduler

PAGE_SIZE = 64
MAX_CHUNKS = 32
"""Chunks of a step, as the worker's."""
TOKEN_ID = 17
"""What every step draws. It is no stop token, so that requests end at their length."""


class Load(Struct, frozen=True):
    """Mean lengths of the requests, in tokens; both are normal with a standard deviation of 0.3 means."""

    prompt_mean: int
    output_mean: int
    token_budget: int
    seed: int
    num_classes: int = 1
    itl_target_ms: float | None = None

    @property
    def max_model_len(self) -> int:
        """No drawn length is above twice its mean."""
        return 2 * (self.prompt_mean + self.output_mean)


class StepCost(Struct, frozen=True):
    """One step."""

    update_us: float
    schedule_us: float
    prepare_us: float  # after the plan has left
    num_decodes: int
    num_chunks: int

    @property
    def total_us(self) -> float:
        """From the result to the plan that answers it."""
        return self.update_us + self.schedule_us


class Drive:
    """A scheduler under load, and the queue of results that a worker would send."""

    def __init__(self, load: Load, num_running: int, num_waiting: int) -> None:
        self._load = load
        self._random = random.Random(load.seed)
        self._num_sent = 0
        limits = _limits(load, num_running)
        self.scheduler = Scheduler(limits, CostModel(step_times(limits.buckets)))
        self._num_open = num_running + num_waiting
        self._results: deque[tuple[int, array[int], float]] = deque()
        self._send_missing()

    def warm_up(self, num_running: int) -> None:
        """Steps until all slots are taken, or until long prompts and short outputs clearly do not let that happen."""
        for _ in range(4 * self._load.output_mean):
            self.step()
            if self.scheduler.running == num_running:
                return

    def step(self) -> StepCost:
        """One result and the plan that answers it. New arrivals do not count."""
        while len(self._results) < 2:
            self._expect(self.scheduler.schedule(0.0))
        step_id, tokens, step_ms = self._results.popleft()
        begun_ns = time.perf_counter_ns()
        self.scheduler.step_took(step_id, step_ms, 0.0)
        self.scheduler.update(step_id, tokens)
        updated_ns = time.perf_counter_ns()
        plan = self.scheduler.schedule(0.0)
        planned_ns = time.perf_counter_ns()
        self.scheduler.prepare()
        prepared_ns = time.perf_counter_ns()
        num_decodes, num_chunks = self._expect(plan)
        self._send_missing()
        return StepCost(
            (updated_ns - begun_ns) / 1000.0,
            (planned_ns - updated_ns) / 1000.0,
            (prepared_ns - planned_ns) / 1000.0,
            num_decodes,
            num_chunks,
        )

    def _expect(self, plan: StepPlan | None) -> tuple[int, int]:
        """Queues the result of a plan; returns its decode rows and chunks."""
        assert plan is not None, "there is always a request that can advance"
        self._results.append((plan.step_id, array("i", [TOKEN_ID]) * plan.num_drawing_rows, _step_ms(plan.bucket)))
        return plan.num_decodes, len(plan.chunks)

    def _send_missing(self) -> None:
        """New requests in place of those that ended."""
        while self.scheduler.running + self.scheduler.waiting < self._num_open:
            self.scheduler.add(self._make_submit())

    def _make_submit(self) -> Submit:
        self._num_sent += 1
        prompt_len, output_len = (
            min(max(round(self._random.gauss(mean, 0.3 * mean)), 1), 2 * mean)
            for mean in (self._load.prompt_mean, self._load.output_mean)
        )
        return Submit(
            request_id=self._num_sent,
            # No two begin alike: every prompt is hashed, looked up in the prefix cache and entered into it in vain.
            prompt_token_ids=pack_int32([self._num_sent, *[TOKEN_ID] * (prompt_len - 1)]),
            max_tokens=output_len,
            min_tokens=0,
            stop_token_ids=(TOKEN_ID + 1,),
            sampler=SamplerParams(seed=self._num_sent),
            arrived_s=0.0,
            priority=self._num_sent % self._load.num_classes,
            itl_target_ms=self._load.itl_target_ms,
        )


def step_times(buckets: Sequence[Bucket]) -> StepTimeTable:
    """A table of made-up times that grow with the rows, so that the budget has something to choose by."""
    times = tuple(BucketTime(bucket, _step_ms(bucket)) for bucket in buckets)
    return StepTimeTable(times, 1024, 512, 3e-5, 1e-6, 1e-4)


def _step_ms(bucket: Bucket) -> float:
    return 4.0 + bucket.num_rows / 400.0


def _limits(load: Load, num_running: int) -> SchedulerLimits:
    """The sizes of an engine whose pages suffice: a preemption would be a step of another kind."""
    pages_each = -(-load.max_model_len // PAGE_SIZE) + 1
    return SchedulerLimits(
        buckets=build_ladder(load.token_budget, num_running),
        num_pages=2 * num_running * pages_each,
        page_size=PAGE_SIZE,
        num_slots=num_running,
        max_chunks=min(num_running, MAX_CHUNKS),
        token_budget=load.token_budget,
        max_model_len=load.max_model_len,
    )


def measure(load: Load, num_running: int, num_waiting: int, num_steps: int) -> Row:
    """The figures of one row."""
    drive = Drive(load, num_running, num_waiting)
    drive.warm_up(num_running)
    costs = [drive.step() for _ in range(num_steps)]
    totals = [cost.total_us for cost in costs]
    whole = [cost.total_us + cost.prepare_us for cost in costs]
    return {
        "running": num_running,
        "waiting": num_waiting,
        **{f"p{percent} us": percentile(totals, percent) for percent in (50, 99)},
        "max us": max(totals),
        **{f"whole p{percent} us": percentile(whole, percent) for percent in (50, 99)},
        "update p50 us": percentile([cost.update_us for cost in costs], 50),
        "schedule p50 us": percentile([cost.schedule_us for cost in costs], 50),
        "prepare p50 us": percentile([cost.prepare_us for cost in costs], 50),
        "decodes a step": fmean(cost.num_decodes for cost in costs),
        "chunks a step": fmean(cost.num_chunks for cost in costs),
    }


def flatness(rows: Sequence[Row]) -> list[Row]:
    """What the longest queue costs against the shortest, for each number of running requests; 1 is flat."""
    found: list[Row] = []
    for running in dict.fromkeys(row["running"] for row in rows):
        by_queue = sorted((row for row in rows if row["running"] == running), key=lambda row: int(str(row["waiting"])))
        short, long = by_queue[0], by_queue[-1]
        ratios = {f"p{p} ratio": float(str(long[f"p{p} us"])) / float(str(short[f"p{p} us"])) for p in (50, 99)}
        found.append({"running": running, "waiting": f"{long['waiting']} : {short['waiting']}", **ratios})
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--steps", type=int, default=2000, help="steps of each row")
    parser.add_argument("--prompt-mean", type=int, default=512)
    parser.add_argument("--output-mean", type=int, default=256)
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1, help="service classes, taken in turn")
    parser.add_argument(
        "--itl-target-ms", type=float, default=20.0, help="of every request; steps take 4 ms + 2.5 us a row"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round-trip", action="store_true", help="also encode, decode and send the messages")
    parser.add_argument("--trips", type=int, default=2000, help="repetitions of each message")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    load = Load(
        options.prompt_mean,
        options.output_mean,
        options.token_budget,
        options.seed,
        options.classes,
        options.itl_target_ms,
    )
    about = machine("cpu")
    # As the scheduler process does: a collection would find nothing and hold up a plan.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    rows = [
        measure(load, running, waiting, options.steps) for running in options.running for waiting in options.waiting
    ]
    ratios = flatness(rows)
    show("CPU of one step of the policy", rows, about)
    show("Longest queue against the shortest", ratios, about)
    messages: list[Row] = []
    if options.round_trip:
        messages = [*codec_rows((1, 64, 256), options.trips)]
        trips = channel_rows((1, 64, 256), options.trips)
        show("Messages of one step: encoding and decoding", messages, about)
        show("A plan to another process and its result back, over ZeroMQ ipc", trips, about)
        messages += trips
    write_json(options.json, [*rows, *ratios, *messages], about)


if __name__ == "__main__":
    run_script(main)
