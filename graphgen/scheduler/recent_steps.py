"""The last steps, for who watches the engine live. Kept only while somebody asks for them.

Owns how long nobody may ask before they are forgotten. Called by `graphgen.scheduler.loop`.
"""

from collections import deque

from graphgen.ipc.engine_messages import StepSummary
from graphgen.scheduler.plan import StepRecord

KEPT_FOR_S = 2.0
"""After the last question."""
MOST_STEPS = 2048
"""Between two questions; of more, the oldest are forgotten."""


class RecentSteps:
    """Those since the last question."""

    def __init__(self) -> None:
        self._steps: deque[StepSummary] = deque(maxlen=MOST_STEPS)
        self._asked_s = 0.0
        self.are_kept = False
        """Whether somebody watches: without, a step need not be looked up."""

    def add(self, step: StepRecord, milliseconds: float, finished_s: float) -> None:
        """milliseconds: on the device."""
        if finished_s - self._asked_s > KEPT_FOR_S:
            self.are_kept = False
            self._steps.clear()
            return
        num_decodes, num_padding_rows = len(step.decodes), step.num_padding_rows
        num_chunk_rows = step.rows.num_rows - num_padding_rows - num_decodes
        self._steps.append(
            StepSummary(step.step_id, num_chunk_rows, num_decodes, num_padding_rows, milliseconds, finished_s)
        )

    def take(self, now_s: float) -> tuple[StepSummary, ...]:
        """Those since the last question; from now on they are kept."""
        self._asked_s, self.are_kept = now_s, True
        steps = tuple(self._steps)
        self._steps.clear()
        return steps
