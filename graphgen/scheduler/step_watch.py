"""Whether the oldest step in flight takes too long: a worker that hangs answers nothing and does not end.

Owns a clock of the time in which this process ran, and a limit for each step. Pure: told the time, never reads it.
Called by `graphgen.scheduler.process`.

A step may take LATE_FACTOR times its prediction, and never less than LATE_S, before its stacks are asked for, and
HUNG_S more before its group is ended. A step of a bucket that nobody has timed, the first on a CPU for instance, gets
UNKNOWN_S. Time in which the scheduler itself did not run, for instance because the machine was suspended, does not
count: of each pause between two looks only MAX_PAUSE_S.
"""

import enum
from collections import deque

LATE_S = 2.0
LATE_FACTOR = 20.0
HUNG_S = 8.0
UNKNOWN_S = 300.0
MAX_PAUSE_S = 0.5
LOOK_S = 0.25
"""How often to look while a step is in flight."""


class Verdict(enum.Enum):
    """On the oldest step in flight."""

    FINE = enum.auto()
    LATE = enum.auto()
    HUNG = enum.auto()


class StepWatch:
    """The steps in flight, and since when the oldest is the oldest, in seconds of this process."""

    def __init__(self, now_s: float) -> None:
        self._looked_s = now_s
        self._ran_s = 0.0
        self._limits: deque[float] = deque()
        self._oldest_since_s = 0.0

    def __len__(self) -> int:
        return len(self._limits)

    def sent(self, predicted_ms: float | None) -> None:
        """A plan has left. predicted_ms: None for a step that nobody can predict."""
        if not self._limits:
            self._oldest_since_s = self._ran_s
        limit_s = UNKNOWN_S if predicted_ms is None else max(LATE_S, LATE_FACTOR * predicted_ms / 1000.0)
        self._limits.append(limit_s)

    def answered(self) -> None:
        """The result of the oldest step has come."""
        self._limits.popleft()
        self._oldest_since_s = self._ran_s

    def forget(self) -> None:
        """The worker group is gone, and its steps with it."""
        self._limits.clear()

    def look(self, now_s: float) -> Verdict:
        """To be called at least every LOOK_S while a step is in flight."""
        self._ran_s += min(now_s - self._looked_s, MAX_PAUSE_S)
        self._looked_s = now_s
        if not self._limits:
            return Verdict.FINE
        late_s = self._ran_s - self._oldest_since_s - self._limits[0]
        return Verdict.FINE if late_s < 0 else Verdict.LATE if late_s < HUNG_S else Verdict.HUNG
