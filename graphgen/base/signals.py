"""The signals that end a server: SIGTERM, SIGINT and SIGHUP, and how often somebody asked by them.

Owns the handlers, from the start of a server until its process is gone. Never ends anything itself. Used by the
supervisor, which looks at the count in its loop, and by the mock server, which is told of it.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_S = 0.5
"""Signals within so long of the first are one wish: service managers send SIGTERM and SIGHUP at once, and a terminal's
Ctrl-C reaches a program both by itself and from the wrapper around it."""


class EndSignals:
    """Counts wishes to end. Made on the main thread."""

    def __init__(self, on_wish: Callable[[int], None] = lambda _: None) -> None:
        """on_wish: called by the signal handler with the number of wishes so far."""
        self.num_wishes = 0
        self._on_wish = on_wish
        self._first_s = float("-inf")
        for number in ENDING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` asks to live on
                signal.signal(number, self._count)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if now_s - self._first_s >= SAME_S:
            self._first_s = now_s
            self.num_wishes += 1
            self._on_wish(self.num_wishes)

    def ignore(self) -> None:
        """From now on signals do nothing, until the process is gone: one more of them does not change how it ends."""
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
