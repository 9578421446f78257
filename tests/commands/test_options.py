"""Every field of EngineConfig is an option of every command that starts an engine, and each says what it is."""

import itertools
from typing import Any, Literal

import msgspec
import pytest
import typer
from msgspec import Struct
from typer.testing import CliRunner

from graphgen import EngineConfig
from graphgen.commands import cli, options
from graphgen.commands.fields import Option, options_of
from graphgen.commands.options import ENGINE_OPTIONS, PANELS, SERVE_OPTIONS, takes_engine_options
from graphgen.server.options import ServeOptions

FIELDS = {field.name: field for field in msgspec.structs.fields(EngineConfig)}
VALUES: dict[str, Any] = {
    "device": "cuda:3",
    "memory_fraction": 0.25,
    "page_size": 32,
    "token_budget": 4096,
}
"""Of fields that do not take just any value of their type."""


def value_of(option: Option) -> Any:
    """A value that is not the field's default."""
    if option.name in VALUES:
        return VALUES[option.name]
    if option.choices:
        return option.choices[-1]
    return {str: "some/name", int: 77, float: 5.5, bool: not option.default}[option.value_type]


def words_of(option: Option, value: Any) -> list[str]:
    """What is typed for it."""
    if option.value_type is bool:
        return [option.flag if value else f"--no-{option.flag[2:]}"]
    return [option.flag, str(value)]


class Started(Exception):
    """In place of an engine."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a command would have started: the engine's config, and a server's options behind it."""
    configs: list[Any] = []

    def start(*what: object) -> None:
        configs.extend(what)
        raise Started

    monkeypatch.setattr(cli, "Engine", start)
    monkeypatch.setattr(cli, "serve_until_signal", start)
    monkeypatch.setattr(cli, "check_devices", lambda config: None)  # no machine has all that is asked for here
    return configs


@pytest.mark.parametrize("command", [("serve",), ("generate", "a prompt"), ("info",), ("tune",), ("demo",)])
def test_every_field_is_reachable_from_every_command(command: tuple[str, ...], started: list[Any]) -> None:
    """`tune` alone sets two itself: where step times come from is what it is for, and one replica measures for all."""
    expected = {option.name: value_of(option) for option in ENGINE_OPTIONS}
    words = [word for option in ENGINE_OPTIONS for word in words_of(option, expected[option.name])]
    if command == ("tune",):
        expected |= {"step_times": "measure", "replicas": 1}
        place = words.index("--step-times")
        del words[place : place + 2]
    done = CliRunner().invoke(cli.app, [*command, *words])
    assert isinstance(done.exception, Started), done.output
    assert {name: getattr(started[0], name) for name in FIELDS} == expected


def test_what_is_not_given_is_the_engines_default(started: list[Any]) -> None:
    CliRunner().invoke(cli.app, ["serve"])
    assert started == [EngineConfig(), ServeOptions()]


def test_every_field_of_a_server_is_an_option_of_serve(started: list[Any]) -> None:
    expected = {option.name: value_of(option) for option in SERVE_OPTIONS} | {
        "keys": None,
        "data": "tcp://127.0.0.1:7000",
        "control": "tcp://127.0.0.1:8000",
        "http": "127.0.0.1:0",
        "http_workers": 7,
        "frontends": 3,
        "engines": None,  # not with several frontends: below
        "engine_keys": None,
    }
    words = [
        word
        for option in SERVE_OPTIONS
        if expected[option.name] is not None
        for word in words_of(option, expected[option.name])
    ]
    done = CliRunner().invoke(cli.app, ["serve", *words])
    assert isinstance(done.exception, Started), done.output
    assert msgspec.structs.asdict(started[1]) == expected


def test_engines_elsewhere_are_options_of_serve(started: list[Any]) -> None:
    words = ["serve", "--engines", "tcp://a:5755,tcp://b:5755", "--engine-keys", "folder"]
    assert isinstance(CliRunner().invoke(cli.app, words).exception, Started)
    assert (started[1].engines, started[1].engine_keys) == ("tcp://a:5755,tcp://b:5755", "folder")


