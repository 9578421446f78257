"""What dies again and again is started again, and never in a loop without a pause."""

from graphgen.launch.starts import HEALTHY_S, LONGEST_WAIT_S, Backoff


def test_waits_double_up_to_the_longest_and_there_is_no_last_start() -> None:
    backoff, now_s, waits = Backoff(), 0.0, []
    for _ in range(200):
        backoff.started(now_s)
        now_s += 0.5
        waits.append(backoff.ended(now_s))
        now_s += waits[-1]
    assert waits[:5] == [0.0, 0.25, 0.5, 1.0, 2.0]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_S


def test_a_frontend_that_lived_for_a_while_is_started_again_at_once() -> None:
    backoff = Backoff()
    for _ in range(10):
        backoff.started(0.0)
        assert backoff.ended(HEALTHY_S / 2) <= LONGEST_WAIT_S
    backoff.started(0.0)
    assert backoff.ended(HEALTHY_S) == 0.0


def test_the_longest_wait_is_the_caller_s() -> None:
    backoff = Backoff(longest_wait_s=2.0)
    assert [backoff.ended(0.0) for _ in range(8)][-2:] == [2.0, 2.0]
