"""What a serving run amounts to: latencies, throughputs, and the share that met a service level. Plain data in and out.

Never runs or waits for anything. Called by `benchmarks.serving`. Result keys are those of `vllm bench serve`, so that
its tools read these results; what it has no key for is named in the docstrings below.

    TTFT   first token            ITL   gap between two tokens of a request, pooled over all requests
    E2EL   last token             TPOT  (E2EL - TTFT) / (tokens - 1) of a request

All of them count from the moment the request was sent.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from msgspec import Struct

from benchmarks.levels import MLPERF_LEVELS

PERCENTILES = (50, 95, 99)
CURVE_PERCENTS = (5, 10, 25, 50, 60, 70, 75, 80, 85, 90, 92, 94, 95, 96, 97, 98, 99, 99.5, 99.9, 99.99)
"""Where the curve of token latencies is kept: dense in the tail, which is what it is drawn for."""

MOST_MISSED = 8
"""Requests of a run of which it is kept why they missed a level."""

Figures = dict[str, object]


class ServedRequest(Struct, frozen=True):
    """One request as its client saw it."""

    prompt_len: int
    sent_s: float  # time.monotonic()
    token_times_s: tuple[float, ...]  # since it was sent
    error: str | None = None  # why it was refused; it has no tokens then

    @property
    def ended_s(self) -> float:
        return self.sent_s + (self.token_times_s[-1] if self.token_times_s else 0.0)

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.token_times_s)]


class ServiceLevel(Struct, frozen=True):
    """What a reader who is not to be kept waiting asks for, as DeepSpeed-FastGen's benchmark states it.

    A request meets it when its first token came within prompt_len / prompt_tokens_per_s, and the moving average of the
    gaps between its tokens stayed within itl_s at every token.
    """

    itl_s: float
    prompt_tokens_per_s: float = 512.0
    span: int = 16

    @property
    def name(self) -> str:
        """That of its figures."""
        return f"itl_{self.itl_s * 1000:g}ms"

    def is_met(self, request: ServedRequest) -> bool:
        return self.miss(request) is None

    def miss(self, request: ServedRequest) -> str | None:
        """What was the first to come too late; None: nothing."""
        if not request.token_times_s:
            return request.error or "it has no token"
        first_s, due_s = request.token_times_s[0], request.prompt_len / self.prompt_tokens_per_s
        if first_s > due_s:
            return f"its first token came after {first_s:.3f} s and was due after {due_s:.3f}"
        for number, average_s in enumerate(moving_averages(request.gaps_s, self.span), 1):
            if average_s > self.itl_s:
                gap_ms = request.gaps_s[number - 1] * 1000.0
                return f"gap {number} was {gap_ms:.2f} ms, which made the average {average_s * 1000.0:.2f}"
        return None


def moving_averages(values: Sequence[float], span: int) -> Iterator[float]:
    """Exponentially weighted mean up to each value, weights normalised: pandas' `ewm(span=span).mean()`.

    The n-th is sum(w**k * values[n - k]) / sum(w**k) over k = 0..n, with w = 1 - 2 / (span + 1).
    """
    keep = 1.0 - 2.0 / (span + 1.0)
    weighted = weights = 0.0
    for value in values:
        weighted = weighted * keep + value
        weights = weights * keep + 1.0
        yield weighted / weights


def summarize(requests: Sequence[ServedRequest], levels: Sequence[ServiceLevel]) -> Figures:
    """The figures of one run of at least one request. Throughputs are by wall clock, first request to last token.

    request_goodput: requests a second that met levels[0] (throughput times the share that met it).
    goodput_itl_Nms: the same for each level. missed_itl_Nms: why it was missed, of the first MOST_MISSED that did.
    mlperf_NAME_share: of all requests, those that met that level of MLPerf's; refused ones did not. itl_curve_ms:
    (percent, ms) pairs.
    """
    completed = [request for request in requests if request.error is None]
    begun_s = min(request.sent_s for request in requests)
    duration_s = max((request.ended_s for request in completed), default=begun_s) - begun_s
    total_input = sum(request.prompt_len for request in completed)
    total_output = sum(len(request.token_times_s) for request in completed)
    missed = {level.name: list(_missed(level, completed, begun_s)) for level in levels}
    goodputs = {
        f"goodput_{name}": _per_s(len(completed) - len(reasons), duration_s) for name, reasons in missed.items()
    }
    gaps = [gap for request in completed for gap in request.gaps_s]
    return {
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(requests) - len(completed),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": _per_s(len(completed), duration_s),
        "request_goodput": next(iter(goodputs.values()), None),
        "output_throughput": _per_s(total_output, duration_s),
        "total_token_throughput": _per_s(total_input + total_output, duration_s),
        **distribution("ttft", [request.token_times_s[0] for request in completed if request.token_times_s]),
        **distribution("tpot", list(_times_per_output_token(completed))),
        **distribution("itl", gaps),
        "max_itl_ms": max(gaps) * 1000.0 if gaps else None,
        **distribution("e2el", [request.token_times_s[-1] for request in completed if request.token_times_s]),
        **goodputs,
        **{f"missed_{name}": reasons[:MOST_MISSED] for name, reasons in missed.items()},
        **{
            f"mlperf_{name}_share": sum(map(level.is_met, requests)) / len(requests)
            for name, level in MLPERF_LEVELS.items()
        },
        "itl_curve_ms": curve(gaps),
    }


def _missed(level: ServiceLevel, requests: Sequence[ServedRequest], begun_s: float) -> Iterator[str]:
    for request in requests:
        if (reason := level.miss(request)) is not None:
            sent_s = request.sent_s - begun_s
            yield f"the request of {request.prompt_len} tokens that was sent at {sent_s:.2f} s: {reason}"


def distribution(name: str, values_s: Sequence[float]) -> Figures:
    """Mean, median, standard deviation and percentiles in ms; None where there is no value."""
    keys = ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES))
    if not values_s:
        return {f"{key}_{name}_ms": None for key in keys}
    values = np.asarray(values_s) * 1000.0
    figures = (np.mean(values), np.median(values), np.std(values), *np.percentile(values, PERCENTILES))
    return {f"{key}_{name}_ms": float(figure) for key, figure in zip(keys, figures, strict=True)}


def curve(values_s: Sequence[float]) -> list[tuple[float, float]]:
    """(percent, ms) pairs up to the last percentile that has a value of its own above it."""
    percents = [percent for percent in CURVE_PERCENTS if round(len(values_s) * (100.0 - percent), 6) >= 100.0]
    if not percents:
        return []
    points = np.percentile(np.asarray(values_s) * 1000.0, percents)
    return [(percent, float(point)) for percent, point in zip(percents, points, strict=True)]


def _times_per_output_token(requests: Sequence[ServedRequest]) -> Iterator[float]:
    for request in requests:
        times = request.token_times_s
        if len(times) > 1:
            yield (times[-1] - times[0]) / (len(times) - 1)


def _per_s(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0.0 else 0.0


def what_is_asked(row: Mapping[str, object]) -> str:
    """What the requests of a row of figures ask for, to stand behind their workload; empty if nothing."""
    target_ms = row.get("itl_target_ms")
    return f", {target_ms:g} ms asked" if isinstance(target_ms, int | float) else ""
