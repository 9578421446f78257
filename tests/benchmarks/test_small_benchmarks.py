"""The benchmarks of single questions: they run on a machine without a GPU, and their figures are what they say."""

import contextlib
import importlib
import io
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks import linear, round_trip, scheduler, startup
from benchmarks.compare import cpu as on_cpu
from benchmarks.constrained import write_tokenizer
from benchmarks.latency import floor_ms, idle_bytes
from benchmarks.report import percentile, show
from graphgen import EngineConfig
from graphgen.demo import model_folder
from graphgen.ipc.worker_messages import Phase
from graphgen.launch.resolve import resolve
from graphgen.models.decoder import Decoder
from graphgen.models.families import load_spec
from graphgen.models.spec import Dense, Experts, Router
from tests import ROOT
from tests.models import tiny

SCRIPTS = (
    "attention",
    "compare.cpu",
    "collectives",
    "constrained",
    "experts",
    "frontends",
    "latency",
    "linear",
    "prefix",
    "protocol",
    "replicas",
    "restart",
    "scheduler",
    "simulate",
    "serving",
    "startup",
    "steps",
)

Document = dict[str, Any]  # Any: JSON


def run_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, *arguments: str) -> Document:
    """Runs a script's main() in this process and reads the JSON that it wrote."""
    path = tmp_path / f"{name}.json"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--json", str(path)])
    importlib.import_module(f"benchmarks.{name}").main()
    document: Document = json.loads(path.read_text())
    return document


# --- what all of them share --------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.0, 100.0))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    assert [percentile(values, percent) for percent in (25, 50, 75)] == pytest.approx(quartiles, rel=1e-9, abs=1e-6)


def test_there_is_no_percentile_of_nothing() -> None:
    assert np.isnan(percentile([], 50))


def test_a_table_keeps_values_under_their_columns_where_rows_differ(capsys: pytest.CaptureFixture[str]) -> None:
    show("t", [{"first": 1, "last": 2}, {"first": 3, "new": 4, "last": 5}], {"command": "c"})
    lines = [[cell.strip() for cell in line.split(line[0])] for line in capsys.readouterr().out.splitlines() if line]
    assert ["", "first", "last", "new", ""] in lines
    assert ["", "3", "5", "4", ""] in lines


def test_the_floor_of_a_mixture_counts_the_experts_that_rows_choose() -> None:
    one, size = Experts(num_experts=8, top_k=2, size=16, activation="silu", router=Router()), 3 * 32 * 16
    assert idle_bytes(one, 32, rows=1, item_bytes=2) == pytest.approx(6 * size * 2)
    assert idle_bytes(one, 32, rows=2, item_bytes=2) == pytest.approx(6 * 6 / 8 * size * 2)
    assert idle_bytes(Dense(size=16, activation="silu"), 32, rows=1, item_bytes=2) == 0


@pytest.mark.parametrize(
    ("settings", "layers_gb", "head_gb", "kv_bytes"),
    [
        ({}, 13.96, 1.05, 131_072),
        ({"quantization": "fp8", "kv_cache_dtype": "fp8"}, 6.98, 1.05, 65_536),
        ({"tensor_parallel": 2}, 6.98, 0.53, 65_536),
    ],
    ids=["bfloat16", "fp8", "two ranks"],
)
def test_the_floor_reads_weights_as_they_are_stored_and_shared(
    settings: dict[str, object], layers_gb: float, head_gb: float, kv_bytes: int
) -> None:
    """Llama-3.1-8B: 6.98e9 parameters in its layers, 128256 x 4096 in its head, of which the embedding reads a row."""
    shape = ROOT / "benchmarks" / "shapes" / "llama-3.1-8b"
    config = EngineConfig(model=str(shape), load_format="dummy", device="cuda", **settings)  # type: ignore[arg-type]  # as said
    launch = resolve(config, load_spec(str(shape)), shape)
    expected_s = ((layers_gb + head_gb) * 1e9 + 64 * 1024 * kv_bytes) / 4e12
    assert floor_ms(launch, 64, 1024, 4e12) == pytest.approx(expected_s * 1000.0, rel=3e-3)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_the_question_and_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"python -m benchmarks.{name}" in said
    assert "?" in said
    assert "--json" in said


