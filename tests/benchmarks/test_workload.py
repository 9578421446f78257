"""Workloads: lengths and arrivals as their definition says, and the same for the same seed."""

from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from benchmarks.workload import PlannedRequest, Trace, Workload

VOCAB_SIZE = 1000


def lengths(requests: list[PlannedRequest]) -> list[int]:
    return [len(request.prompt_token_ids) for request in requests]


def test_lengths_are_normal_with_three_tenths_of_the_mean() -> None:
    requests = Workload.of(2600, 60, 16, None, 4000).requests(1, VOCAB_SIZE, 16384)
    assert fmean(lengths(requests)) == pytest.approx(2600, rel=0.02)
    assert pstdev(lengths(requests)) == pytest.approx(780, rel=0.05)
    outputs = [request.output_len for request in requests]
    assert fmean(outputs) == pytest.approx(60, rel=0.02)
    assert pstdev(outputs) == pytest.approx(18, rel=0.05)


def test_lengths_keep_to_their_limits() -> None:
    short = Workload.of(16, 4, 1, None, 300).requests(1, VOCAB_SIZE, 16384)
    assert min(lengths(short)) == 16
    assert min(request.output_len for request in short) == 4
    long = Workload.of(12000, 60, 1, None, 50).requests(1, VOCAB_SIZE, 16384)
    assert max(lengths(long)) == 12000
    cut = Workload.of(1000, 60, 1, None, 200).requests(1, VOCAB_SIZE, 1024)
    assert max(len(request.prompt_token_ids) + request.output_len for request in cut) == 1024


def test_a_seed_makes_the_same_requests_and_another_one_shares_no_prefix() -> None:
    workload = Workload.of(100, 10, 4, None, 20)
    first, again, other = (workload.requests(seed, VOCAB_SIZE, 1024) for seed in (3, 3, 4))
    assert first == again
    starts = [tuple(request.prompt_token_ids[:8]) for request in first + other]
    assert len(set(starts)) == len(starts)
    ids = [token_id for request in first for token_id in request.prompt_token_ids]
    assert type(ids[0]) is int
    assert 0 <= min(ids) < max(ids) < VOCAB_SIZE


def test_n_times_a_workload_is_n_times_its_work() -> None:
    one = Workload.of(100, 10, 4, None, 20)
    three = one.times(3)
    assert (three.clients, three.num_requests, three.label) == (12, 60, "100/10:12")
    of_one, of_three = (
        [(len(request.prompt_token_ids), request.output_len) for request in load.requests(3, VOCAB_SIZE, 1024)]
        for load in (one, three)
    )
    assert of_three == [pair for pair in of_one for _ in range(3)]
    starts = [tuple(request.prompt_token_ids[:8]) for request in three.requests(3, VOCAB_SIZE, 1024)]
    assert len(set(starts)) == len(starts), "no prompt is another's again"
    assert one.times(1).requests(3, VOCAB_SIZE, 1024) == one.requests(3, VOCAB_SIZE, 1024)
    assert one.times(2).times(3) == one.times(6)
    assert Workload.of(100, 10, None, 5.0, 20).times(3).rate == 15.0
    with pytest.raises(ValueError, match="has prompts of 12001 tokens: at most 12000"):
        Workload.parse("12001/8:1", None)
    with pytest.raises(ValueError, match="of 20 requests, 3 of each"):
        Workload(100, 10, 20, 4, None, copies=3)


def test_open_loops_arrive_at_random_times_of_the_asked_rate() -> None:
    arrivals = [request.arrival_s for request in Workload.of(16, 4, None, 50.0, 5000).requests(1, VOCAB_SIZE, 100)]
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert pstdev(gaps) == pytest.approx(1 / 50, rel=0.1), "exponential: the deviation is the mean"
    closed = Workload.of(16, 4, 2, None, 5).requests(1, VOCAB_SIZE, 100)
    assert {request.arrival_s for request in closed} == {0.0}


def test_workloads_are_read_from_the_command_line() -> None:
    assert Workload.parse("2600/60:16", None) == Workload(2600, 60, 4 * 16 + 32, 16, None)
    assert Workload.parse("2600/60:16", 7).num_requests == 7
    assert Workload.parse("256/256:256x768", 7).num_requests == 768
    open_loop = Workload.parse("2600/60@12.5x99", None)
    assert (open_loop.clients, open_loop.rate, open_loop.num_requests) == (None, 12.5, 99)
    assert open_loop.label == "2600/60@12.5"


@pytest.mark.parametrize("text", ["2600:16", "2600/60", "2600/60:16@3", "a/b:1", "2600/60:-1", ""])
def test_a_workload_that_cannot_be_read_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(ValueError, match="2600/60:16"):
        Workload.parse(text, None)


@pytest.mark.parametrize("text", ["0/60:16", "2600/0:16", "2600/60:0", "2600/60@0", "2600/60:1x0"])
def test_no_number_of_a_workload_may_be_zero(text: str) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Workload.parse(text, None)


def test_an_output_that_leaves_no_room_for_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="max_model_len is 64"):
        Workload.of(100, 200, 1, None, 10).requests(1, VOCAB_SIZE, 64)


def test_a_trace_is_replayed_in_the_order_of_its_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival_s": 0.5, "prompt_len": 7, "output_len": 3}\n{"arrival_s": 0, "prompt_len": 20, "output_len": 1}\n'
    )
    requests = Trace.read(path).requests(1, VOCAB_SIZE, 64)
    assert [(request.arrival_s, request.output_len) for request in requests] == [(0.0, 1), (0.5, 3)]
    assert lengths(requests) == [20, 7]
    with pytest.raises(ValueError, match="21 tokens in all, max_model_len is 20"):
        Trace.read(path).requests(1, VOCAB_SIZE, 20)


@pytest.mark.parametrize(
    "line", ['{"arrival_s": 1, "prompt_len": 0, "output_len": 3}', '{"prompt_len": 5}', "nonsense"]
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival_s": 0, "prompt_len": 7, "output_len": 3}\n' + line)
    with pytest.raises(ValueError, match=r"trace\.jsonl:2: .*prompt_len"):
        Trace.read(path)
