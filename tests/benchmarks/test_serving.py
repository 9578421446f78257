"""The serving benchmark: its loops against a clockwork engine, then the script itself on the CPU."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sending, serving
from benchmarks.cpu_time import cpu_seconds
from benchmarks.metrics import Figures, ServiceLevel
from benchmarks.step_log import StepLogReader
from benchmarks.workload import PlannedRequest
from graphgen import InvalidRequestError
from graphgen.api.core import EngineCore

TINY_ENGINE = ["--device", "cpu", "--cpu-threads", "1", "--token-budget", "64", "--num-pages", "200"]


class ClockworkEngine:
    """Serves each request in a fixed time and notes how many were open."""

    def __init__(self, seconds: float = 0.002) -> None:
        self.seconds = seconds
        self.open = self.most_open = 0
        self.sent: list[tuple[PlannedRequest, float]] = []

    async def read(self, request: PlannedRequest) -> tuple[float, ...]:
        self.sent.append((request, time.monotonic()))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(self.seconds)
        self.open -= 1
        if request.output_len == 0:
            raise InvalidRequestError("no output")
        return (self.seconds,) * request.output_len


def requests_of(count: int, gap_s: float = 0.0) -> list[PlannedRequest]:
    return [PlannedRequest(number * gap_s, [1] * (number + 1), 2) for number in range(count)]


def test_a_closed_loop_keeps_every_client_busy_and_sends_all_in_order() -> None:
    engine, requests = ClockworkEngine(), requests_of(10)
    served = asyncio.run(sending.closed_loop(requests, 3, engine.read))
    assert engine.most_open == 3
    assert [request for request, _ in engine.sent] == requests
    assert sorted(request.prompt_len for request in served) == list(range(1, 11))


def test_an_open_loop_sends_each_at_its_time_and_waits_for_none() -> None:
    engine = ClockworkEngine(seconds=0.2)
    served = asyncio.run(sending.open_loop(requests_of(5, gap_s=0.01), engine.read))
    assert engine.most_open == 5
    begun_s = engine.sent[0][1]
    assert all(sent_s - begun_s >= request.arrival_s - 0.005 for request, sent_s in engine.sent)
    assert len(served) == 5


def test_a_refused_request_is_a_failed_one_and_the_rest_go_on() -> None:
    requests = [PlannedRequest(0.0, [1], 2), PlannedRequest(0.0, [1], 0), PlannedRequest(0.0, [1], 2)]
    served = asyncio.run(sending.closed_loop(requests, 1, ClockworkEngine().read))
    assert [request.error for request in served] == [None, "no output", None]
    assert [len(request.token_times_s) for request in served] == [2, 0, 2]


def test_the_script_measures_every_kind_of_load_in_one_engine(tmp_path: Path) -> None:
    trace, log, figures = (tmp_path / name for name in ("t.jsonl", "steps.jsonl", "out.json"))
    trace.write_text('{"arrival_s": 0.0, "prompt_len": 30, "output_len": 5}\n' * 2)
    loads = ["--workload", "40/8:1x4", "--workload", "40/8:2x4", "--workload", "40/8@100x3", "--trace", str(trace)]
    results = ["--step-log", str(log), "--json", str(figures), "--sla-itl-ms", "20", "100000"]
    rows = serving.main([*TINY_ENGINE, *loads, *results])

    assert [row["workload"] for row in rows] == ["40/8:1", "40/8:2", "40/8@100", "t.jsonl"]
    assert [(row["completed"], row["failed"]) for row in rows] == [(4, 0), (4, 0), (3, 0), (2, 0)]
    assert len({row["seed"] for row in rows}) == 4, "no row may find the prompts of another one cached"
    assert (rows[3]["total_input_tokens"], rows[3]["total_output_tokens"]) == (60, 10)
    written: list[dict[str, Any]] = json.loads(figures.read_text())["rows"]
    assert [row["median_itl_ms"] for row in written] == [row["median_itl_ms"] for row in rows]
    for row in written:
        assert 0 < row["median_ttft_ms"] <= row["median_e2el_ms"] <= row["duration"] * 1000
        assert row["p50_itl_ms"] <= row["p95_itl_ms"] <= row["p99_itl_ms"] <= row["max_itl_ms"]
        assert row["goodput_itl_20ms"] == row["request_goodput"] <= row["goodput_itl_100000ms"]
    # Every token of a row was computed in the row's own steps: of a request all tokens but the last one are computed.
    steps = StepLogReader(log).read_new()
    rows_computed = sum(step.chunk_tokens + len(step.decodes) for step in steps[-written[3]["steps"] :])
    assert rows_computed == 60 + 10 - 2
    assert sum(row["steps"] for row in written) < len(steps), "the warm-up has steps too"


def test_no_row_is_measured_beside_the_start_of_a_process_that_stands_by(monkeypatch: pytest.MonkeyPatch) -> None:
    spent_s = []
    measure = serving.measure

    def look(core: EngineCore, *rest: Any) -> Figures:
        before_s = cpu_seconds(core.pids["standby-0"])
        time.sleep(0.5)
        spent_s.append(cpu_seconds(core.pids["standby-0"]) - before_s)
        return measure(core, *rest)

    monkeypatch.setattr(serving, "measure", look)
    serving.main([*TINY_ENGINE, "--standby", "--workload", "40/8:1x2"])
    assert len(spent_s) == 1
    assert spent_s[0] < 0.1, "importing takes all of a core"


def test_streams_are_timed_where_they_are_read_and_budgets_are_swept(capsys: pytest.CaptureFixture[str]) -> None:
    engine = [*TINY_ENGINE[:4], "--num-pages", "200", "--sweep-budget", "32", "64"]
    load = ["--prompt-mean", "80", "--output-mean", "6", "--clients", "2", "--num-requests", "4", "--stream"]
    rows = serving.main([*engine, *load])
    assert [row["token_budget"] for row in rows] == [32, 64]
    assert rows[0]["total_input_tokens"] == rows[1]["total_input_tokens"], "budgets are compared on the same requests"
    assert all(row["completed"] == 4 for row in rows)
    printed = capsys.readouterr().out
    assert "budget" in printed
    assert "80/6:2" in printed


def test_what_missed_a_level_is_told_where_it_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    levels = [ServiceLevel(0.02), ServiceLevel(0.03)]
    missed: Figures = {"missed_itl_20ms": ["too late"], "missed_itl_30ms": ["much too late"]}
    rows = [{"workload": f"{asked} asked", "itl_target_ms": asked, **missed} for asked in (None, 20.0)]
    serving.print_misses(rows, levels)
    assert capsys.readouterr().out == "20.0 asked, 20 ms asked: too late\n"


def test_a_bad_workload_ends_the_script_before_an_engine_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.main(["--workload", "lots"])
    assert "workload 'lots' is not PROMPT/OUTPUT:CLIENTS" in capsys.readouterr().err


def test_the_highest_rate_is_searched_with_the_level_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    search = ["--workload", "16/4@400", "--highest-rate", "server", "--probe-seconds", "0.1"]
    (row,) = serving.main([*TINY_ENGINE, *search])
    assert row["level"] == "server"
    probes: list[dict[str, float]] = row["probes"]  # type: ignore[assignment]  # figures are of many types
    met = [probe["rate"] for probe in probes if probe["share"] >= 0.99]
    assert row["highest_rate"] == max(met, default=0.0)
    assert probes[0]["rate"] == 400.0
    assert f"{row['highest_rate']:.2f} a second is the most of which 99 % meet server" in capsys.readouterr().out


def test_a_search_has_its_own_rates_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.main(["--workload", "16/4@4", "--highest-rate", "server", "--itl-target-ms", "20"])
    assert "leave --trace and --itl-target-ms out" in capsys.readouterr().err
