"""When a step takes too long, in time in which the scheduler ran."""

import pytest

from graphgen.launch.starts import MAX_STARTS, WITHIN_S, StartLimit
from graphgen.scheduler.step_watch import (
    HUNG_S,
    LATE_FACTOR,
    LATE_S,
    MAX_PAUSE_S,
    STEPS_KEPT,
    UNKNOWN_S,
    StepWatch,
    Verdict,
)

LOOK_S = 0.25  # how often these tests look


class Clock:
    def __init__(self, steps_compile: bool = False) -> None:
        self.now_s = 100.0
        self.watch = StepWatch(self.now_s, steps_compile)

    def run(self, seconds: float) -> Verdict:
        """Looks all the time, as the loop does; the last verdict."""
        end_s = self.now_s + seconds
        verdict = self.watch.look(self.now_s)
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + LOOK_S)
            verdict = self.watch.look(self.now_s)
        return verdict


@pytest.mark.parametrize(
    ("predicted_ms", "late_s"),
    [(5.0, LATE_S), (LATE_S * 1000 / LATE_FACTOR, LATE_S), (1000.0, LATE_FACTOR), (None, UNKNOWN_S)],
)
def test_a_step_is_late_by_its_prediction_and_hung_a_while_after(predicted_ms: float | None, late_s: float) -> None:
    clock = Clock()
    clock.watch.sent(predicted_ms, 1)
    assert clock.run(late_s - 0.1) is Verdict.FINE
    assert clock.run(0.2) is Verdict.LATE
    assert clock.run(HUNG_S - 0.2) is Verdict.LATE
    assert clock.run(0.2) is Verdict.HUNG


Steps = list[tuple[int, float]]


@pytest.mark.parametrize(
    ("steps", "num_rows", "late_s"),
    [
        ([(4, 4.0)], 10, LATE_S),
        ([(4, 200.0)], 10, LATE_FACTOR * 0.5),
        ([(4, 4000.0)], 512, UNKNOWN_S),
        ([(100, 300.0)], 10, LATE_FACTOR * 0.3),  # a smaller step takes no longer
        ([(1, 150.0), (50, 200.0), (1, 150.0)], 200, LATE_FACTOR * 0.8),  # small ones say nothing of a large one
        ([(50, 400.0)] + [(1, 150.0)] * STEPS_KEPT, 2, LATE_FACTOR * 0.3),
    ],
)
def test_a_step_that_nobody_has_timed_is_predicted_by_the_largest_of_the_newest(
    steps: Steps, num_rows: int, late_s: float
) -> None:
    clock = Clock()
    for rows, milliseconds in steps:
        clock.watch.sent(None, rows)
        clock.watch.answered(milliseconds)
    clock.watch.sent(None, num_rows)
    assert clock.run(late_s - 0.1) is Verdict.FINE
    assert clock.run(0.2) is Verdict.LATE


def test_a_step_that_may_be_compiled_gets_minutes() -> None:
    clock = Clock(steps_compile=True)
    clock.watch.sent(None, 4)
    clock.watch.answered(4.0)
    clock.watch.sent(None, 10)
    assert clock.run(UNKNOWN_S - 0.1) is Verdict.FINE
    assert clock.run(0.2) is Verdict.LATE


def test_a_new_group_has_no_rows_to_predict_by() -> None:
    clock = Clock()
    clock.watch.sent(None, 4)
    clock.watch.answered(4.0)
    clock.watch.forget()
    clock.watch.sent(None, 4)
    assert clock.run(UNKNOWN_S - 0.1) is Verdict.FINE


def test_nothing_in_flight_is_never_late() -> None:
    clock = Clock()
    assert clock.run(1000.0) is Verdict.FINE
    clock.watch.sent(5.0, 1)
    assert clock.run(1.0) is Verdict.FINE, "the time before it was sent counts for nothing"
    clock.watch.answered(1.0)
    assert clock.run(1000.0) is Verdict.FINE


def test_a_step_counts_from_when_it_is_the_oldest() -> None:
    clock = Clock()
    clock.watch.sent(5.0, 1)
    clock.watch.sent(5.0, 1)
    assert clock.run(LATE_S - 0.5) is Verdict.FINE
    clock.watch.answered(1.0)
    assert clock.run(LATE_S - 0.5) is Verdict.FINE
    assert clock.run(1.0) is Verdict.LATE


def test_time_in_which_the_scheduler_did_not_run_does_not_count() -> None:
    clock = Clock()
    clock.watch.sent(5.0, 1)
    clock.now_s += 3600.0  # the machine was suspended
    assert clock.watch.look(clock.now_s) is Verdict.FINE
    assert clock.run(LATE_S - MAX_PAUSE_S - 0.1) is Verdict.FINE
    assert clock.run(0.2) is Verdict.LATE


def test_a_lost_group_takes_its_steps_with_it() -> None:
    clock = Clock()
    clock.watch.sent(5.0, 1)
    assert clock.run(LATE_S + 1.0) is Verdict.LATE
    clock.watch.forget()
    assert clock.run(1000.0) is Verdict.FINE


def test_starts_are_limited_within_a_time_and_forgotten_after_a_success() -> None:
    limit = StartLimit()
    assert [limit.take(float(second)) for second in range(MAX_STARTS + 1)] == [True] * MAX_STARTS + [False]
    assert limit.take(WITHIN_S + 0.5), "the first start is too long ago to count"
    assert not limit.take(WITHIN_S + 0.6)
    limit.succeeded()
    assert all(limit.take(WITHIN_S + 1.0) for _ in range(MAX_STARTS))