def test_prefix_computes_what_is_new_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--shared", "100", "--own", "20", "--pairs", "2", "--samples", "3", "--max-model-len", "512")
    rows = {row["case"]: row for row in run_script(monkeypatch, tmp_path, "prefix", *arguments)["rows"]}
    first, begins, turn, salted, samples = rows.values()
    assert [row["prompt"] for row in rows.values()] == [120, 120, 180, 120, 120]
    # Of the answer's last two tokens one is never computed, and the other not known when the request ends.
    assert [row["cached p50"] for row in (first, begins, turn, salted)] == [0, 100, 158, 0]
    assert samples["cached p50"] == 119
    assert (first["equal"], salted["equal"], samples["equal"], begins["equal"]) == ("2 of 2", "2 of 2", "6 of 6", "-")
    assert 0 < begins["TTFT p50 ms"] <= begins["TTFT max ms"]


@pytest.mark.parametrize("name", ["steps", "latency"])
def test_steps_and_latency_run_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = {
        "steps": ("--max-num-seqs", "2", "--max-model-len", "64", "--context", "16", "--repeats", "2"),
        "latency": (
            "--max-model-len",
            "64",
            "--context",
            "8",
            "--tokens",
            "32",
            "--batches",
            "1",
            "2",
            "--idle",
            "0.2",
        ),
    }
    document = run_script(monkeypatch, tmp_path, name, "--device", "cpu", "--token-budget", "8", *tiny[name])
    figure = {"steps": "ms p50", "latency": "ITL p50 ms"}[name]
    assert len(document["rows"]) >= 2
    assert all(row[figure] > 0.0 for row in document["rows"])
    assert document["about"]["command"].startswith(f"python -m benchmarks.{name} --device cpu")


def test_constrained_measures_both_kinds_of_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = ("--device", "cpu", "--streams", "5", "--prompt", "8", "--tokens", "48")
    rows = run_script(monkeypatch, tmp_path, "constrained", *small)["rows"]
    none, fifth, every, *texts, logprobs, _ = rows
    assert (none["free p50 x"], none.get("bound p50 ms"), every.get("free p50 ms")) == (1.0, None, None)
    assert [row["of"] for row in rows] == ["", "call", "call", "text", "text", "", ""]
    measured = fifth["free p50 ms"], fifth["bound p50 ms"], every["bound p50 ms"], logprobs["free p50 ms"]
    assert all(one > 0.0 for one in (*measured, *(row["bound p50 ms"] for row in texts)))


def test_a_model_without_a_tokenizer_gets_one_of_its_size(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 12_000)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = 'a {"b": [1, 2]} of many words'
    assert tokenizer.get_vocab_size() == 12_000
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_experts_times_every_product_at_every_number_of_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--rows", "1", "40", "--repeats", "1", "--rotate-mb", "1")
    rows = run_script(monkeypatch, tmp_path, "experts", *arguments)["rows"]
    small = [row for row in rows if row["shape"] == "64 experts"]
    assert [(row["rows"], row["product"]) for row in small] == [
        *((1, name) for name in ("operator", "grouped_mm", "batched")),
        *((40, name) for name in ("operator", "grouped_mm")),
    ]
    assert all(row["us"] > 0.0 for row in rows)
    assert small[0]["floor us"] < small[-1]["floor us"], "more rows choose more experts"


# --- scheduler -----------------------------------------------------------------------------------------------------


def test_the_scheduler_benchmark_writes_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--running", "1", "8", "--waiting", "5", "50", "--steps", "60", "--token-budget", "64")
    lengths = ("--prompt-mean", "20", "--output-mean", "30")
    document = run_script(monkeypatch, tmp_path, "scheduler", *arguments, *lengths, "--round-trip", "--trips", "20")
    rows = document["rows"]
    steps = [row for row in rows if "decodes a step" in row]
    assert [(row["running"], row["waiting"]) for row in steps] == [(1, 5), (1, 50), (8, 5), (8, 50)]
    for row in steps:
        assert 0.0 < row["p50 us"] <= row["p99 us"] <= row["max us"]
        assert row["update p50 us"] + row["schedule p50 us"] < row["max us"]
        # A slot computes a prompt of about 20 tokens between outputs of about 30: nearly all rows are decodes.
        assert 0.7 * row["running"] < row["decodes a step"] <= row["running"]
    assert [row["waiting"] for row in rows if "p99 ratio" in row] == ["50 : 5"] * 2
    codec = [row for row in rows if "plan bytes" in row]
    trips = [row for row in rows if "trip p99 us" in row]
    assert [row["decode rows"] for row in codec] == [row["decode rows"] for row in trips] == [1, 64, 256]
    assert all(0.0 < row["encode plan us"] < trip["trip p50 us"] for row, trip in zip(codec, trips, strict=True))


