"""The plans whose results have not arrived, oldest first.

Owns their records, and the check that a result is the one that is due. Called by `graphgen.scheduler.policy` and its
parts.
"""

from collections import deque
from collections.abc import Iterator

from graphgen.scheduler.plan import StepRecord
from graphgen.scheduler.request import Request


class StepsInFlight:
    """A queue of step records."""

    def __init__(self) -> None:
        self._records: deque[StepRecord] = deque()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[StepRecord]:
        """The oldest first."""
        return iter(self._records)

    def append(self, record: StepRecord) -> None:
        self._records.append(record)

    def pop(self, step_id: int, num_tokens: int) -> StepRecord:
        """The oldest one, which must be this step and draw so many tokens. Raises ValueError, and changes nothing."""
        if not self._records or self._records[0].step_id != step_id:
            expected = f"step {self._records[0].step_id}" if self._records else "none"
            raise ValueError(
                f"the result of step {step_id} arrived, {expected} is next: results must come in the order of the plans"
            )
        if num_tokens != len(self._records[0].drawing):
            raise ValueError(
                f"step {step_id} returned {num_tokens} tokens, its plan has {len(self._records[0].drawing)} drawing"
                " rows: one for each chunk that draws and each decode"
            )
        return self._records.popleft()

    def find(self, step_id: int) -> StepRecord:
        """Raises KeyError for a step that is not in flight."""
        for record in self._records:
            if record.step_id == step_id:
                return record
        raise KeyError(f"step {step_id} is not in flight (in flight: {[record.step_id for record in self._records]})")

    def draw_for(self, request: Request) -> bool:
        """Of a waiting request: whether a plan made before its preemption still draws a token for it."""
        return bool(self._records) and request.last_step >= self._records[0].step_id
