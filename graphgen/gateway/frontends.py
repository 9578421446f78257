"""All frontends of the gateway's server: what they count, as one.

Owns the connections to those that serve none of this gateway's requests. They are made when somebody asks; a frontend
that does not answer is left out until it does. The sums are pure.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from msgspec import structs

from graphgen.ipc.errors import GraphgenError
from graphgen.ipc.ggp.messages import Stats, StatsRequest
from graphgen.ipc.ggp.statistics import Histogram, Live, Metrics
from graphgen.remote.core import RemoteCore

CONNECT_S = 1.0
SHOWN_REQUESTS = 40

_ADDED = (
    *("sessions", "open_requests", "held_requests", "deltas_sent", "deltas_merged", "messages_refused"),
    *("frontend_cpu_s", "frontend_rss_bytes"),
)
"""What each frontend counts for itself; all else in a Stats is the engines', and each tells all of it."""
_ADDED_COUNTS = ("requests", "with_target", "target_misses", "http_answers")
_ADDED_NUMBERS = ("prompt_tokens", "cached_tokens", "output_tokens")
_OF_ENGINES = "step_s"
"""Of the histograms."""


class Frontends:
    """The one that serves this gateway, and the others."""

    def __init__(self, own: RemoteCore, others: Sequence[str]) -> None:
        """others: their private addresses."""
        self._own = own
        self._addresses = others
        self._others: dict[str, RemoteCore] = {}
        self._lock = threading.Lock()

    def stats(self, question: StatsRequest) -> Stats:
        """Of all that answer, on any thread. Raises GraphgenError when its own does not."""
        found = [self._own.stats(question)]
        if self._addresses:
            with self._lock:
                for address in self._addresses:
                    with contextlib.suppress(GraphgenError):
                        found.append(self._core_of(address).stats(question))
        return found[0] if len(found) == 1 else sum_of(found)

    def close(self) -> None:
        for core in (self._own, *self._others.values()):
            core.close()

    def _core_of(self, address: str) -> RemoteCore:
        if address not in self._others:
            self._others[address] = RemoteCore(address, {"connect_timeout_s": CONNECT_S})
        return self._others[address]


def sum_of(stats: Sequence[Stats]) -> Stats:
    """What the frontends count is added; what is the engines' is as the first one tells it."""
    first = stats[0]
    metrics = [one.metrics for one in stats if one.metrics is not None]
    lives = [one.live for one in stats if one.live is not None]
    return structs.replace(
        first,
        **{name: sum(getattr(one, name) for one in stats) for name in _ADDED},
        metrics=None if first.metrics is None else _sum_of_metrics(metrics),
        live=None if first.live is None else _joined(lives),
    )


def _sum_of_metrics(metrics: Sequence[Metrics]) -> Metrics:
    first = metrics[0]
    names = first.histograms.keys() - {_OF_ENGINES}
    added = {name: _sum_of_histograms([one.histograms[name] for one in metrics]) for name in names}
    return structs.replace(
        first,
        **{name: sum(getattr(one, name) for one in metrics) for name in _ADDED_NUMBERS},
        **{name: _sum_of_counts([getattr(one, name) for one in metrics]) for name in _ADDED_COUNTS},
        histograms=first.histograms | added,
        held_by_class=_by_place([one.held_by_class for one in metrics]),
    )


def _sum_of_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def _by_place(columns: Sequence[Sequence[int]]) -> list[int]:
    return [sum(values) for values in zip(*columns, strict=True)]


def _sum_of_histograms(histograms: Sequence[Histogram]) -> Histogram:
    """All have the same bounds: their frontends are of one build."""
    counts = _by_place([one.counts for one in histograms])
    return structs.replace(histograms[0], counts=counts, sum=sum(one.sum for one in histograms))


def _joined(lives: Sequence[Live]) -> Live:
    """The oldest open requests of all."""
    requests = sorted((one for live in lives for one in live.requests), key=lambda one: -one.age_ms)
    return structs.replace(lives[0], requests=requests[:SHOWN_REQUESTS])
