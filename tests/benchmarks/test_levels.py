"""MLPerf's levels, and the search for the highest rate, against requests and engines whose answer is known."""

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import highest_rate
from benchmarks.levels import LEAST_RATE, MLPERF_LEVELS, PRECISION, SHARE, RequestLevel, find_highest_rate
from benchmarks.metrics import ServedRequest, ServiceLevel, summarize


def served(*times_s: float) -> ServedRequest:
    return ServedRequest(10, 0.0, times_s)


def test_a_level_bounds_the_first_token_and_the_mean_of_the_gaps() -> None:
    level = RequestLevel(ttft_s=0.5, tpot_s=0.03)
    assert level.is_met(served(0.5))
    assert not level.is_met(served(0.501))
    assert level.is_met(served(0.1, 0.1, 0.16)), "a long gap counts with the short one before it"
    assert not level.is_met(served(0.1, 0.1, 0.161))
    assert not level.is_met(served()), "a request that was refused meets nothing"
    limits = {name: (level.ttft_s, level.tpot_s) for name, level in MLPERF_LEVELS.items()}
    assert limits == {"server": (2.0, 0.1), "interactive": (0.5, 0.03)}


def test_figures_say_which_share_met_each_level() -> None:
    figures = summarize([served(0.4, 0.42), served(1.0, 1.02), served(3.0), served()], [ServiceLevel(0.02)])
    assert (figures["mlperf_interactive_share"], figures["mlperf_server_share"]) == (0.25, 0.5)


@settings(max_examples=200)
@given(st.floats(0.02, 5000.0), st.floats(0.02, 5000.0))
def test_the_search_finds_the_capacity_of_an_engine_that_has_one(capacity: float, first_rate: float) -> None:
    highest, probes = find_highest_rate(lambda rate: SHARE if rate <= capacity else 0.5, first_rate)
    assert highest <= capacity <= highest * PRECISION * (1.0 + 1e-9)
    assert probes[0].rate == first_rate
    assert len(probes) < 40
    assert highest in [probe.rate for probe in probes if probe.is_met], "what is said was served"


def test_an_engine_that_meets_nothing_has_no_rate() -> None:
    highest, probes = find_highest_rate(lambda rate: 0.0, 1.0)
    assert highest == 0.0
    assert min(probe.rate for probe in probes) >= LEAST_RATE


def test_the_simulated_search_says_what_each_objective_can_do() -> None:
    rows = highest_rate.main(["--workload", "256/16", "--level", "interactive", "--seconds", "0.5"])
    assert [(row["objective"], row["asked"]) for row in rows] == [
        (name, asked) for name in ("latency", "balanced", "throughput") for asked in (False, True)
    ]
    for row in rows:
        assert float(str(row["highest_rate"])) > 8.0
        assert float(str(row["p99_tpot_ms"])) <= 30.0
        assert float(str(row["p99_ttft_ms"])) <= 550.0, "of 128 requests one may be late"