def test_a_drive_keeps_as_many_requests_open_as_it_was_told() -> None:
    drive = scheduler.Drive(scheduler.Load(20, 6, 64, seed=1), num_running=8, num_waiting=30)
    drive.warm_up(8)
    for _ in range(100):
        drive.step()
        assert drive.scheduler.running + drive.scheduler.waiting == 38
        assert drive.scheduler.steps_in_flight == 2
    assert drive.scheduler.counters.finished > 8
    assert drive.scheduler.counters.preemptions == 0


def test_flatness_is_the_longest_queue_over_the_shortest() -> None:
    rows = [
        {"running": 4, "waiting": 1000, "p50 us": 30.0, "p99 us": 90.0},
        {"running": 4, "waiting": 10, "p50 us": 20.0, "p99 us": 60.0},
        {"running": 4, "waiting": 100, "p50 us": 99.0, "p99 us": 99.0},
    ]
    assert scheduler.flatness(rows) == [{"running": 4, "waiting": "1000 : 10", "p50 ratio": 1.5, "p99 ratio": 1.5}]


@pytest.mark.parametrize("num_rows", [1, 64, 256])
def test_an_answer_has_one_token_for_each_row(num_rows: int) -> None:
    plan = round_trip.make_plan(num_rows)
    result = round_trip.answer(plan)
    assert result.step_id == plan.step_id
    assert len(result.drawn.token_ids) == len(plan.decode_positions) == 4 * num_rows


# --- protocol ------------------------------------------------------------------------------------------------------


def test_the_protocol_benchmark_measures_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--streams", "2", "--tokens", "10", "--step-ms", "5")
    rows = run_script(monkeypatch, tmp_path, "protocol", *arguments)["rows"]
    ways = next(row for row in rows if "added p50 us" in row)
    assert ways["frontend p50 us"] - ways["in process p50 us"] == pytest.approx(ways["added p50 us"])
    assert ways["in process p50 us"] > 0
    paced = [row for row in rows if row.get("step ms") == 5 and "tokens a message" in row]
    assert all(1.0 <= row["tokens a message"] <= 10 for row in paced)
    assert [row["neighbour"] for row in rows if "neighbour" in row] == ["none", "flood", "stopped reader"]


def test_the_frontends_benchmark_reads_every_token_of_every_frontend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ("--streams", "4", "--tokens", "20", "--step-ms", "5", "--rounds", "1")
    one, two = run_script(monkeypatch, tmp_path, "frontends", *arguments)["rows"]
    assert [(row["frontends"], row["streams of each"]) for row in (one, two)] == [(1, 4), (2, 4)]
    assert one["tokens/s x"] == one["capacity, tokens/s x"] == 1.0
    assert two["frontend CPU us a token"] * two["capacity, tokens/s"] == pytest.approx(2e6)
    assert two["of the busiest"] >= two["frontend CPU us a token"]


def test_the_gateway_benchmark_measures_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--streams", "2", "--tokens", "10", "--step-ms", "5", "--idle", "0")
    ways, paced, fast = run_script(monkeypatch, tmp_path, "gateway", *arguments)["rows"]
    assert ways["HTTP p50 us"] - ways["GGP/1 p50 us"] == pytest.approx(ways["added p50 us"])
    assert ways["GGP/1 p50 us"] > 0
    assert all(row["tokens an event"] >= 1 and row["gateway CPU us a token"] >= 0 for row in (paced, fast))


# --- collectives ---------------------------------------------------------------------------------------------------


def test_sums_over_two_ranks_are_timed_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run_script(monkeypatch, tmp_path, "collectives", "--device", "cpu", "--kib", "8")["rows"]
    assert [row["what"] for row in rows] == ["sum of 8 KiB", "logits of 1 rows"]
    assert all(row["ranks"] == 2 and row["Gloo"] > 0 for row in rows)


# --- linear --------------------------------------------------------------------------------------------------------


def test_the_linear_benchmark_writes_every_layer_and_their_sum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--dtype", "float32", "--rows", "1", "3", "--repeats", "2")
    sizes = ("--rotate-mb", "1", "--read-mb", "1", "--peak-size", "32")
    rows = run_script(monkeypatch, tmp_path, "linear", *arguments, *sizes)["rows"]
    layers = ["qkv", "o", "gate_up", "down", "head", "all"]
    assert [(row["layer"], row["M"]) for row in rows] == [(layer, size) for layer in layers for size in (1, 3)]
    for size in (1, 3):
        us = {row["layer"]: row["us"] for row in rows if row["M"] == size}
        assert us["all"] == pytest.approx(us["qkv"] + us["o"] + us["gate_up"] + us["down"])
    for row in rows:
        assert row["of the floor"] == pytest.approx(row["floor us"] / row["us"])


