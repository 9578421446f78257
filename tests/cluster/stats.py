"""Statistics of a server, with what matters to a cluster."""

from collections.abc import Sequence

from graphgen.ipc.ggp.messages import Stats
from graphgen.ipc.ggp.statistics import EngineCount


def engine(running: int, waiting: int, free: int, serves: bool = True) -> EngineCount:
    return EngineCount(
        serves=serves,
        running=running,
        waiting=waiting,
        pages_free=free,
        pages_total=100,
        steps=0,
        finished=0,
        preemptions=0,
        worker_restarts=0,
    )


def stats_of(engines: Sequence[EngineCount], held: int = 0, running: int = 0, waiting: int = 0, free: int = 0) -> Stats:
    """engines: those of `stats.engines`; the other numbers are of the whole server."""
    return Stats(
        sessions=1,
        open_requests=held + running + waiting,
        held_requests=held,
        running=running,
        waiting=waiting,
        pages_free=free,
        pages_total=100,
        steps=0,
        finished=0,
        preemptions=0,
        step_ms_p50=0.0,
        step_ms_p95=0.0,
        step_ms_p99=0.0,
        step_ms_max=0.0,
        deltas_sent=0,
        deltas_merged=0,
        messages_refused=0,
        frontend_cpu_s=0.0,
        frontend_rss_bytes=0,
        engines=list(engines),
    )
