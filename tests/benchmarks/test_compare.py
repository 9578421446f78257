"""A comparison of engines: graphgen's own server with the demo model, and peers that compute nothing."""

from pathlib import Path

import msgspec
import pytest

from benchmarks.compare import __main__ as command
from benchmarks.compare import engines
from benchmarks.compare.engines import Contender, Engine, Job, Served
from benchmarks.compare.figures import Comparison, markdown, read
from benchmarks.metrics import ServedRequest
from graphgen.demo import model_folder
from tests import ROOT

NOT_THERE = "a-distribution-that-nobody-has"


def stub(job: Job, port: int) -> list[str]:
    return ["-P", "-m", "tests.benchmarks.stub_server", str(port)]


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is a stub that is there, SGLang is not installed."""
    vllm = Engine("msgspec", "pip install vllm", stub)
    sglang = engines.ENGINES["sglang"]._replace(distribution=NOT_THERE)
    monkeypatch.setattr(engines, "ENGINES", {**engines.ENGINES, "vllm": vllm, "sglang": sglang})
    monkeypatch.setattr(command, "ENGINES", engines.ENGINES)


def run(tmp_path: Path, *arguments: str) -> tuple[Comparison, str]:
    """The file that was written, and the tables."""
    jobs = ("--model", str(model_folder()), "--max-model-len", "256", "--num-requests", "5", "--seed", "1")
    sizes = ("--decodes", "2", "--context", "20", "--tokens", "64", "--settle", "0")
    results = ("--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md"))
    command.main([*jobs, *sizes, *results, *arguments])
    return read(tmp_path / "out.json"), (tmp_path / "out.md").read_text()


def test_all_engines_are_in_one_table_and_who_is_not_installed_says_how_to(tmp_path: Path) -> None:
    found, tables = run(tmp_path, "--workload", "20/8:2", "--workload", "20/8@50")
    assert [(row.workload, row.engine) for row in found.rows] == [
        (load, engine) for load in ("20/8:2", "20/8@50") for engine in ("graphgen", "vllm")
    ]
    assert [row.failed for row in found.rows] == [0] * 4
    assert all(row.request_throughput > 0 and row.median_ttft_ms > 0 for row in found.rows), found.rows
    assert all(row.max_itl_ms > 0 for row in found.rows), "tokens of an event that is read late have no gaps"
    (decodes,) = found.decodes
    assert list(decodes) == ["decodes", "graphgen", "vllm"]
    assert list(found.about.engines) == ["graphgen", "vllm"]
    assert list(found.absent) == ["sglang"]
    assert "pip install sglang" in found.absent["sglang"]
    assert "- sglang: not installed" in tables
    assert tables.strip() == markdown(found)


@pytest.mark.parametrize(
    ("second_sent_s", "gap_ms"),
    [(0.0, 25.0), (0.015, 30.0), (0.095, None)],
    ids=["all together", "together at last", "one after the other"],
)
def test_the_gap_is_that_of_requests_which_all_decode(
    monkeypatch: pytest.MonkeyPatch, second_sent_s: float, gap_ms: float | None
) -> None:
    times_s = (0.01, 0.02, 0.04, 0.07, 0.1)
    done = [ServedRequest(20, sent_s, times_s) for sent_s in (0.0, second_sent_s)]
    monkeypatch.setattr(command, "_send", lambda *_: done)
    job = Job("model", False, 256, None)
    plan = command.Plan(job, 100, (), (2,), context=20, tokens=4, seed=1, timeout_s=1.0, settle_s=0.0)
    found = command._gap_ms(Served("", 0, 0.0), "stub", 2, plan)
    assert found == (None if gap_ms is None else pytest.approx(gap_ms))


def test_an_engine_whose_requests_never_decoded_together_has_an_empty_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_gap_ms", lambda *_: None)
    found, tables = run(tmp_path, "--engine", "vllm")
    assert found.decodes == [{"decodes": 2, "vllm": None}]
    assert "| 2 |  |" in tables
    assert tables.strip() == markdown(found)


def test_every_engine_gets_the_same_requests_and_all_their_tokens_count(tmp_path: Path) -> None:
    peers = [f"{label}=vllm {more}" for label, more in (("counted", ""), ("uncounted", "--uncounted"))]
    found, _ = run(tmp_path, "--workload", "20/30:1", *(word for peer in peers for word in ("--engine", peer)))
    counted, uncounted = found.rows
    tokens = [row.output_throughput / row.request_throughput for row in (counted, uncounted)]
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-6), "events of two tokens, and of one that nobody counted"
    assert found.about.engines["uncounted"].endswith("--uncounted")
    assert counted.median_itl_ms < uncounted.median_itl_ms, "of two tokens in one event the second comes at once"


def test_a_server_that_does_not_start_costs_the_others_nothing(tmp_path: Path) -> None:
    engines_asked = ("--engine", "broken=vllm --ends", "--engine", "vllm")
    found, tables = run(tmp_path, "--workload", "20/8:1", *engines_asked)
    assert [row.engine for row in found.rows] == ["vllm"]
    assert "this server has no device" in found.absent["broken"]
    assert "- broken: " in tables


def test_refused_requests_are_failures_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, tables = run(tmp_path, "--workload", "20/8:1", "--engine", "strict=vllm --refuses")
    assert found.rows[0].failed == 5
    assert "(5 failed)" in tables
    assert "400 Bad Request" in capsys.readouterr().out


def test_an_engine_may_have_a_name_and_arguments_of_its_own() -> None:
    assert Contender.parse("vllm") == Contender("vllm", "vllm")
    tuned = Contender.parse("vLLM 512=vllm --max-num-batched-tokens 512")
    assert tuned == Contender("vLLM 512", "vllm", ("--max-num-batched-tokens", "512"))
    with pytest.raises(ValueError, match="engine 'mlc' is not known: use one of graphgen, vllm, sglang"):
        Contender.parse("mlc")


def test_a_shape_without_a_tokenizer_gets_one_of_its_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    shape = ROOT / "benchmarks" / "shapes" / "smollm2-135m"
    with command.complete_folder(shape, random_weights=True) as folder:
        assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == 49152
        assert msgspec.json.decode((folder / "config.json").read_bytes())["vocab_size"] == 49152
    with command.complete_folder(model_folder(), random_weights=False) as folder:
        assert folder == model_folder()
