"""What is counted of how requests were served, held to lists of the values themselves."""

from bisect import bisect_left
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphgen.calls.outputs import StreamPiece
from graphgen.server.frontend.tallies import Range, RequestClock, Tallies


def piece(sample: int = 0, num_tokens: int = 1) -> StreamPiece:
    return StreamPiece("x", (7,) * num_tokens, None, cached_tokens=2, sample_index=sample, prompt_tokens=5)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 9.0])))
def test_a_range_has_its_upper_end(values: list[float]) -> None:
    counted = Range((0.5, 1.0, 2.0))
    for value in values:
        counted.add(value)
    histogram = counted.histogram()
    for index, bound in enumerate(histogram.bounds):
        assert sum(histogram.counts[: index + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.sum == pytest.approx(sum(values))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0.0001, 0.5)), min_size=1, max_size=40))
def test_gaps_and_first_tokens_are_those_of_the_samples(steps: list[tuple[int, float]]) -> None:
    tallies, clock = Tallies(), RequestClock(1.0, 3, ttft_target_ms=100.0, itl_target_ms=50.0, tpot_target_ms=60.0)
    now_s = 1.0
    times: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for sample, wait_s in steps:
        now_s += wait_s
        times[sample].append(now_s)
        tallies.took(clock, piece(sample), now_s, started_s=1.0)
    tallies.ended(clock, ["stop", "stop", "length"], has_failed=False)
    gaps = [later - one for of_sample in times.values() for one, later in pairwise(of_sample)]
    means = [(one[-1] - one[0]) / (len(one) - 1) for one in times.values() if len(one) > 1]
    first_s = steps[0][1]
    for found, wanted in (
        (tallies.itl_s, gaps),
        (tallies.tpot_s, means),
        (tallies.ttft_s, [1.0 + first_s - 1.0]),
        (tallies.e2e_s, [now_s - 1.0]),
    ):
        histogram = found.histogram()
        counts = [0] * len(histogram.counts)
        for value in wanted:
            counts[bisect_left(histogram.bounds, value)] += 1
        assert histogram.counts == counts
    assert tallies.with_target == {"ttft": 1, "itl": len(gaps), "tpot": len(means)}
    assert tallies.target_misses["itl"] == sum(gap > 0.05 for gap in gaps)
    assert tallies.target_misses["tpot"] == sum(mean > 0.06 for mean in means)
    assert (tallies.output_tokens, tallies.prompt_tokens, tallies.cached_tokens) == (len(steps), 5, 2)
    assert tallies.ends == {"stop": 2, "length": 1}


def test_what_failed_or_was_left_has_no_duration_but_an_end() -> None:
    tallies, clock = Tallies(), RequestClock(0.0, 1)
    tallies.took(clock, piece(), 0.5, 0.25)
    tallies.ended(clock, ["engine_lost"], has_failed=True)
    tallies.ended(RequestClock(0.0, 0), ["aborted"], has_failed=False)
    assert sum(tallies.e2e_s.histogram().counts) == 0
    assert sum(tallies.ttft_s.histogram().counts) == 1
    assert tallies.ends == {"engine_lost": 1, "aborted": 1}
    assert tallies.with_target == {"ttft": 0, "itl": 0, "tpot": 0}


def test_answers_of_all_gateways_add_up_and_are_of_few_kinds() -> None:
    tallies = Tallies()
    for _ in range(2):
        tallies.answered({"/v1/models 200": 2, "/v1/models 401": 1})
    tallies.answered({f"/{number} 200": 1 for number in range(100)})
    assert (tallies.http_answers["/v1/models 200"], tallies.http_answers["/v1/models 401"]) == (4, 2)
    assert sum(tallies.http_answers.values()) == 106
    assert len(tallies.http_answers) == 65
