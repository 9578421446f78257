"""How many engines a cluster should have, by its queue, its slots and its KV cache.

Pure: told the time, never reads it; starts nothing. Called by `graphgen.cluster.roster` at every look.

Up, and fast: when more requests wait than `waiting_per_engine` for each engine that is there or on its way, for
`up_after_s`. As many engines are added as the queue will need when they serve, that is after a cold start, at the rate
at which it grows; at most as many as there are, and no more than run all requests with something to spare, those on
their way included. A queue that will be gone before a new engine serves adds none. One engine is added where the KV
caches are `full_kv` full.

Down, and slowly: one engine at a time, when nothing has waited and the others could have held and run all requests with
something to spare, for `down_after_s`, and for `kept_starts` cold starts at least: what is expensive to get is kept
longer.

Something to spare: the caches are at most `spare_kv` full, and of the requests that the engines can run at a time at
most `spare_kv / full_kv` are there. An engine can run as many as it has slots, or as many as it ran when a queue last
asked for more engines, if those were fewer. So at a constant load no removal causes an addition, and no addition a
removal.
"""

from collections import deque
from math import ceil

from msgspec import Struct

from graphgen.ipc.errors import ConfigError

FIRST_COLD_START_S = 60.0
"""Until an engine has been started."""
_NEWEST_START = 0.5
"""Weight of the newest start in the mean."""


class ScalingLimits(Struct, frozen=True, kw_only=True):
    """Between which numbers, and when. Raises ConfigError for what can never be met."""

    least: int
    most: int
    waiting_per_engine: int = 8
    up_after_s: float = 3.0
    down_after_s: float = 300.0
    kept_starts: float = 3.0
    full_kv: float = 0.9
    spare_kv: float = 0.6

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(
                f"the least number of engines is {self.least} and the most {self.most}: give 1 <= least <= most"
            )
        if self.waiting_per_engine < 1:
            raise ConfigError(f"waiting_per_engine is {self.waiting_per_engine}, the least is 1: raise it")
        for name in ("up_after_s", "down_after_s", "kept_starts"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}: give a number from 0 on")
        if not 0 < self.spare_kv < self.full_kv <= 1:
            raise ConfigError(
                f"spare_kv is {self.spare_kv} and full_kv {self.full_kv}: give shares, 0 < spare_kv < full_kv <= 1"
            )


class Load(Struct, frozen=True):
    """What the engines have to do now."""

    num_waiting: int  # requests without a slot, in the frontend and at engines
    num_running: int  # requests with one
    kv_usage: float  # share of the pages of those that serve which requests hold, 0 to 1
    num_serving: int
    num_slots: int  # requests that an engine can run at a time


class Decision(Struct, frozen=True):
    """How many engines there should be."""

    num_engines: int
    reason: str = ""  # why it is another number than before


