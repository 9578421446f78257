"""What an engine was asked and has not answered: statistics, and probes of its device.

Owns the futures that callers wait on. Sends nothing: `graphgen.requests.link` makes and calls it, asks the engine, and
gives it the answers. Statistics are answered in the order in which they were asked; a probe's answer has its number.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError

from graphgen.ipc.engine_messages import EngineStats, Ready
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.worker_messages import Probe


class Questions:
    """Asked by any thread, with the lock held; answered on the receiving thread."""

    def __init__(self, lock: "threading.RLock") -> None:
        """lock: the link's, reentrant."""
        self._lock = lock
        self._stats: deque[Future[EngineStats]] = deque()
        self._probes: dict[int, Future[None]] = {}
        self._num_probes = 0

    def add_stats(self) -> "Future[EngineStats]":
        """A StatsRequest is sent."""
        answer: Future[EngineStats] = Future()
        self._stats.append(answer)
        return answer

    def add_probe(self) -> "tuple[Probe, Future[None]]":
        """The probe to send, and what is done when it has come back."""
        answer: Future[None] = Future()
        self._num_probes += 1
        self._probes[self._num_probes] = answer
        return Probe(self._num_probes), answer

    def take_stats(self, stats: EngineStats) -> None:
        """An answer. It may be to what was asked of an engine that is gone."""
        with self._lock:
            answer = self._stats.popleft() if self._stats else None
        if answer is not None:
            answer.set_result(stats)

    def take_probe(self, probe: Probe) -> None:
        """A probe has come back, maybe from an engine that is gone."""
        self.end_probe(probe.probe_id, None)

    def end_probe(self, probe_id: int, why_not: GraphgenError | None) -> None:
        """A probe has come back, or it is known that it does not."""
        with self._lock:
            answer = self._probes.pop(probe_id, None)
        if answer is None:
            return
        if why_not is None:
            answer.set_result(None)
        else:
            answer.set_exception(why_not)

    def take_all(self) -> "tuple[Future[EngineStats] | Future[None], ...]":
        """All that is not answered, which nothing answers from here on. Called with the lock held."""
        waiting, self._stats = list(self._stats), deque()
        probes, self._probes = list(self._probes.values()), {}
        return (*waiting, *probes)


def fail_all(futures: "Iterable[Future[Ready] | Future[EngineStats] | Future[None]]", error: GraphgenError) -> None:
    """Those that are not done fail with a copy of the error each."""
    for future in futures:
        with contextlib.suppress(InvalidStateError):  # already answered
            future.set_exception(type(error)(*error.args))
