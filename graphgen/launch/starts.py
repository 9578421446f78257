"""How often and how soon what has died may be started again: a worker group, the engine of a server, a frontend, a
standby.

Pure: told the time, never reads it. Called by the scheduler's process and the supervisor.
"""

from collections import deque

MAX_STARTS = 5
WITHIN_S = 600.0

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
HEALTHY_S = 60.0
"""What lived so long has recovered: its end is the first of its kind."""


class StartLimit:
    """Starts that led to nothing: whoever succeeds clears the count."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque()

    def take(self, now_s: float) -> bool:
        """Whether another start is allowed now; it is counted."""
        while self._starts and now_s - self._starts[0] > WITHIN_S:
            self._starts.popleft()
        if len(self._starts) >= MAX_STARTS:
            return False
        self._starts.append(now_s)
        return True

    def succeeded(self) -> None:
        """A step has been computed."""
        self._starts.clear()


class Backoff:
    """Waits double while what is started ends soon; there is no last start."""

    def __init__(self, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._longest_wait_s = longest_wait_s
        self._started_s = 0.0
        self._early_ends = 0

    def started(self, now_s: float) -> None:
        self._started_s = now_s

    def ended(self, now_s: float) -> float:
        """How long to wait before the next start: nothing after the first end."""
        self._early_ends = 1 if now_s - self._started_s >= HEALTHY_S else self._early_ends + 1
        if self._early_ends == 1:
            return 0.0
        return min(self._longest_wait_s, FIRST_WAIT_S * 2.0 ** min(self._early_ends - 2, 16))
