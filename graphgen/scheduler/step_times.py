"""Times of the last steps on the device, for the engine's statistics. Called by `graphgen.scheduler.loop`."""

from collections import deque

WINDOW = 1000
"""Steps that count."""


class StepTimes:
    """A sliding window over the steps' durations."""

    def __init__(self) -> None:
        self._milliseconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, started_s: float, finished_s: float) -> None:
        self._milliseconds.append((finished_s - started_s) * 1000.0)

    def summary_ms(self) -> tuple[float, float, float, float]:
        """Median, 95th and 99th percentile (nearest rank) and maximum; zeros before the first step."""
        ordered = sorted(self._milliseconds)
        if not ordered:
            return 0.0, 0.0, 0.0, 0.0
        p50, p95, p99 = (ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in (50, 95, 99))
        return p50, p95, p99, ordered[-1]
