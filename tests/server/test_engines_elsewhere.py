"""What the supervisor knows of engines that are servers elsewhere, and what an operator may do with them."""

from typing import Any

import pytest

from graphgen import ConfigError, EngineConfig
from graphgen.ipc.server_messages import (
    AddEngine,
    DrainEngine,
    EngineAway,
    EngineDrained,
    EngineServes,
    RemoveEngine,
    SupervisorToFrontend,
)
from graphgen.launch.replicas import of_frontend
from graphgen.server.engines_elsewhere import EnginesElsewhere
from graphgen.server.operator import Told, Wish
from graphgen.server.options import ServeOptions

A, B, C = "tcp://a:1", "tcp://b:1", "tcp://c:1"


class Rig:
    def __init__(self) -> None:
        self.told: list[SupervisorToFrontend] = []
        self.said: list[str] = []
        self.engines = EnginesElsewhere((A, B), self.told.append, self.said.append)

    def ask(self, action: str, engine: int = 0, address: str = "") -> Told:
        return self.engines.fulfil(Wish(action, engine, 5.0, address))  # type: ignore[arg-type]

    @property
    def states(self) -> tuple[str, ...]:
        return self.ask("show").engines


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_an_engine_is_added_serves_drains_and_is_removed(rig: Rig) -> None:
    told = rig.ask("add", address=C)
    assert (told.engine, told.error, told.engines[2], told.addresses[2]) == (2, "", "starting", C)
    assert rig.told.pop() == AddEngine(2, C)
    assert rig.said == [f"engine 2 ({C}) is being connected to"], "it is not yet"
    rig.engines.take(EngineServes(2))
    assert rig.states == ("serving", "serving", "serving")
    told = rig.ask("remove", address=A)
    assert (told.engine, told.engines[0]) == (0, "draining")
    assert rig.told.pop() == DrainEngine(0, 5.0)
    rig.engines.take(EngineDrained(0))
    assert rig.told.pop() == RemoveEngine(0)
    assert rig.states == ("removed", "serving", "serving")
    assert rig.engines.addresses() == ((1, B), (2, C))
    assert rig.ask("add", address=A).engine == 0, "the number is used again"


def test_a_drained_engine_is_left_out_of_a_new_frontend_until_it_is_resumed(rig: Rig) -> None:
    rig.ask("drain", 1)
    rig.engines.take(EngineDrained(1))
    assert rig.engines.addresses() == ((0, A),)
    rig.ask("resume", 1)
    assert rig.told.pop() == AddEngine(1, B)
    assert rig.engines.addresses() == ((0, A), (1, B))


def test_one_that_is_away_is_shown_with_its_reason_and_removed_at_once(rig: Rig) -> None:
    rig.engines.take(EngineAway(1, "its connection broke"))
    told = rig.ask("show")
    assert (told.engines, told.reasons) == (("serving", "away"), ("", "its connection broke"))
    rig.ask("remove", 1)
    assert rig.told == [RemoveEngine(1)]
    rig.engines.take(EngineServes(1))  # what it had said before
    assert rig.states == ("serving", "removed")


def test_one_that_serves_something_else_is_not_added_and_one_that_did_serve_is_kept(rig: Rig) -> None:
    number = rig.ask("add", address=C).engine
    rig.engines.take(EngineAway(number, "it serves another model", is_refused=True))
    told = rig.ask("show")
    assert (told.engines[number], told.reasons[number]) == ("removed", "it serves another model")
    assert rig.told[-1] == RemoveEngine(number)
    rig.engines.take(EngineAway(1, "it serves another model", is_refused=True))
    assert rig.states[1] == "away", "it may come back as it was"


def test_a_frontend_that_is_started_again_is_told_what_drains_and_tells_what_serves(rig: Rig) -> None:
    rig.ask("remove", 1)
    assert rig.told.pop() == DrainEngine(1, 5.0)
    rig.engines.begin_again()
    assert rig.told == [DrainEngine(1, 5.0)]
    rig.said.clear()
    for number in (0, 1):
        rig.engines.take(EngineServes(number))
    assert rig.states == ("serving", "draining")
    assert rig.said == []


@pytest.mark.parametrize(
    ("action", "engine", "address", "reason"),
    [
        ("add", 0, A, "tcp://a:1 is one of the engines already"),
        ("add", 0, "a:1", "its scheme is missing"),
        ("add", 0, "tcp://*:1", "tcp://*:1 is an address to bind"),
        ("add", 0, "tcp://user@a:1", "'user@a' is no host"),
        ("remove", 0, C, "there is no engine tcp://c:1: they are 0 tcp://a:1, 1 tcp://b:1"),
        ("remove", 7, "", "there is no engine 7"),
        ("drain", -1, "", "there is no engine -1"),
        ("resume", 0, "", "engine 0 (tcp://a:1) is serving: it needs no resume"),
    ],
)
def test_what_cannot_be_is_told(rig: Rig, action: str, engine: int, address: str, reason: str) -> None:
    told = rig.ask(action, engine, address)
    assert reason in told.error
    assert rig.told == []
    assert told.engines == ("serving", "serving")


def test_the_last_one_that_serves_stays(rig: Rig) -> None:
    rig.engines.take(EngineAway(1, "gone"))
    for action in ("drain", "remove"):
        assert "is the only one that serves" in rig.ask(action, 0).error


def test_a_drain_that_fails_leaves_it_serving(rig: Rig) -> None:
    rig.ask("remove", 1)
    rig.engines.take(EngineDrained(1, "the other one ended"))
    told = rig.ask("show")
    assert (told.engines[1], told.reasons[1]) == ("serving", "the other one ended")


def options(**values: Any) -> ServeOptions:  # any of its fields
    return ServeOptions(data="tcp://127.0.0.1:*", control="tcp://127.0.0.1:*", **values)


def test_options_that_cannot_be_are_refused_by_name() -> None:
    assert options(engines=f"{A}, {B}").engine_addresses == (A, B)
    for values, told in (
        ({"engines": f"{A},{B},{A}"}, "names tcp://a:1 twice"),
        ({"engines": " , "}, "name at least one"),
        ({"engines": "a:1"}, "its scheme is missing"),
        ({"engines": f"{A},tcp://*:1"}, r"tcp://\*:1 is an address to bind"),
        ({"engines": f"{A},tcp://a d:1"}, "'a d' is no host"),
        ({"engine_keys": "keys"}, "engine_keys is 'keys' without engines"),
        ({"engines": A, "frontends": 2}, "frontends is 2, and the engines are elsewhere"),
    ):
        with pytest.raises(ConfigError, match=told):
            options(**values)
    with pytest.raises(ConfigError, match="replicas is 2 and num_pages is 100, and the engines are elsewhere"):
        of_frontend(EngineConfig(replicas=2, num_pages=100))
    assert of_frontend(EngineConfig(model="m", max_model_len=64, device="cuda")).device == "cpu"
