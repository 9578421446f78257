"""Where a device's events lie on the host's clock, however long the process runs.

How far apart two events are comes in milliseconds of float32: to a quarter of one where they are an hour apart, to
eight where they are a day apart. And the device has a clock of its own, which may drift against the host's by seconds a
day. So an event is placed by one that was reached shortly before, the origin. It is renewed while events are waited
for, and moved by what the host saw: the shortest of many waits ends as soon as a thread wakes, so what its delay gains
or loses is drift.

Owns that bookkeeping, and no event. Called by stream.py, from any thread.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

RENEWED_AFTER_S = 1.0
"""An origin; float32 then tells microseconds apart."""

STALE_AFTER_S = 10.0
"""An origin while nothing is waited for: an idle device's next events are placed by a new one."""

MOST_DRIFT = 1e-3
"""Of a device's clock that seems to be behind, as a share: a wait that began late says nothing."""


class Event(Protocol):
    """Of a device, as torch has it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this one, which was reached, to another, which was reached later."""
        ...


class Origin(NamedTuple):
    """An event that was reached, and when that was."""

    event: Event
    at_s: float


class DeviceClock:
    """Of one device."""

    def __init__(self, event: Event, now_s: Callable[[], float] = time.monotonic) -> None:
        """event: that was reached just now."""
        self._now_s = now_s
        self._lock = threading.Lock()
        self.restart(event)

    def restart(self, event: Event) -> None:
        """By an event that was reached just now."""
        with self._lock:
            self.origin = Origin(event, self._now_s())
            """For events that are recorded from now on."""
            self._least_lag_s = float("inf")

    @property
    def is_stale(self) -> bool:
        """Whether nothing was waited for in a long time."""
        return self._now_s() - self.origin.at_s > STALE_AFTER_S

    def reached_s(self, event: Event, origin: Origin, renews: bool) -> float:
        """When `event` was, as time.monotonic(); it was waited for. origin: of the time when it was recorded. renews:
        whether events that are recorded from now on are reached later than this one."""
        elapsed_s = origin.event.elapsed_time(event) / 1000.0
        at_s = origin.at_s + elapsed_s
        with self._lock:
            if origin is not self.origin:  # what is off by it was seen already
                return at_s
            self._least_lag_s = min(self._least_lag_s, self._now_s() - at_s)
            if renews and elapsed_s > RENEWED_AFTER_S:
                self.origin = Origin(event, at_s + min(self._least_lag_s, MOST_DRIFT * elapsed_s))
                self._least_lag_s = float("inf")
        return at_s
