"""How long the supervisor waits before it starts a frontend again. Pure: no clock."""

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
HEALTHY_S = 60.0
"""A frontend that lived so long has recovered: its end is the first of its kind."""


class Backoff:
    """Waits double while what is started ends soon; there is no last start."""

    def __init__(self) -> None:
        self._started_s = 0.0
        self._early_ends = 0

    def started(self, now_s: float) -> None:
        self._started_s = now_s

    def ended(self, now_s: float) -> float:
        """How long to wait before the next start: nothing after the first end."""
        self._early_ends = 1 if now_s - self._started_s >= HEALTHY_S else self._early_ends + 1
        if self._early_ends == 1:
            return 0.0
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self._early_ends - 2, 16))
