"""What the policy counts since its start. Plain numbers: kept by `graphgen.scheduler.policy` and its parts, read
for statistics."""

from dataclasses import dataclass

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

    def plan_made(self, record: StepRecord) -> None:
        self.steps += 1
        self.total_rows += record.rows.num_rows
        self.padding_rows += record.num_padding_rows
