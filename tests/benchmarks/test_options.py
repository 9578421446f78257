"""The shared options say what EngineConfig says, and nothing when they are not given."""

from pathlib import Path

import pytest

from benchmarks import highest_rate, objectives, simulate
from benchmarks.options import above_zero, add_engine_options, count, engine_settings, make_parser, run_script
from benchmarks.serving import serving_parser
from graphgen import ConfigError, EngineConfig


def config_of(*arguments: str) -> EngineConfig:
    parser = make_parser("A test.")
    add_engine_options(parser)
    return EngineConfig(**engine_settings(parser.parse_args(arguments), step_log="steps.jsonl"))


def test_what_is_not_given_is_the_engines_default_but_that_all_buckets_are_captured_first() -> None:
    assert config_of() == EngineConfig(step_log="steps.jsonl", captured_at_start="all")
    assert config_of("--captured-at-start", "auto") == EngineConfig(step_log="steps.jsonl")


def test_a_script_that_measures_the_start_has_the_engines_default_there_too() -> None:
    parser = make_parser("A test.")
    add_engine_options(parser)
    assert EngineConfig(**engine_settings(parser.parse_args([]), captures_all=False)) == EngineConfig()


def test_every_field_of_the_engine_is_an_option() -> None:
    parser = make_parser("A test.")
    add_engine_options(parser)
    names = {action.dest for action in parser._actions} - {"help"}
    assert names == {*EngineConfig.__struct_fields__} - {"seed", "replicas"} | {"weights_seed"}


def test_every_option_reaches_its_field() -> None:
    given = ("--model", "m", "--load-format", "dummy", "--device", "cpu", "--no-compile", "--cpu-threads", "3")
    sizes = ("--max-model-len", "64", "--max-num-seqs", "5", "--num-pages", "7", "--token-budget", "32")
    assert config_of(*given, *sizes) == EngineConfig(
        model="m",
        load_format="dummy",
        device="cpu",
        compile=False,
        cpu_threads=3,
        max_model_len=64,
        max_num_seqs=5,
        num_pages=7,
        token_budget=32,
        captured_at_start="all",
        step_log="steps.jsonl",
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pace", "nan"], "argument --pace: nan: use a number that is not negative"),
        (["--pace", "1", "-1"], "argument --pace: -1.0: use a number"),
        (["--pace", "inf"], "argument --pace: inf: use a number"),
        (["--seed", "-1"], "argument --seed: -1: use a number"),
        (["--runs", "0"], "argument --runs: 0: the least is 1"),
        (["--seconds", "0"], "argument --seconds: 0: use a number above 0"),
        (["--seconds", "nan"], "argument --seconds: nan: use a number above 0"),
        (["--json", "/nowhere/at/all.json"], "argument --json: there is no folder /nowhere/at: make it first"),
    ],
)
def test_what_no_script_can_use_is_refused_before_it_runs(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = make_parser("A test.")
    parser.add_argument("--pace", type=float, nargs="+", default=[0.0])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--runs", type=count)
    parser.add_argument("--seconds", type=above_zero)
    parser.add_argument("--json")
    assert parser.parse_args(["--pace", "0", "2.5", "--seed", "0", "--json", "here.json"]).pace == [0.0, 2.5]
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(given)
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_a_user_can_mend_is_one_line() -> None:
    def start() -> None:
        raise ConfigError("model '/nope' is none")

    with pytest.raises(SystemExit, match=r"^error: model '/nope' is none$"):
        run_script(start)
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)


def test_files_of_other_scripts_are_told_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"about": {}, "rows": [{"workload": "2600/60:16"}]}')
    for main, option in ((objectives.main, "--measured"), (simulate.main, "--against")):
        with pytest.raises(SystemExit):
            main([option, str(other)])
        assert f"{other} has rows that no `benchmarks.serving" in " ".join(capsys.readouterr().err.split())


def test_a_search_for_a_rate_takes_means_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("2600/60:4", "2600", "0/60", "a/b"):
        with pytest.raises(SystemExit):
            highest_rate.main(["--workload", text])
        assert f"--workload {text}: write MEAN_PROMPT/MEAN_OUTPUT" in " ".join(capsys.readouterr().err.split())


def test_prompts_that_a_simulation_cuts_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = simulate.main(["--load", "3000/8:1x2", "--policy", "fcfs", "--max-model-len", "1024"])
    assert row["requests_cut"] == 2
    assert "3000/8:1: 2 prompts are cut to max_model_len 1024" in capsys.readouterr().out


def test_a_budget_is_fixed_or_swept() -> None:
    with pytest.raises(SystemExit):
        serving_parser().parse_args(["--token-budget", "32", "--sweep-budget", "32", "64"])


def test_an_option_that_a_script_has_under_a_fields_name_is_its_own() -> None:
    """`serving --itl-target-ms 0 20` is what requests ask for, in turn."""
    options = serving_parser().parse_args(["--itl-target-ms", "0", "20"])
    assert "itl_target_ms" not in engine_settings(options)
