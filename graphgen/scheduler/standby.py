"""The group that stands by: processes that have imported what they need and wait to be the next worker group.

Owns them from their start until they are taken, told the time. One that ends by itself is replaced, and is nobody's
loss. Called by `graphgen.scheduler.workers`.
"""

import logging
from collections.abc import Callable

from graphgen.launch.starts import Backoff
from graphgen.scheduler.worker_processes import WorkerProcesses

LOOK_S = 10.0
"""How often to look whether they are alive. Nothing depends on when their end is seen: whoever takes them looks too."""
LONGEST_WAIT_S = 1800.0
"""Between two starts of processes that end again and again, each of which costs seconds of a core."""
END_S = 1.0
"""They hold no device: they are gone after milliseconds."""

logger = logging.getLogger("graphgen.scheduler")


class Standby:
    """None at first; one as soon as `tend` is called after it was wanted."""

    def __init__(self, start: Callable[[], WorkerProcesses]) -> None:
        """start: starts the processes of the epoch after the one that serves."""
        self._start = start
        self._processes: WorkerProcesses | None = None
        self._backoff = Backoff(LONGEST_WAIT_S)
        self.due_s: float | None = None
        """When to call `tend`, as time.monotonic(); None: it is not wanted."""

    def want(self, from_s: float) -> None:
        """A group serves: the one after it may be needed, from that time on."""
        self.due_s = from_s

    def tend(self, now_s: float) -> None:
        """Starts what is missing. Does nothing before it is due."""
        if self.due_s is None or now_s < self.due_s:
            return
        self.due_s = now_s + LOOK_S
        if self._processes is None:
            self._begin(now_s)
        elif (found := self._processes.find_exit()) is not None:
            logger.debug("a process that stood by ended: %s", found)
            self.end()
            self.due_s = now_s + self._backoff.ended(now_s)

    def _begin(self, now_s: float) -> None:
        self._backoff.started(now_s)
        try:
            self._processes = self._start()
        except OSError as error:  # the machine has no process or file to give now
            logger.debug("no process stands by: %s", error)
            self.due_s = now_s + self._backoff.ended(now_s)

    def take(self) -> WorkerProcesses | None:
        """The processes, which are the caller's from here on, where they are alive. None is wanted until the next
        `want`."""
        self.due_s = None
        if self._processes is None or self._processes.find_exit() is not None:
            self.end()
            return None
        taken, self._processes = self._processes, None
        return taken

    def end(self) -> None:
        """Ends them and waits until they are gone."""
        if self._processes is not None:
            self._processes.kill()
            self._processes.wait(END_S)
            self._processes.forget()
            self._processes = None
