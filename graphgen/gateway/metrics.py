"""Writes `GET /metrics` down: the numbers of a `stats` under the names of `graphgen.gateway.metric_table`.

The form is prometheus-client's, and the one that the scraper asks for.
"""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from graphgen.gateway.metric_table import COUNTERS, GAUGES, HISTOGRAMS, Names, Series, named
from graphgen.ipc.ggp.messages import Stats
from graphgen.ipc.ggp.statistics import Histogram


def render(stats: Stats, names: Names, model: str, accept: str) -> tuple[bytes, str]:
    """The text, and its content type. stats: with metrics. accept: the scraper's header."""
    encode, content_type = choose_encoder(accept)
    return encode(_Snapshot(stats, names, model)), content_type


class _Snapshot(Collector):
    """One set of numbers, as prometheus-client reads a registry."""

    def __init__(self, stats: Stats, names: Names, model: str) -> None:
        assert stats.metrics is not None, "they were asked for"
        self._stats, self._metrics = stats, stats.metrics
        self._names, self._model = names, model

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("graphgen_info", "What is served.", labels=("model",))
        info.add_metric((self._model,), 1)
        yield info
        for series in GAUGES:
            yield self._fill(series, GaugeMetricFamily)
        for series in COUNTERS:
            yield self._fill(series, CounterMetricFamily)
        for series in HISTOGRAMS:
            yield self._fill(series, HistogramMetricFamily)

    def _fill(
        self,
        series: Series,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily] | type[HistogramMetricFamily],
    ) -> Metric:
        series, more = named(series, self._names, self._model)
        family = kind(series.name, series.meaning, labels=(*series.labels, *more))
        for labels, value in series.values(self._stats, self._metrics).items():
            labels = (*labels, *more.values())
            if isinstance(family, HistogramMetricFamily):
                assert isinstance(value, Histogram), "of a histogram"
                family.add_metric(labels, _cumulative(value), value.sum)
            else:
                assert not isinstance(value, Histogram), "of a number"
                family.add_metric(labels, value)
        return family


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """(upper end, values up to it), as Prometheus has them."""
    ends = [*map(repr, histogram.bounds), "+Inf"]
    return list(zip(ends, accumulate(histogram.counts), strict=True))
