"""The figures of a run on hand-made traces, and the service level against a brute-force weighted sum."""

import itertools
import math
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.metrics import MOST_MISSED, ServedRequest, ServiceLevel, curve, distribution, moving_averages, summarize

SLA_20_MS = ServiceLevel(itl_s=0.020)


def brute_force_averages(values: list[float], span: int) -> list[float]:
    """The definition: every value weighted by (1 - alpha) to the power of its age, alpha = 2 / (span + 1)."""
    keep = 1.0 - 2.0 / (span + 1.0)
    averages = []
    for last in range(len(values)):
        weights = [keep ** (last - index) for index in range(last + 1)]
        averages.append(sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights))
    return averages


def request(prompt_len: int, ttft_s: float, gaps_s: list[float], sent_s: float = 0.0) -> ServedRequest:
    return ServedRequest(prompt_len, sent_s, tuple(itertools.accumulate([ttft_s, *gaps_s])))


@given(st.lists(st.floats(0.0, 10.0), max_size=50), st.integers(1, 40))
def test_moving_averages_are_the_weighted_sums_of_their_definition(values: list[float], span: int) -> None:
    assert list(moving_averages(values, span)) == pytest.approx(brute_force_averages(values, span), abs=1e-12)


def test_moving_averages_of_a_worked_example() -> None:
    # span 3: alpha is a half. 1; (2 + 1/2) / (3/2); (4 + 2/2 + 1/4) / (7/4).
    assert list(moving_averages([1.0, 2.0, 4.0], 3)) == pytest.approx([1.0, 5 / 3, 3.0])


def test_one_long_gap_breaks_the_level_only_where_too_few_good_ones_balance_it() -> None:
    stall = 0.070
    assert not SLA_20_MS.is_met(request(512, 0.5, [stall, *[0.005] * 40])), "at the start nothing balances it"
    assert SLA_20_MS.is_met(request(512, 0.5, [*[0.005] * 40, stall])), "0.005 + (0.07 - 0.005) * 2 / 17 = 12.6 ms"
    assert not SLA_20_MS.is_met(request(512, 0.5, [*[0.005] * 40, stall, stall, stall])), "the tail counts too"


def test_why_a_level_was_missed_is_kept_of_the_first_requests_only() -> None:
    figures = summarize([request(512, 2.0, [0.01])] * (MOST_MISSED + 1), [SLA_20_MS])
    assert len(cast("list[str]", figures["missed_itl_20ms"])) == MOST_MISSED
    assert figures["request_goodput"] == 0.0


def test_the_first_token_is_due_after_prompt_tokens_over_512_seconds() -> None:
    assert SLA_20_MS.is_met(request(512, 1.0, [0.01]))
    assert not SLA_20_MS.is_met(request(511, 1.0, [0.01]))
    assert SLA_20_MS.is_met(request(512, 1.0, [])), "a single token has no gap"
    assert not SLA_20_MS.is_met(ServedRequest(512, 0.0, ()))


def test_figures_of_a_hand_made_run() -> None:
    served = [
        request(1024, 1.0, [0.010, 0.020, 0.030], sent_s=100.0),
        request(1024, 3.0, [0.010], sent_s=101.0),  # late for the level: 1024 / 512 s
        ServedRequest(9999, 100.5, (), "too long"),
    ]
    figures = summarize(served, [ServiceLevel(0.025), ServiceLevel(0.012)])
    assert figures["duration"] == pytest.approx(4.010)  # 100.0 until 104.01
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (2048, 6)
    assert figures["request_throughput"] == pytest.approx(2 / 4.010)
    assert figures["output_throughput"] == pytest.approx(6 / 4.010)
    assert figures["total_token_throughput"] == pytest.approx(2054 / 4.010)
    assert figures["request_goodput"] == figures["goodput_itl_25ms"] == pytest.approx(1 / 4.010)
    assert figures["goodput_itl_12ms"] == 0.0
    late = (
        "the request of 1024 tokens that was sent at 1.00 s: its first token came after 3.000 s and was due after 2.000"
    )
    assert figures["missed_itl_25ms"] == [late]
    average = "the request of 1024 tokens that was sent at 0.00 s: gap 2 was 20.00 ms, which made the average 15.31"
    assert figures["missed_itl_12ms"] == [average, late]
    assert figures["mean_ttft_ms"] == pytest.approx(2000.0)
    assert figures["p95_ttft_ms"] == pytest.approx(2900.0)
    assert figures["mean_tpot_ms"] == pytest.approx((20.0 + 10.0) / 2)
    assert figures["median_itl_ms"] == pytest.approx(15.0), "gaps of all requests: 10 10 20 30"
    assert figures["max_itl_ms"] == pytest.approx(30.0)
    assert figures["mean_e2el_ms"] == pytest.approx((1060.0 + 3010.0) / 2)


def test_result_keys_are_those_of_vllm_bench_serve() -> None:
    names = {
        f"{kind}_{name}_ms"
        for kind in ("mean", "median", "std", "p50", "p95", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    }
    names |= {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"}
    names |= {"request_goodput", "output_throughput", "total_token_throughput"}
    assert names <= summarize([request(10, 0.1, [0.1])], [SLA_20_MS]).keys()


def test_nothing_served_gives_no_latency_rather_than_a_good_one() -> None:
    figures = summarize([ServedRequest(5, 1.0, (), "refused")], [SLA_20_MS])
    assert (figures["completed"], figures["failed"], figures["request_throughput"]) == (0, 1, 0.0)
    assert figures["duration"] == 0.0
    assert figures["median_itl_ms"] is None
    assert figures["max_itl_ms"] is None
    assert figures["itl_curve_ms"] == []


def test_distribution_is_in_milliseconds_with_the_deviation_of_the_population() -> None:
    figures = distribution("itl", [0.001, 0.003])
    assert figures["std_itl_ms"] == pytest.approx(1.0)
    assert figures["p99_itl_ms"] == pytest.approx(2.98)


def test_the_curve_ends_where_the_values_are_too_few() -> None:
    assert curve([0.001] * 1000)[-1] == pytest.approx((99.9, 1.0))
    assert curve([0.001] * 999)[-1][0] == 99.5
    points = curve([number / 1e6 for number in range(1000)])
    assert all(a[1] < b[1] for a, b in itertools.pairwise(points))
    assert not any(math.isnan(value) for _, value in points)
