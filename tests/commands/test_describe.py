"""`graphgen info` says which sampling values hold for requests that state none, and where they come from."""

import msgspec

from graphgen import EngineConfig
from graphgen.commands.describe import Decision, decisions
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.requests.core import launch_config
from tests.fakes import READY


def sampling_of(defaults: SamplingDefaults, **settings: str) -> Decision:
    config = EngineConfig(device="cpu", **settings)  # type: ignore[arg-type]  # settings of a test
    launch = msgspec.structs.replace(launch_config(config), sampling_defaults=defaults)
    (found,) = [one for one in decisions(config, launch, READY) if one.what == "sampling defaults"]
    return found


def test_the_models_own_values_are_named_with_their_file() -> None:
    found = sampling_of(SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.05))
    assert found.value == "temperature 0.6, top_k 20, repetition_penalty 1.05"
    assert "generation_config.json" in found.why


def test_a_greedy_model_is_told() -> None:
    assert sampling_of(SamplingDefaults(temperature=0.0)).value == "temperature 0"


def test_a_model_without_values_of_its_own_draws_at_temperature_1() -> None:
    assert sampling_of(SamplingDefaults()).value == "temperature 1, nothing else"
    assert sampling_of(SamplingDefaults(), generation_config="none").why == "you asked for it"


def test_several_engines_are_told_and_one_is_not() -> None:
    for count in (1, 2):
        config = EngineConfig(device="cpu", replicas=count)
        found = [one for one in decisions(config, launch_config(config), READY) if one.what == "replicas"]
        assert [one.value for one in found] == ["2"][: count - 1]
