"""The engines of one program or one server: started together, watched, and started again one by one.

Owns their processes, and how often each may be started again. Knows no request: whoever calls `look` tells
`graphgen.router.links` what it found. Called by `graphgen.api.core` and the supervisor of a server, each on one thread.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator

from msgspec import Struct

from graphgen.launch.processes import EngineProcesses, Exit
from graphgen.launch.starts import StartLimit

logger = logging.getLogger("graphgen")

SCHEDULER = "scheduler"
LOOK_S = 0.1
"""How often to look whether all live."""


class EngineEnd(Struct, frozen=True):
    """An engine that has ended."""

    number: int
    found: Exit
    restarts: bool  # another is being started in its place; False: not now, after too many starts that led to nothing


class Engines:
    """So many engines. The first one's folder is also that of what belongs to none, as a server's frontend."""

    def __init__(self, count: int, make: Callable[[], EngineProcesses] = EngineProcesses) -> None:
        self._owns: list[EngineProcesses] = []
        self._limits = [StartLimit() for _ in range(count)]
        self._starting: list[threading.Thread | None] = [None] * count  # those that are being started again, or ended
        self._at_rest: set[int] = set()  # ended, and not to be started before somebody says so
        self._waits: set[int] = set()  # ended too often: started again as soon as that is long enough ago
        try:
            for _ in range(count):
                self._owns.append(make())
        except BaseException:
            self.stop(0.0)
            raise

    def __len__(self) -> int:
        return len(self._owns)

    def __getitem__(self, number: int) -> EngineProcesses:
        return self._owns[number]

    @property
    def pids(self) -> dict[str, int]:
        """All processes by name; of several engines their names begin with `engine-NUMBER/`."""
        if len(self._owns) == 1:
            return self._owns[0].pids
        return {
            f"engine-{number}/{name}": pid for number, one in enumerate(self._owns) for name, pid in one.pids.items()
        }

    def __iter__(self) -> Iterator[EngineProcesses]:
        return iter(self._owns)

    @property
    def num_kept(self) -> int:
        """Engines that live or are being started again."""
        return len(self._owns) - len(self._at_rest) - len(self._waits)

    def log_tails(self) -> str:
        """The last lines that each process wrote, under its name."""
        return "\n".join(f"[{name}]\n{one.log_tail(name)}" for one in self._owns for name in one.pids)

    def look(self, may_restart: bool = True) -> list[EngineEnd]:
        """The engines that have ended since the last look, which are started again as far as they may."""
        return [end for number in range(len(self._owns)) if (end := self._look_at(number, may_restart)) is not None]

    def _look_at(self, number: int, may_restart: bool) -> EngineEnd | None:
        thread = self._starting[number]
        if number in self._at_rest or (thread is not None and thread.is_alive()):
            return None
        found = self._owns[number].find_exit((SCHEDULER,))
        if found is None:
            return None
        restarts = may_restart and self._limits[number].take(time.monotonic())
        was_told = number in self._waits
        self._waits.discard(number)
        if restarts:
            self._start_again(number)
        elif may_restart and len(self._owns) > 1:
            self._waits.add(number)
        else:
            self._at_rest.add(number)
        return None if was_told else EngineEnd(number, found, restarts)

    def _start_again(self, number: int) -> None:
        """On a thread: what the old one left may take long to be gone, and others are to be watched meanwhile."""

        def start() -> None:
            try:
                self._owns[number].restart_scheduler()
            except OSError:
                logger.exception("engine %d could not be started again", number)

        thread = threading.Thread(target=start, name=f"graphgen-restart-{number}", daemon=True)
        self._starting[number] = thread
        thread.start()

    def serves(self, number: int) -> None:
        """It serves: how often it had been started counts no more."""
        self._limits[number].succeeded()

    def rest(self, number: int) -> threading.Thread:
        """Ends an engine that has drained. When the thread that is returned has ended, its device is free."""
        self._at_rest.add(number)
        thread = threading.Thread(target=self._owns[number].end_scheduler, name=f"graphgen-rest-{number}", daemon=True)
        self._starting[number] = thread
        thread.start()
        return thread

    def wake(self, number: int) -> None:
        """Starts an engine that is at rest, or that had ended too often. Does nothing for any other."""
        if number in self._at_rest or number in self._waits:
            self._at_rest.discard(number)
            self._waits.discard(number)
            if (thread := self._starting[number]) is not None:
                thread.join()
            self._limits[number].succeeded()
            self._start_again(number)

    def is_at_rest(self, number: int) -> bool:
        """Whether it has ended, and is not started again by itself."""
        thread = self._starting[number]
        return number in self._at_rest and (thread is None or not thread.is_alive())

    def stop(self, grace_s: float) -> None:
        """Ends all of them and removes their folders. Idempotent."""
        for thread in self._starting:
            if thread is not None:
                thread.join()
        for one in self._owns:
            one.wait(grace_s)
            grace_s = 0.0  # they had it together
        for one in self._owns:
            one.kill()
        for one in self._owns:
            one.stop(0.0)