class Scaling:
    """Remembers since when the load has been high or low."""

    def __init__(self, limits: ScalingLimits, num_engines: int) -> None:
        self.limits = limits
        """Between which numbers, and when."""
        self.num_engines = min(max(num_engines, limits.least), limits.most)
        """Asked for now; those that do not serve yet included."""
        self._cold_start_s = FIRST_COLD_START_S
        self._num_starts = 0
        self._pressed_since_s: float | None = None
        self._quiet_since_s: float | None = None
        self._full_running = float("inf")  # requests that ran at each engine when a queue last asked for more engines
        self._queue: deque[tuple[float, int]] = deque()  # (when, requests waiting), of the last seconds

    @property
    def cold_start_s(self) -> float:
        """From the decision to an engine that serves, by the starts so far."""
        return self._cold_start_s

    def engine_started(self, took_s: float) -> None:
        """An engine serves so long after it was asked for."""
        self._cold_start_s += (_NEWEST_START if self._num_starts else 1.0) * (took_s - self._cold_start_s)
        self._num_starts += 1

    def decide(self, now_s: float, load: Load | None) -> Decision:
        """load: None where the frontend does not say, so that nothing changes."""
        if load is None or not load.num_serving:
            self._forget()
            return Decision(self.num_engines)
        self._remember(now_s, load.num_waiting)
        needed, reason = self._needed(load)
        self._pressed_since_s = _since(self._pressed_since_s, needed > self.num_engines, now_s)
        self._quiet_since_s = _since(self._quiet_since_s, self._is_quiet(load), now_s)
        if _lasts(self._pressed_since_s, now_s, self.limits.up_after_s):
            if load.num_waiting:
                self._full_running = _running_each(load)
            return self._change(min(needed, self.limits.most), reason)
        if _lasts(self._quiet_since_s, now_s, self._kept_s):
            return self._change(max(self.num_engines - 1, self.limits.least), f"quiet for {self._kept_s:.0f} s")
        return Decision(self.num_engines)

    @property
    def _kept_s(self) -> float:
        return max(self.limits.down_after_s, self.limits.kept_starts * self._cold_start_s)

    def _needed(self, load: Load) -> tuple[int, str]:
        """Engines that this load needs, from as many as there are to twice as many; and why."""
        limits, num_engines = self.limits, self.num_engines
        room = limits.waiting_per_engine * num_engines
        expected = load.num_waiting + self._growth_per_s() * self._cold_start_s
        if load.num_waiting > room and expected > room:
            wanted = max(num_engines + 1, min(2 * num_engines, ceil(expected / limits.waiting_per_engine)))
            runs_each, num_open = min(load.num_slots, _running_each(load)), load.num_running + expected
            enough = (one for one in range(num_engines, wanted) if self._have_spare(one, runs_each, num_open))
            reason = f"{load.num_waiting} requests wait, for {num_engines} engines {room} are the most"
            return next(enough, wanted), reason
        if load.kv_usage >= limits.full_kv and load.num_serving == num_engines:
            return num_engines + 1, f"{load.kv_usage:.0%} of the KV caches are held"
        return num_engines, ""

    def _is_quiet(self, load: Load) -> bool:
        """Whether one engine fewer would have been enough. One that does not serve yet holds nothing."""
        left = min(load.num_serving, self.num_engines - 1)
        if load.num_waiting or not left:
            return False
        runs = self._have_spare(left, min(load.num_slots, self._full_running), load.num_running)
        return runs and load.kv_usage * load.num_serving / left <= self.limits.spare_kv

    def _have_spare(self, num_engines: int, runs_each: float, num_open: float) -> bool:
        """Whether so many engines, which can run so many requests each, run all open ones with something to spare."""
        return num_open <= self.limits.spare_kv / self.limits.full_kv * runs_each * num_engines

    def _growth_per_s(self) -> float:
        (first_s, first), (last_s, last) = self._queue[0], self._queue[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def _remember(self, now_s: float, num_waiting: int) -> None:
        self._queue.append((now_s, num_waiting))
        while len(self._queue) > 2 and now_s - self._queue[1][0] >= self.limits.up_after_s:
            self._queue.popleft()

    def _change(self, num_engines: int, reason: str) -> Decision:
        """Every change begins a new look at the load."""
        self._pressed_since_s = self._quiet_since_s = None
        if num_engines == self.num_engines:  # at a limit
            return Decision(num_engines)
        self.num_engines = num_engines
        return Decision(num_engines, reason)

    def _forget(self) -> None:
        self._pressed_since_s = self._quiet_since_s = None
        self._queue.clear()


def _running_each(load: Load) -> float:
    """Requests that an engine runs while others wait, in the mean."""
    return max(1.0, load.num_running / load.num_serving)


def _since(begun_s: float | None, holds: bool, now_s: float) -> float | None:
    """Since when something has held that holds now."""
    if not holds:
        return None
    return now_s if begun_s is None else begun_s


def _lasts(since_s: float | None, now_s: float, least_s: float) -> bool:
    return since_s is not None and now_s - since_s >= least_s
