"""MLPerf's service levels for Llama-3.1-8B, and the search for the highest rate at which requests meet one.

Pure: the search asks its caller to serve at a rate. Called by `benchmarks.metrics`, `benchmarks.serving` and
`benchmarks.highest_rate`.

A level is two limits for each request: its first token, and the mean of the gaps between its tokens. MLPerf Inference
asks that the 99th percentile of each is within its limit; here 99 of 100 requests have to keep both, which is stricter.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

SHARE = 0.99
"""Of the requests, that have to meet a level."""

PRECISION = 1.02
"""The search ends when a rate that is not met is at most so many times one that is."""

LEAST_RATE = 0.01
"""Below it, nothing is searched."""


class TokenTimes(Protocol):
    """A request that was served."""

    @property
    def token_times_s(self) -> Sequence[float]: ...


class RequestLevel(Struct, frozen=True):
    """Limits of one request."""

    ttft_s: float
    tpot_s: float

    def is_met(self, request: TokenTimes) -> bool:
        """A request without a token meets no level."""
        times = request.token_times_s
        if not times or times[0] > self.ttft_s:
            return False
        return times[-1] - times[0] <= (len(times) - 1) * self.tpot_s


MLPERF_LEVELS = {"server": RequestLevel(2.0, 0.1), "interactive": RequestLevel(0.5, 0.03)}


class Probe(Struct, frozen=True):
    """What was served at one rate."""

    rate: float  # requests a second
    share: float  # of the requests, those that met the level

    @property
    def is_met(self) -> bool:
        return self.share >= SHARE


def find_highest_rate(share_at: Callable[[float], float], first_rate: float) -> tuple[float, list[Probe]]:
    """The highest rate at which SHARE of the requests meet a level, within PRECISION, and all that was tried.

    share_at: serves at a rate and returns the share that met it. From the first rate on rates are doubled, or halved,
    until one is met and one is not; then the gap between them is halved. 0 if not even LEAST_RATE is met.
    """
    probes: list[Probe] = []

    def is_met(rate: float) -> bool:
        probes.append(Probe(rate, share_at(rate)))
        return probes[-1].is_met

    met, missed = 0.0, first_rate
    while is_met(missed):
        met, missed = missed, 2.0 * missed
    while not met and missed / 2.0 >= LEAST_RATE:
        if is_met(missed / 2.0):
            met = missed / 2.0
        else:
            missed /= 2.0
    while met and missed > PRECISION * met:
        middle = (met + missed) / 2.0
        if is_met(middle):
            met = middle
        else:
            missed = middle
    return met, probes
