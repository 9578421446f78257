"""Whether the oldest step in flight takes too long: a worker that hangs answers nothing and does not end.

Owns a clock of the time in which this process ran, and a limit for each step. Pure: told the time, never reads it.
Called by `graphgen.scheduler.loop`.

A step may take LATE_FACTOR times its prediction, and never less than LATE_S, before its stacks are asked for, and
HUNG_S more before its group is ended. A step of a bucket that nobody has timed, as many are on a CPU, is predicted by
the largest of the steps before it: so many times its rows take at most so many times as long. The first of these in a
group gets UNKNOWN_S, and so does every one where it may be compiled when it runs. Time in which the scheduler itself
did not run, for instance because the machine was suspended, does not count: of each pause between two looks only
MAX_PAUSE_S.
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
STEPS_KEPT = 16
"""Of how many of the newest steps the largest counts. A small one says little: there a row takes far more time."""


class Verdict(enum.Enum):
    """On the oldest step in flight."""

    FINE = enum.auto()
    LATE = enum.auto()
    HUNG = enum.auto()


class StepWatch:
    """The steps in flight, and since when the oldest is the oldest, in seconds of this process."""

    def __init__(self, now_s: float, steps_compile: bool) -> None:
        """steps_compile: a step of a new shape may be compiled before it runs."""
        self._steps_compile = steps_compile
        self._newest: deque[tuple[int, float]] = deque(maxlen=STEPS_KEPT)  # rows of each, and its milliseconds
        self._looked_s = now_s
        self._ran_s = 0.0
        self._limits: deque[float] = deque()
        self._num_rows: deque[int] = deque()
        self._oldest_since_s = 0.0

    def __len__(self) -> int:
        return len(self._limits)

    def sent(self, predicted_ms: float | None, num_rows: int) -> None:
        """A plan has left, with so many tokens. predicted_ms: None for a step whose bucket nobody has timed."""
        if not self._limits:
            self._oldest_since_s = self._ran_s
        self._limits.append(self._limit_s(predicted_ms, num_rows))
        self._num_rows.append(num_rows)

    def _limit_s(self, predicted_ms: float | None, num_rows: int) -> float:
        if predicted_ms is not None:
            return max(LATE_S, LATE_FACTOR * predicted_ms / 1000.0)
        if self._steps_compile or not self._newest:
            return UNKNOWN_S
        largest, milliseconds = max(self._newest)
        likely_s = milliseconds / 1000.0 * max(1.0, num_rows / largest)
        return min(UNKNOWN_S, max(LATE_S, LATE_FACTOR * likely_s))

    def answered(self, milliseconds: float) -> None:
        """The result of the oldest step has come. milliseconds: what it took on the device."""
        self._limits.popleft()
        self._newest.append((max(1, self._num_rows.popleft()), milliseconds))
        self._oldest_since_s = self._ran_s

    def forget(self) -> None:
        """The worker group is gone, and its steps with it."""
        self._limits.clear()
        self._num_rows.clear()
        self._newest.clear()

    def look(self, now_s: float) -> Verdict:
        """To be called at least every LOOK_S while a step is in flight."""
        self._ran_s += min(now_s - self._looked_s, MAX_PAUSE_S)
        self._looked_s = now_s
        if not self._limits:
            return Verdict.FINE
        late_s = self._ran_s - self._oldest_since_s - self._limits[0]
        return Verdict.FINE if late_s < 0 else Verdict.LATE if late_s < HUNG_S else Verdict.HUNG