def test_the_shapes_are_those_of_the_decoder() -> None:
    spec = load_spec(model_folder())
    decoder = Decoder(spec, torch.float32, torch.device("cpu"))
    weights = dict(decoder.named_parameters())
    names = {
        "qkv": "layers.0.attention.qkv.weight",
        "o": "layers.0.attention.o.weight",
        "gate_up": "layers.0.mlp.gate_up.weight",
        "down": "layers.0.mlp.down.weight",
        "head": "embedding.weight" if spec.head.tied else "head.weight",
    }
    found = {shape.name: (shape.out_size, shape.in_size) for shape in linear.shapes_of(spec)}
    assert found == {layer: tuple(weights[name].shape) for layer, name in names.items()}


def test_shares_are_of_the_measured_limits() -> None:
    """A layer of 4096x4096 in bf16 moves 33.6 MB at one row: 8.0 us at 4.2 TB/s, 0.6 of 13.4 us."""
    shape = linear.Shape("o", 4096, 4096, in_block=True)
    limits = linear.Limits(bytes_per_s=4.2e12, flops_per_s=800e12)
    row = linear.figures("o", [shape], 1, 13.4e-6, limits, item_bytes=2)
    assert row["floor us"] == pytest.approx((2 * 4096 * 4096 + 4 * 4096) / 4.2e12 * 1e6)
    assert row["of the floor"] == pytest.approx(0.597, abs=0.001)
    many = linear.figures("o", [shape], 2048, 99e-6, limits, item_bytes=2)
    assert many["TFLOP/s"] == pytest.approx(2 * 2048 * 4096 * 4096 / 99e-6 / 1e12)
    assert many["of the peak"] == pytest.approx(0.868, abs=0.001)


def test_weights_are_rotated_through_more_bytes_than_asked() -> None:
    shape = linear.Shape("o", 64, 32, in_block=True)
    cpu = torch.device("cpu")
    assert linear.Weights(shape, cpu, torch.float32, rotate_bytes=10 * 64 * 32 * 4 + 1).num_copies == 11
    assert linear.Weights(shape, cpu, torch.float32, rotate_bytes=1).num_copies == 2


# --- startup -------------------------------------------------------------------------------------------------------


def make_start(**seconds: float) -> startup.Start:
    phases = tuple(Phase(name, value) for name, value in seconds.items())
    total_s = sum(seconds.values())
    return startup.Start("cpu", "torch", False, phases, total_s + 1.0, total_s + 2.0, (30.0, 20.0), 0.5)


def test_the_startup_benchmark_writes_phases_that_fit_into_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = ("--device", "cpu", "--token-budget", "8", "--max-num-seqs", "2", "--max-model-len", "64")
    document = run_script(monkeypatch, tmp_path, "startup", "--runs", "1", "--cold", *tiny)
    median_s = {row["phase"]: row["median s"] for row in document["rows"] if "phase" in row}
    assert {"imports", "load", "capture"} < set(median_s)
    assert 0.0 < median_s["imports"] < median_s["worker, all phases"]
    # The last phase ends before the engine hears of it, and the program began before the engine.
    assert median_s["worker, all phases"] < median_s["ready, from the program's start"]
    assert median_s["Engine()"] < median_s["ready, from the program's start"]
    assert [row["request"] for row in document["rows"] if "request" in row] == ["first request", "second request"]
    assert document["about"]["compile_caches"] == "cold"


def test_medians_are_taken_phase_by_phase() -> None:
    starts = [make_start(load=1.0, capture=9.0), make_start(load=2.0, capture=5.0), make_start(load=9.0, compile=1.0)]
    rows = {row["phase"]: row for row in startup.phase_rows(starts)}
    assert list(rows)[:4] == ["load", "capture", "compile", "worker, all phases"]
    times = {"median s": 2.0, "min s": 1.0, "max s": 9.0}
    assert rows["load"] == {"phase": "load", **times, "beside earlier phases s": 0.0}
    assert rows["capture"]["median s"] == 5.0
    assert rows["compile"]["median s"] == 0.0
    assert rows["worker, all phases"]["median s"] == 10.0
    assert startup.request_rows(starts)[1]["TTFT median ms"] == 20.0


