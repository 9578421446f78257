"""Statistics and health: what the frontend knows itself, and what it asks the engine for.

Owns the questions to the engine. Used on the server's loop; answers arrive through the inbox.
"""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from graphgen.base.inbox import Inbox
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.ggp.messages import Health, Stats
from graphgen.ipc.messages import EngineStats
from graphgen.requests.link import Link
from graphgen.server.frontend.desk import Desk
from graphgen.server.frontend.memory import ResidentMemory
from graphgen.server.frontend.outbox import Outbox
from graphgen.server.frontend.questions import SharedQuestion
from graphgen.server.frontend.sessions import Sessions

Answer = TypeVar("Answer")

FRESH_S = 0.1
"""How old a repeated answer may be: the engine is asked ten times a second at most, however many ask."""
TIMEOUT_S = 5.0
"""After so long without an answer the worker counts as stalled: no step takes a tenth of that."""


class Monitor:
    """Answers `stats_request` and `health_request`."""

    def __init__(self, link: Link, inbox: Inbox, sessions: Sessions, desk: Desk, outbox: Outbox) -> None:
        self._link = link
        self._inbox = inbox
        self._sessions = sessions
        self._desk = desk
        self._outbox = outbox
        self.draining = False
        self.engine_is_lost = False
        self.messages_refused = 0  # at once, by the loop
        self._memory = ResidentMemory()
        self._stats: SharedQuestion[EngineStats] = SharedQuestion(self._ask_stats, FRESH_S, TIMEOUT_S)
        self._health: SharedQuestion[float] = SharedQuestion(self._ask_health, FRESH_S, TIMEOUT_S)

    def stats(self, reply: Callable[[Stats], None], now_s: float) -> None:
        """`reply` is called with the statistics, soon; not at all while the engine does not answer."""
        self._stats.ask(lambda engine: reply(self._describe(engine)), now_s)

    def health(self, reply: Callable[[Health], None], now_s: float) -> None:
        """`reply` is called when the worker has answered, or has not for TIMEOUT_S."""

        if self.engine_is_lost:
            reply(Health(status="draining" if self.draining else "stalled", ready=False, worker_ms=0.0))
            return

        def judge(worker_s: float) -> None:
            alive = worker_s < TIMEOUT_S
            status = "draining" if self.draining else "ok" if alive else "stalled"
            reply(Health(status=status, ready=alive and not self.draining, worker_ms=round(worker_s * 1000, 3)))

        self._health.ask(judge, now_s)

    def tick(self, now_s: float) -> None:
        waited_s = self._health.waited_s(now_s)
        if waited_s >= TIMEOUT_S:
            self._health.give_up(waited_s, now_s)

    def _ask_stats(self) -> None:
        self._ask(self._link.ask_stats, lambda stats, _: self._stats.answered(stats, time.monotonic()))

    def _ask_health(self) -> None:
        self._ask(self._link.ask_probe, lambda _, took_s: self._health.answered(took_s, time.monotonic()))

    def _ask(self, ask: "Callable[[], Future[Answer]]", take: Callable[[Answer, float], None]) -> None:
        """Asks the engine; `take` gets the answer and how long it took, on the loop. A dead engine answers nothing."""
        asked_s = time.monotonic()

        def leave(future: "Future[Answer]") -> None:  # on the client's receiving thread
            if future.exception() is None:
                took_s = time.monotonic() - asked_s
                self._inbox.put(lambda: take(future.result(), took_s))
                self._inbox.wake()

        with contextlib.suppress(GraphgenError):  # the engine has died: the supervisor will say so
            ask().add_done_callback(leave)

    def _describe(self, engine: EngineStats) -> Stats:
        return Stats(
            sessions=len(self._sessions),
            open_requests=self._desk.num_open,
            held_requests=self._desk.num_held,
            running=engine.running,
            waiting=engine.waiting,
            pages_free=engine.pages_free,
            pages_total=engine.pages_total,
            steps=engine.steps,
            finished=engine.finished,
            preemptions=engine.preemptions,
            step_ms_p50=engine.step_ms_p50,
            step_ms_p95=engine.step_ms_p95,
            step_ms_p99=engine.step_ms_p99,
            step_ms_max=engine.step_ms_max,
            deltas_sent=self._outbox.deltas_sent,
            deltas_merged=self._outbox.deltas_merged,
            messages_refused=self.messages_refused + self._desk.num_refused,
            frontend_cpu_s=time.process_time(),
            frontend_rss_bytes=self._memory.num_bytes(),
            worker_restarts=engine.worker_restarts,
            worker_loss=engine.worker_loss,
            poisoned=engine.poisoned,
            numerical_errors=engine.numerical_errors,
        )
