"""Statistics and health: what the frontend knows itself, and what it asks the engine for.

Owns the questions to the engine. Used on the server's loop; answers arrive through the inbox.
"""

import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from msgspec import structs

from graphgen.base.inbox import Inbox
from graphgen.ipc.engine_messages import STEP_BOUNDS_MS, EngineStats, StepSummary
from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.ggp.messages import Health, Stats, StatsRequest
from graphgen.ipc.ggp.statistics import BucketCount, EngineCount, Histogram, Live, Metrics, Steps
from graphgen.router.links import Links
from graphgen.server.frontend.desk import Desk
from graphgen.server.frontend.memory import ResidentMemory
from graphgen.server.frontend.outbox import Outbox
from graphgen.server.frontend.questions import SharedQuestion
from graphgen.server.frontend.sessions import Sessions

Answer = TypeVar("Answer")

FRESH_S = 0.1
"""How old a repeated answer may be: the engine is asked ten times a second at most, however many ask."""
WATCHED_FOR_S = 1.0
"""After somebody asked for live steps the engine is asked for them so long."""
KEPT_STEPS = 2048
"""Of the newest."""
SHOWN_REQUESTS = 40
NO_ENGINE = EngineStats(*(0,) * 8, 0.0, 0, 0, *(0.0,) * 4)
TIMEOUT_S = 5.0
"""After so long without an answer the worker counts as stalled: no step takes a tenth of that."""


class _RoundTrip(NamedTuple):
    """Of a probe through scheduler, worker and device."""

    seconds: float  # that it took, or was waited for
    came_back: bool