def test_what_other_phases_hid_is_shown_and_added_to_nothing() -> None:
    start = startup.Start("cpu", "torch", False, (Phase("context", 0.1, hidden_s=3.0),), 1.0, 2.0, (30.0, 20.0), 0.5)
    rows = {row["phase"]: row for row in startup.phase_rows([start])}
    assert rows["context"]["beside earlier phases s"] == 3.0
    assert rows["worker, all phases"]["median s"] == 0.1


@pytest.mark.parametrize("cold", [True, False])
def test_every_cold_start_finds_caches_of_its_own_and_empty(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def start(config: EngineConfig, caches: dict[str, str], timeout_s: float) -> startup.Start:
        seen.append(caches)
        for folder in map(Path, caches.values()):
            assert not folder.exists()
            folder.mkdir(parents=True)
            (folder / "compiled").touch()
        return make_start(load=1.0)

    monkeypatch.setattr(startup, "start_in_new_process", start)
    startup.measure(EngineConfig(), num_runs=2, cold=cold, timeout_s=1.0)
    folders = [folder for caches in seen for folder in caches.values()]
    assert len(set(folders)) == (4 if cold else 0)
    assert not any(Path(folder).exists() for folder in folders)
    assert all(set(caches) == (set(startup.COMPILE_CACHES) if cold else set()) for caches in seen)


def test_a_start_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="exit code 1"):
        startup.start_in_new_process(EngineConfig(model=str(tmp_path)), {}, timeout_s=60.0)
    assert "config.json" in capfd.readouterr().err


def test_a_program_is_compared_with_transformers_in_the_same_round() -> None:
    def run(cpu_ms: float) -> on_cpu.Run:
        return on_cpu.Run(ready_s=1.0, first_ms=2.0, wall_ms=3.0, cpu_ms=cpu_ms, faults=4.0)

    runs = {"graphgen": [run(10.0), run(30.0), run(22.0)], "transformers": [run(10.0), run(20.0), run(20.0)]}
    rows = {row["program"]: row for row in on_cpu.rows_of(runs, "transformers")}
    assert (rows["graphgen"]["CPU / transformers's"], rows["transformers"]["CPU / transformers's"]) == (1.1, 1.0)
    assert rows["graphgen"]["CPU ms a turn"] == 22.0


@pytest.mark.parametrize(("requests", "tokens"), [(1, 1), (3, 4)])
def test_programs_answer_the_same_prompts_in_turns(requests: int, tokens: int, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    case = on_cpu.Case(str(tmp_path), "auto", prompt_tokens=12, turns=3, requests=requests, tokens=tokens)
    for name in ("graphgen", "transformers"):
        replies = io.BytesIO()
        on_cpu.take_turns(name, case, io.BytesIO(b"\n\n"), replies)
        ready, *turns = replies.getvalue().splitlines()
        assert min(msgspec.structs.astuple(msgspec.json.decode(ready, type=on_cpu.Ready))) > 0
        assert len(turns) == 2, "one for each line"
        for turn in turns:
            measured = msgspec.json.decode(turn, type=on_cpu.Turn)
            assert measured.wall_ms > 0
            assert measured.cpu_ms >= 0


def test_programs_answer_as_many_prompts_of_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    case = on_cpu.Case("", "", prompt_tokens=20, turns=2, requests=8, tokens=24)
    heard: list[on_cpu.Prompts] = []
    contender = on_cpu.Contender(100, heard.append, [os.getpid()])
    monkeypatch.setitem(on_cpu.CONTENDERS, "graphgen", lambda case: contextlib.nullcontext(contender))
    on_cpu.take_turns("graphgen", case, io.BytesIO(b"\n\n"), io.BytesIO())
    assert {len(prompts) for prompts in heard} == {8}
    assert {len(prompt) for prompts in heard for prompt in prompts} == {20}
    assert len({tuple(prompt) for prompts in heard for prompt in prompts}) == 8 * len(heard), "none comes twice"


def test_prompts_that_come_before_those_that_count_use_every_page() -> None:
    for prompt_tokens, requests in itertools.product((1, 15, 16, 40, 1000), (1, 8)):
        case = on_cpu.Case("", "auto", prompt_tokens, turns=1, requests=requests, tokens=24)
        full_pages = requests * max(1, prompt_tokens // on_cpu.PAGE_SIZE)
        assert case.num_warm_up * full_pages > case.num_pages
        assert case.num_pages * on_cpu.PAGE_SIZE > requests * (prompt_tokens + 24)
