"""What the policy counts since its start. Plain numbers: kept by `graphgen.scheduler.policy` and its parts, read
for statistics."""

from bisect import bisect_left
from dataclasses import dataclass, field

from graphgen.ipc.engine_messages import STEP_BOUNDS_MS, BucketSteps
from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.plan import StepRecord
from graphgen.scheduler.request import Request


@dataclass
class Counters:
    """Totals; all start at 0."""

    steps: int = 0
    """Plans made."""
    total_rows: int = 0
    """Rows of all plans."""
    padding_rows: int = 0
    """Rows of all plans that held no token."""
    decode_rows: int = 0
    """Rows of all plans that held a decode."""
    preemptions: int = 0
    finished: int = 0
    """Requests that ended with a finish reason; cancelled ones do not count."""
    prefix_queries: int = 0
    """Prompt tokens of all requests that were started."""
    prefix_hits: int = 0
    """Of these: tokens whose pages were found in the prefix cache."""
    refused: int = 0
    """Requests that were turned away because of overload."""
    deadline_misses: int = 0
    """Requests that were ended because their deadline had passed."""
    ttft_targets_met: int = 0
    """First tokens that came within their request's target."""
    ttft_targets_missed: int = 0
    tpot_targets_met: int = 0
    """Finished requests of at least two tokens with a mean gap within their target."""
    tpot_targets_missed: int = 0
    poisoned: int = 0
    """Requests that were ended because worker groups died of them."""
    numerical_errors: int = 0
    """Requests that were ended because the model computed no number for them."""
    steps_within: list[int] = field(default_factory=lambda: [0] * (len(STEP_BOUNDS_MS) + 1))
    """Steps that have ended by their time on the device: up to each of STEP_BOUNDS_MS, and above the last."""
    _of_bucket: dict[Bucket, list[float]] = field(default_factory=dict)
    """By the bucket that was chosen: steps that have ended, and their milliseconds."""

    def first_token_came(self, request: Request, ended_s: float) -> None:
        if request.ttft_by_s is not None:
            is_met = ended_s <= request.ttft_by_s
            self.ttft_targets_met += is_met
            self.ttft_targets_missed += not is_met

    def last_token_came(self, request: Request, ended_s: float) -> None:
        num_gaps, first_s = len(request.output) - 1, request.first_token_s
        if request.tpot_target_ms is not None and first_s is not None and num_gaps:
            is_met = (ended_s - first_s) * 1000.0 <= num_gaps * request.tpot_target_ms
            self.tpot_targets_met += is_met
            self.tpot_targets_missed += not is_met

    def plan_made(self, record: StepRecord) -> None:
        self.steps += 1
        self.total_rows += record.rows.num_rows
        self.padding_rows += record.num_padding_rows
        self.decode_rows += len(record.decodes)

    def step_took(self, bucket: Bucket, milliseconds: float) -> None:
        self.steps_within[bisect_left(STEP_BOUNDS_MS, milliseconds)] += 1
        of_bucket = self._of_bucket.get(bucket)
        if of_bucket is None:
            of_bucket = self._of_bucket[bucket] = [0, 0.0]
        of_bucket[0] += 1
        of_bucket[1] += milliseconds

    @property
    def buckets(self) -> tuple[BucketSteps, ...]:
        """Those that a step has run in, the smallest first."""
        found = sorted(self._of_bucket.items(), key=lambda item: (item[0].num_rows, item[0].decode_rows))
        return tuple(BucketSteps(bucket, int(steps), milliseconds) for bucket, (steps, milliseconds) in found)