class Monitor:
    """Answers `stats_request` and `health_request`."""

    def __init__(self, links: Links, inbox: Inbox, sessions: Sessions, desk: Desk, outbox: Outbox) -> None:
        self._links = links
        self._inbox = inbox
        self._sessions = sessions
        self._desk = desk
        self._outbox = outbox
        self.draining = False
        self.engine_is_lost = False
        self.messages_refused = 0  # at once, by the loop
        self._memory = ResidentMemory()
        self._watched_s = -WATCHED_FOR_S
        self._steps: deque[StepSummary] = deque(maxlen=KEPT_STEPS)
        self._num_steps = 0  # of several engines, that were heard of
        self._stats: SharedQuestion[EngineStats] = SharedQuestion(self._ask_stats, FRESH_S)
        self._health: SharedQuestion[_RoundTrip] = SharedQuestion(self._ask_health, FRESH_S)

    def stats(self, question: StatsRequest, reply: Callable[[Stats], None], now_s: float) -> None:
        """`reply` is called with the statistics, soon; while the engine does not answer, only where metrics were asked
        for and it is known to have ended."""
        if question.live_after is not None:
            self._watched_s = now_s
        if self.engine_is_lost:
            self._steps.clear()
            if question.metrics:
                reply(self._describe(NO_ENGINE, question))
            return
        self._stats.ask(lambda engine: reply(self._describe(engine, question)), now_s)

    def health(self, reply: Callable[[Health], None], now_s: float) -> None:
        """`reply` is called when the worker has answered, or has not for TIMEOUT_S, or its engine has ended."""

        def judge(trip: _RoundTrip) -> None:
            status = "draining" if self.draining else "ok" if trip.came_back else "stalled"
            is_ready = trip.came_back and not self.draining
            reply(Health(status=status, ready=is_ready, worker_ms=round(trip.seconds * 1000, 3)))

        if self.engine_is_lost:
            judge(_RoundTrip(0.0, came_back=False))
            return
        self._health.ask(judge, now_s)

    def tick(self, now_s: float) -> None:
        """Ten times a second."""
        waited_s = self._health.waited_s(now_s)
        if self.engine_is_lost or waited_s >= TIMEOUT_S:
            self._health.give_up(_RoundTrip(waited_s, came_back=False))
        if not self.engine_is_lost:
            self._stats.ask_again()
            self._health.ask_again()

    def _ask_stats(self) -> None:
        is_watched = time.monotonic() - self._watched_s < WATCHED_FOR_S
        self._ask(functools.partial(self._links.ask_stats, is_watched), self._take_stats, self._stats.lost)

    def _take_stats(self, stats: EngineStats, _: float) -> None:
        steps = stats.recent_steps
        if stats.engines:  # each has numbers of its own
            steps = tuple(structs.replace(step, step_id=self._num_steps + place) for place, step in enumerate(steps, 1))
            self._num_steps += len(steps)
        self._steps.extend(steps)
        self._stats.answered(stats, time.monotonic())

    def _ask_health(self) -> None:
        def take(_: None, took_s: float) -> None:
            self._health.answered(_RoundTrip(took_s, took_s < TIMEOUT_S), time.monotonic())

        self._ask(self._links.ask_probe, take, self._health.lost)

    def _ask(
        self,
        ask: "Callable[[], Future[Answer]]",
        take: Callable[[Answer, float], None],
        lose: Callable[[], None],
    ) -> None:
        """Asks the engine; `take` gets the answer and how long it took, on the loop. `lose` is called when the engine
        ends before it answers, or has ended."""
        asked_s = time.monotonic()

        def leave(future: "Future[Answer]") -> None:  # on the client's receiving thread
            if future.exception() is None:
                took_s = time.monotonic() - asked_s
                self._inbox.put(lambda: take(future.result(), took_s))
            else:
                self._inbox.put(lose)
            self._inbox.wake()

        try:
            future = ask()
        except GraphgenError:  # the engine has died: the supervisor will say so
            lose()
        else:
            future.add_done_callback(leave)

    def _describe(self, engine: EngineStats, question: StatsRequest) -> Stats:
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
            engines=[_count(one) for one in engine.engines],
            metrics=self._metrics(engine) if question.metrics else None,
            live=None if question.live_after is None else self._live(question.live_after),
        )

    def _metrics(self, engine: EngineStats) -> Metrics:
        tallies = self._desk.tallies
        step_s = Histogram(
            bounds=[bound / 1000 for bound in STEP_BOUNDS_MS],
            counts=list(engine.steps_within_ms) or [0] * (len(STEP_BOUNDS_MS) + 1),
            sum=sum(bucket.milliseconds for bucket in engine.buckets) / 1000,
        )
        return Metrics(
            engine_serves=engine is not NO_ENGINE,
            prompt_tokens=tallies.prompt_tokens,
            cached_tokens=tallies.cached_tokens,
            output_tokens=tallies.output_tokens,
            requests=dict(tallies.ends),
            with_target=dict(tallies.with_target),
            target_misses=dict(tallies.target_misses),
            histograms={**tallies.histograms(), "step_s": step_s},
            http_answers=dict(tallies.http_answers),
            held_by_class=self._desk.held_by_class(),
            waiting_by_class=list(engine.waiting_by_class),
            pages_cached=engine.pages_cached,
            chunk_rows=engine.total_rows - engine.padding_rows - engine.decode_rows,
            decode_rows=engine.decode_rows,
            padding_rows=engine.padding_rows,
            buckets=[
                BucketCount(
                    prefill_rows=one.bucket.prefill_rows,
                    decode_rows=one.bucket.decode_rows,
                    steps=one.steps,
                    ms=one.milliseconds,
                )
                for one in engine.buckets
            ],
            prefix_queries=engine.prefix_queries,
            prefix_hits=engine.prefix_hits,
            refused=engine.refused,
            deadline_misses=engine.deadline_misses,
            graph_replays=engine.graph_replays,
            eager_steps=engine.eager_steps,
            recompilations=engine.recompilations,
            buckets_captured=engine.buckets_captured,
            buckets_total=engine.buckets_total,
        )

    def _live(self, after: int) -> Live:
        """after: the newest step that the asker knows. A later engine counts its steps from 0 again."""
        newest = self._steps[-1].step_id if self._steps else 0
        steps = [step for step in self._steps if step.step_id > after or after > newest]
        return Live(
            steps=Steps(
                ids=[step.step_id for step in steps],
                chunk_rows=[step.chunk_rows for step in steps],
                decode_rows=[step.decode_rows for step in steps],
                padding_rows=[step.padding_rows for step in steps],
                ms=[round(step.milliseconds, 3) for step in steps],
                ended_ms=[round(step.finished_s * 1000, 2) for step in steps],
            ),
            requests=self._desk.describe_open(SHOWN_REQUESTS, time.monotonic()),
        )


def _count(engine: EngineStats | None) -> EngineCount:
    """One of several engines."""
    serves = engine is not None
    engine = engine or NO_ENGINE
    return EngineCount(
        serves=serves,
        running=engine.running,
        waiting=engine.waiting,
        pages_free=engine.pages_free,
        pages_total=engine.pages_total,
        steps=engine.steps,
        finished=engine.finished,
        preemptions=engine.preemptions,
        worker_restarts=engine.worker_restarts,
    )
