"""Sampling values that a request leaves out are the model's, for a program, a Python client and any client alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen import EngineConfig, SamplingParams, demo
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.ggp.framing import client_framing, server_framing
from graphgen.ipc.ggp.messages import Accepted, Generate, Hello, Sampling, SamplingDefaults, Welcome
from graphgen.ipc.worker_messages import SamplerParams
from graphgen.remote.requests import make_generate
from graphgen.requests.core import launch_config
from graphgen.server.frontend.prepare import sampling_params
from tests.frontend.harness import Frontend, demo_tokenizer

STATED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
OWN = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo model with sampling values of its own."""
    for file in demo.model_folder().iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({**STATED, "eos_token_id": [0, 5]}))
    return tmp_path


def drawn(sampling: SamplingParams, defaults: SamplingDefaults = OWN) -> SamplerParams:
    return sampling.resolve_sampler(defaults, seed=9)


def test_an_engine_takes_the_models_values_unless_told_otherwise(model: Path) -> None:
    launch = launch_config(EngineConfig(model=str(model), device="cpu"))
    assert launch.sampling_defaults == OWN
    without = launch_config(EngineConfig(model=str(model), device="cpu", generation_config="none"))
    assert without.sampling_defaults == SamplingDefaults()
    assert without.eos_token_ids == launch.eos_token_ids == (0, 5), "how the model ends is no matter of taste"


def test_what_a_request_leaves_out_is_the_models_and_what_it_says_holds() -> None:
    assert drawn(SamplingParams()) == SamplerParams(0.6, 20, 0.95, 0.0, 1.05, seed=9)
    stated = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.5, repetition_penalty=1.0)
    assert drawn(stated) == SamplerParams(1.0, 0, 1.0, 0.5, 1.0, seed=9)
    assert drawn(SamplingParams(temperature=0)) == SamplerParams(0.0, 20, 0.95, 0.0, 1.05, seed=9)
    assert drawn(SamplingParams(), SamplingDefaults()) == SamplerParams(temperature=1.0, seed=9)


def test_minus_one_turns_the_models_top_k_off() -> None:
    assert drawn(SamplingParams(top_k=-1)).top_k == drawn(SamplingParams(top_k=0)).top_k == 0


some = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.none() | st.sampled_from([0.0, 0.5, 1.0, 1]),
        "top_k": st.none() | st.sampled_from([-1, 0, 1, 50]),
        "top_p": st.none() | st.sampled_from([0.5, 1.0, 1]),
        "min_p": st.none() | st.sampled_from([0.0, 0.5]),
        "repetition_penalty": st.none() | st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.4]),
        "stop": st.sampled_from(["x", (), ["x", "y"]]),
    },
)


@given(some)
def test_a_client_draws_as_an_engine_does(values: dict[str, Any]) -> None:
    """Over the wire and back, values that equal the protocol's defaults among them."""
    sampling = SamplingParams(**values)
    frames = client_framing().encode(make_generate(1, "text", sampling, streams=True))
    message = server_framing().decode(frames)
    assert isinstance(message, Generate)
    served = sampling_params(message.sampling, key="")
    assert drawn(served) == drawn(sampling)
    assert served.stop_strings == sampling.stop_strings


@given(some)
def test_without_the_flag_the_protocols_defaults_hold_whatever_the_model(values: dict[str, Any]) -> None:
    stated = {name: value for name, value in values.items() if value not in (None, -1) and name != "stop"}
    frames = client_framing().encode(Generate(id=1, text="x", sampling=Sampling(**stated)))
    message = server_framing().decode(frames)
    assert isinstance(message, Generate)
    assert drawn(sampling_params(message.sampling, key="")) == drawn(SamplingParams(**stated), SamplingDefaults())


def test_a_server_says_the_models_values_and_draws_with_them_where_it_is_asked_to(model: Path) -> None:
    frontend = Frontend(demo_tokenizer(), engine=EngineConfig(model=str(model), device="cpu"))
    try:
        client = frontend.connect()
        client.send(Hello())
        welcome = client.expect(Welcome)
        assert welcome.sampling_defaults == OWN
        assert "model_defaults" in welcome.features
        samplers = []
        for number, sampling in enumerate(
            [Sampling(seed=1), Sampling(seed=1, model_defaults=True), Sampling(seed=1, top_p=1.0, model_defaults=True)]
        ):
            client.send(Generate(id=number, prompt_ids=[5], sampling=sampling))
            client.expect(Accepted)
            samplers.append(frontend.scheduler.expect(Submit).sampler)
    finally:
        frontend.close()
    assert samplers == [
        SamplerParams(temperature=1.0, seed=1),
        SamplerParams(0.6, 20, 0.95, 0.0, 1.05, seed=1),
        SamplerParams(0.6, 20, 1.0, 0.0, 1.05, seed=1),
    ]
