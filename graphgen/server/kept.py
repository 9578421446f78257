"""A child of the supervisor that is started again whenever it ends: the frontend, the gateway.

Owns the waits between starts and what an operator is told. Never ends a server.
"""

import logging
import time
from collections.abc import Callable

from graphgen.launch.processes import Exit
from graphgen.launch.starts import Backoff

logger = logging.getLogger("graphgen.server.supervisor")


class Kept:
    """At once the first time, later after waits that grow."""

    def __init__(self, name: str, costs: str, say: Callable[[str], None]) -> None:
        """costs: what its end has cost, for people."""
        self._name = name
        self._costs = costs
        self._say = say
        self._backoff = Backoff()
        self._restart_s: float | None = None  # when it, which has ended, is started again

    def start(self, start: Callable[[], None]) -> None:
        """start: makes another process; raises OSError when it cannot."""
        self._backoff.started(time.monotonic())
        start()

    def restore(self, found: Exit, start: Callable[[], None]) -> None:
        """It has ended. Called for as long as it has."""
        now_s = time.monotonic()
        if self._restart_s is None:
            logger.error("%s", found)
            wait_s = self._backoff.ended(now_s)
            when = f"in {wait_s:g} s" if wait_s else "now"
            self._say(f"the {self._name} ended and is started again {when}; {self._costs}")
            self._restart_s = now_s + wait_s
        elif now_s >= self._restart_s:
            self._restart_s = None
            try:
                self.start(start)
            except OSError as error:  # for want of memory or descriptors: tried again like a start that failed
                wait_s = self._backoff.ended(now_s)
                logger.error("the %s could not be started (%s): tried again in %g s", self._name, error, wait_s)
                self._restart_s = now_s + wait_s
