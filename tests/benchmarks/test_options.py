"""The shared options say what EngineConfig says, and nothing when they are not given."""

import pytest

from benchmarks.options import add_engine_options, engine_settings, make_parser
from benchmarks.serving import serving_parser
from graphgen import EngineConfig


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


def test_a_budget_is_fixed_or_swept() -> None:
    with pytest.raises(SystemExit):
        serving_parser().parse_args(["--token-budget", "32", "--sweep-budget", "32", "64"])


def test_an_option_that_a_script_has_under_a_fields_name_is_its_own() -> None:
    """`serving --itl-target-ms 0 20` is what requests ask for, in turn."""
    options = serving_parser().parse_args(["--itl-target-ms", "0", "20"])
    assert "itl_target_ms" not in engine_settings(options)
