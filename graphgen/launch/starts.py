"""How often what has died may be started again: a worker group, the engine of a server.

Pure: told the time, never reads it. Called by the scheduler's process and the supervisor.
"""

from collections import deque

MAX_STARTS = 5
WITHIN_S = 600.0


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
