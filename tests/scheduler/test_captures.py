"""When rare buckets are captured: one at a time, in the quiet, and never one that has done harm."""

import logging

import pytest

from graphgen.ipc.worker_messages import Bucket, Captured
from graphgen.scheduler.captures import QUIET_S, Captures

RARE = (Bucket(0, 2), Bucket(0, 3), Bucket(12, 2))


def make_captures() -> Captures:
    return Captures(RARE, num_buckets=5, now_s=0.0)


def captured(bucket: Bucket | None, seconds: float = 0.1, problem: str = "") -> Captured:
    assert bucket is not None
    return Captured(bucket, seconds, problem=problem)


def test_nothing_is_asked_for_before_the_engine_was_idle_for_a_while() -> None:
    captures = make_captures()
    assert captures.due_s == QUIET_S
    assert captures.next(True, 0.9 * QUIET_S) is None
    assert captures.next(False, 5.0) is None
    assert captures.due_s == 5.0 + QUIET_S
    assert captures.next(True, 5.0 + 0.9 * QUIET_S) is None
    assert captures.next(True, 5.0 + QUIET_S) == Bucket(12, 2), "the largest first"


def test_one_at_a_time_and_at_once_after_each_other_while_it_stays_idle() -> None:
    captures = make_captures()
    now_s, asked = QUIET_S, []
    for number in range(3):
        asked.append(captures.next(True, now_s))
        assert captures.next(True, now_s + 100.0) is None, "one is on its way"
        assert captures.due_s is None
        assert captures.num_captured == 2 + number, "a bucket counts when it is captured"
        now_s += 0.1
        captures.answered(captured(asked[-1]))
    assert asked == list(reversed(RARE))
    assert (captures.num_captured, captures.num_buckets) == (5, 5)
    assert captures.next(True, 1000.0) is None
    assert captures.due_s is None


def test_a_request_ends_the_quiet_and_the_answer_still_counts() -> None:
    captures = make_captures()
    asked = captures.next(True, QUIET_S)
    assert captures.next(False, QUIET_S + 0.01) is None
    captures.answered(captured(asked))
    assert captures.num_captured == 3
    assert captures.next(False, QUIET_S + 0.1) is None
    assert captures.next(True, 2 * QUIET_S) is None
    assert captures.next(True, 2 * QUIET_S + 0.2) is not None


def test_a_bucket_that_finds_no_memory_is_given_up_for_good(caplog: pytest.LogCaptureFixture) -> None:
    captures = make_captures()
    with caplog.at_level(logging.INFO, "graphgen.scheduler"):
        captures.answered(captured(captures.next(True, 1.0), problem="out of memory"))
        assert "12+2" in caplog.text
        assert "out of memory" in caplog.text
        for _ in range(2):
            captures.answered(captured(captures.next(True, 2.0), seconds=0.25))
    assert captures.num_captured == 4
    assert "4 of 5 buckets are captured" in caplog.text
    assert captures.longest_ms == 250.0
    captures.restart(3.0)
    assert captures.num_captured == 2
    assert captures.next(True, 3.0 + QUIET_S) == Bucket(0, 3)


def test_a_bucket_of_which_a_worker_died_is_not_asked_of_the_next_one() -> None:
    captures = make_captures()
    captures.answered(captured(captures.next(True, 1.0)))
    assert captures.next(True, 1.1) == Bucket(0, 3)
    captures.worker_lost()
    captures.worker_lost()  # the one that replaced it, before it served
    captures.restart(9.0)
    asked = []
    for number in range(2):
        asked.append(captures.next(True, 10.0 + number))
        captures.answered(captured(asked[-1]))
    assert asked == [Bucket(12, 2), Bucket(0, 2)]
    assert captures.next(True, 99.0) is None
    assert captures.num_captured == 4


def test_what_was_not_asked_for_cannot_come() -> None:
    captures = make_captures()
    with pytest.raises(ValueError, match="asked"):
        captures.answered(captured(Bucket(0, 2)))