def test_the_model_is_an_argument_or_an_option_and_not_both(started: list[Any]) -> None:
    for words in (["serve", "some/model"], ["serve", "--model", "some/model"], ["generate", "text", "some/model"]):
        CliRunner().invoke(cli.app, words)
    assert [one.model for one in started if isinstance(one, EngineConfig)] == ["some/model"] * 3
    twice = CliRunner().invoke(cli.app, ["serve", "one", "--model", "two"])
    assert "model is given twice, as 'one' and 'two'" in str(twice.exception)


class Wider(EngineConfig, frozen=True, kw_only=True):
    """As if EngineConfig had gained fields. The docstrings of the others are not in this class's source."""

    kv_format: Literal["auto", "fp8"] | None = None
    """How keys and values lie. None: as the model's dtype."""
    draft: bool = False
    """Guess ahead."""


def test_a_new_field_is_an_option_with_its_type_and_help(monkeypatch: pytest.MonkeyPatch) -> None:
    found = options_of(Wider)
    assert {option.name for option in found} == {*FIELDS, "kv_format", "draft"}
    monkeypatch.setattr(options, "ENGINE_OPTIONS", found)
    monkeypatch.setattr(options, "make_config", lambda model, settings: Wider(**settings))
    app, configs = typer.Typer(), []

    @app.command()
    @takes_engine_options()
    def start(config: Wider) -> None:
        configs.append(config)

    assert CliRunner().invoke(app, ["--kv-format", "fp8", "--draft"]).exit_code == 0
    assert configs == [Wider(kv_format="fp8", draft=True)]
    assert CliRunner().invoke(app, ["--kv-format", "fp4"]).exit_code == 2
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "auto or fp8. How keys and values lie." in shown
    assert "as the model's dtype" in shown


def test_every_field_says_what_it_is_and_what_none_stands_for() -> None:
    for option in (*ENGINE_OPTIONS, *SERVE_OPTIONS):
        assert len(option.help) > 15, option.name
        assert "None" not in option.help, f"{option.name}: write what None stands for as a sentence `None: ...`"
        assert (option.none_means is not None) == (option.default is None), option.name


def test_the_panels_of_the_help_name_fields_each_once() -> None:
    names = [name for panel in PANELS.values() for name in panel]
    assert len(names) == len(set(names))
    assert set(names) <= set(FIELDS)


class Documented(Struct):
    """A class with every form of what is read from it."""

    plain: int = 3
    """Costs 2.5 s. A second
    sentence."""
    open: float | None = None
    """First. None: 0.5 of it, or so. Last."""
    only: str | None = None
    """None: nothing at all."""


def test_none_has_a_sentence_of_its_own_in_a_docstring() -> None:
    plain, open_, only = options_of(Documented)
    assert (plain.help, plain.none_means) == ("Costs 2.5 s. A second sentence.", None)
    assert (open_.help, open_.none_means) == ("First. Last.", "0.5 of it, or so")
    assert (only.help, only.none_means) == ("", "nothing at all")
    assert [option.value_type for option in (plain, open_, only)] == [int, float, str]


def all_commands() -> list[str]:
    """What can be typed behind `graphgen`, nothing included."""
    named = [("", cli.app), *((f"{group.name} ", group.typer_instance) for group in cli.app.registered_groups)]
    return [""] + [
        f"{prefix}{command.name or str(command.callback.__name__).replace('_', '-')}"  # type: ignore[union-attr]
        for prefix, commands in named
        if commands is not None
        for command in commands.registered_commands
    ]


@pytest.mark.parametrize("command", all_commands())
def test_help_is_readable_at_80_columns(command: str) -> None:
    """No option is cut off, none is a column of single words: the text has almost half of the line. Paragraphs fill
    their lines."""
    done = CliRunner().invoke(cli.app, [*command.split(), "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in done.output
    for panel in done.output.split("╭")[1:]:
        starts = [len(line) - len(line[1:-1].lstrip()) - 1 for line in panel.splitlines() if line.startswith("│    ")]
        assert max(starts, default=0) <= 43, panel
    text = [line.strip() for line in done.output.split("╭")[0].splitlines()]
    for line, below in itertools.pairwise(text):
        assert not line or not below or len(f"{line} {below.split()[0]}") > 77, line
