"""Events on the host's clock, by a device whose own clock drifts and tells times apart in float32."""

from collections.abc import Callable
from random import Random

import numpy as np
import pytest

from graphgen.capture import device_clock
from graphgen.capture.device_clock import DeviceClock, Origin

HOUR_S = 3600.0
WAKING_S = 40e-6
"""From an event to the end of a wait for it, at least."""


class FakeEvent:
    """Reached at a time of the device's clock."""

    def __init__(self, device_s: float) -> None:
        self.device_s = device_s

    def elapsed_time(self, end_event: "FakeEvent") -> float:
        milliseconds = (end_event.device_s - self.device_s) * 1000.0
        assert milliseconds >= 0.0, "it is only asked of later events"
        return float(np.float32(milliseconds))


class FakeDevice:
    """Steps of some length, of which two are in flight, waited for by a thread of the host."""

    def __init__(self, drift: float, begins_s: float = 1000.0) -> None:
        self.now_s = begins_s  # of the host
        self._drift = drift
        self._random = Random(0)
        self.clock = DeviceClock(self.event(self.now_s), lambda: self.now_s)

    def event(self, at_s: float) -> FakeEvent:
        return FakeEvent(at_s * (1.0 + self._drift))

    def run(self, num_steps: int, step_s: float, stalls: Callable[[int], float] = lambda step: 0.0) -> np.ndarray:
        """[num_steps, 2]: by how much the beginnings of steps are misplaced, and their lengths, in seconds."""
        errors, in_flight, ends_s = [], [], self.now_s
        for step in range(num_steps + 2):
            if step < num_steps:
                if self.clock.is_stale:
                    self.clock.restart(self.event(self.now_s))
                times_s = ends_s, ends_s + step_s
                in_flight.append((times_s, [self.event(at_s) for at_s in times_s], self.clock.origin))
                ends_s += step_s
            if step < 2:
                continue
            times_s, events, origin = in_flight.pop(0)
            waking_s = WAKING_S + self._random.expovariate(1 / 50e-6) + stalls(step)
            self.now_s = max(self.now_s, times_s[1] + waking_s)
            began_s, ended_s = (self.clock.reached_s(event, origin, renews=True) for event in events)
            errors.append((began_s - times_s[0], ended_s - began_s - step_s))
        return np.array(errors)


def most(errors: np.ndarray) -> tuple[float, float]:
    misplaced_s, off_s = np.abs(errors).max(0)
    return float(misplaced_s), float(off_s)


@pytest.mark.parametrize("drift", [-60e-6, 0.0, 25e-6, 90e-6])
def test_after_hours_steps_are_placed_and_measured_as_in_the_first_minute(drift: float) -> None:
    """An hour of float32 milliseconds is told apart to a quarter of one, and clocks drift by hundreds of them."""
    device = FakeDevice(drift)
    assert device.now_s < 1001.0
    for _ in range(3):
        misplaced_s, off_s = most(device.run(20_000, 0.2))
        assert misplaced_s < 0.5e-3
        assert off_s < 0.2e-3
    assert device.now_s > 1000.0 + 3 * HOUR_S
    assert np.abs(device.run(2000, 0.014)[:, 1]).mean() < 5e-6


def test_without_a_renewal_hours_are_rounded_to_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_clock, "RENEWED_AFTER_S", float("inf"))
    monkeypatch.setattr(device_clock, "STALE_AFTER_S", float("inf"))
    device = FakeDevice(drift=25e-6)
    device.run(50_000, 0.2)
    misplaced_s, off_s = most(device.run(100, 0.0143))
    assert misplaced_s > 0.1
    assert off_s > 0.2e-3


def test_the_first_step_after_a_night_is_measured_as_any_other() -> None:
    device = FakeDevice(drift=30e-6)
    device.run(100, 0.014)
    device.now_s += 10 * HOUR_S
    misplaced_s, off_s = most(device.run(10, 0.014))
    assert misplaced_s < 0.5e-3
    assert off_s < 0.05e-3


def test_a_host_that_waits_late_moves_no_clock_for_long() -> None:
    device = FakeDevice(drift=0.0)
    device.run(500, 0.014)
    late = device.run(500, 0.014, stalls=lambda step: 0.3)  # whoever waits always comes too late: it may seem to drift
    assert most(late)[0] < 10e-3
    after = device.run(500, 0.014)
    assert most(after[-200:])[0] < 0.5e-3


def test_an_event_that_was_recorded_before_is_placed_by_the_origin_of_then() -> None:
    now_s = 50.0
    clock = DeviceClock(FakeEvent(50.0), lambda: now_s)
    before = clock.origin
    waiting = FakeEvent(51.0)
    now_s = 53.0
    clock.reached_s(FakeEvent(53.0), before, renews=True)
    assert clock.origin is not before
    assert clock.reached_s(waiting, before, renews=True) == pytest.approx(51.0)
    assert isinstance(clock.origin, Origin)
    renewed = clock.origin
    clock.reached_s(FakeEvent(60.0), renewed, renews=False)
    assert clock.origin is renewed, "others beside it may be reached before"
