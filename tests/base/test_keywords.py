"""What a caller writes that does not exist is told with the nearest that does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from graphgen import AsyncEngine, Client, ConfigError, Engine, EngineConfig, InvalidRequestError, SamplingParams
from graphgen.base.keywords import ELSEWHERE, type_problem, unknown_keyword
from graphgen.launch.config import EngineSettings

CALLS: list[tuple[Callable[..., Any], type[Exception]]] = [
    (EngineConfig, ConfigError),
    (Engine, ConfigError),
    (AsyncEngine, ConfigError),
    (SamplingParams, InvalidRequestError),
    (Client, ConfigError),
]


@pytest.mark.parametrize(("call", "error"), CALLS)
def test_an_unknown_keyword_is_an_error_of_ours(call: Callable[..., Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"has no argument 'zzz': it has \w+, \w+"):
        call(zzz=1)


@pytest.mark.parametrize(
    ("call", "wrong", "right"),
    [
        (Engine, "tokens_budget", "token_budget"),
        (Engine, "gpu_memory_utilization", "memory_fraction"),
        (EngineConfig, "max_num_batched_tokens", "token_budget"),
        (SamplingParams, "max_new_tokens", "max_tokens"),
        (SamplingParams, "temprature", "temperature"),
        (Client, "timeout_s", "connect_timeout_s"),
    ],
)
def test_the_nearest_known_one_is_named(call: Callable[..., Any], wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"has no argument '{wrong}': did you mean {right}?"):
        call(**{wrong: 1})


def test_names_of_other_engines_lead_to_names_that_exist() -> None:
    known = {*EngineConfig.__struct_fields__, *SamplingParams.__struct_fields__}
    assert set(ELSEWHERE.values()) <= known
    assert not set(ELSEWHERE) & known
    assert (
        unknown_keyword("X", "max_length", ("max_model_len",))
        == "X has no argument 'max_length': did you mean max_model_len?"
    )


def test_values_without_a_name_are_refused_with_an_example() -> None:
    with pytest.raises(InvalidRequestError, match=r"was given 0\.5 without one: write SamplingParams\(max_tokens="):
        SamplingParams(0.5)  # type: ignore[misc,arg-type]
    with pytest.raises(ConfigError, match=r"was given 'some/model' without one: write EngineConfig\(model="):
        EngineConfig("some/model")  # type: ignore[misc]


def test_a_field_with_choices_lists_them_whatever_was_given() -> None:
    for name, kind in EngineSettings.__annotations__.items():
        choices = msgspec.inspect.type_info(kind)
        if isinstance(choices, msgspec.inspect.LiteralType):
            wrongs: tuple[Any, ...] = ("fp16", 3, None, object())
            for wrong in wrongs:
                with pytest.raises(ConfigError) as caught:
                    EngineConfig(**{name: wrong})
                assert all(f'"{choice}"' in str(caught.value) for choice in choices.values), name


def test_the_end_of_a_sentence_about_a_type() -> None:
    assert type_problem(3, int) is None
    assert type_problem(None, Literal["a", "b"] | None) is None
    assert type_problem("c", Literal["a", "b"] | None) == 'use "a" or "b"'
    assert type_problem(True, int) == "expected `int`, got `bool`"
    assert type_problem(1, bool | None) == "expected `bool | None`, got `int`"
    assert str(type_problem(Path("x"), str | None)).endswith("give str(...) of the path")


def test_structs_that_check_their_keywords_are_structs_all_the_same() -> None:
    config = EngineConfig(seed=3)
    assert msgspec.structs.replace(config, seed=4) == EngineConfig(seed=4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"connect_timeout_s": "3"}, "connect_timeout_s is '3': expected `float`"),
        ({"connect_timeout_s": 0}, "connect_timeout_s is 0: use seconds"),
        ({"server_key": b"x" * 40}, "server_key is b'x"),
    ],
)
def test_a_client_says_which_of_its_values_is_wrong(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Client(**settings)
