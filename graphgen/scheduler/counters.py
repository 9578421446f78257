"""What the policy counts since its start. Plain numbers: kept by `graphgen.scheduler.policy` and its parts, read
for statistics."""

from bisect import bisect_left
from dataclasses import dataclass, field

from graphgen.ipc.messages import STEP_BOUNDS_MS, Bucket, BucketSteps
from graphgen.scheduler.plan import StepRecord


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
    poisoned: int = 0
    """Requests that were ended because worker groups died of them."""
    numerical_errors: int = 0
    """Requests that were ended because the model computed no number for them."""
    steps_within: list[int] = field(default_factory=lambda: [0] * (len(STEP_BOUNDS_MS) + 1))
    """Steps that have ended by their time on the device: up to each of STEP_BOUNDS_MS, and above the last."""
    _of_bucket: dict[Bucket, list[float]] = field(default_factory=dict)
    """By the bucket that was chosen: steps that have ended, and their milliseconds."""

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
