"""What `graphgen` exports, and that importing it costs nothing."""

import inspect
import json
import re
import subprocess
import sys
import typing

import msgspec
import pytest

import graphgen
from graphgen import EngineConfig, GraphgenError, demo
from graphgen.launch.config import EngineSettings
from tests import ROOT

PUBLIC = {
    "AsyncClient",
    "AsyncEngine",
    "Chat",
    "CheckpointError",
    "Choice",
    "Client",
    "ConfigError",
    "ConnectionLostError",
    "DeadlineError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "EngineStats",
    "Grammar",
    "GraphgenError",
    "InvalidRequestError",
    "Logprob",
    "Logprobs",
    "JsonSchema",
    "NumericalError",
    "OverloadedError",
    "PoisonedRequestError",
    "PromptTooLongError",
    "Regex",
    "RequestOutput",
    "SamplingParams",
    "ServerError",
    "StreamPiece",
    "Timing",
    "TokenLogprob",
    "UnsupportedModelError",
}


def modules_after(statement: str) -> set[str]:
    """The modules a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_public_names_are_these_and_all_resolve() -> None:
    assert set(graphgen.__all__) == PUBLIC
    assert {name for name in PUBLIC if hasattr(graphgen, name)} == PUBLIC
    assert set(dir(graphgen)) >= PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(graphgen, "LLM")


HEAVY = {"torch", "transformers", "tokenizers", "jinja2", "numpy", "rich", "typer"}
VALUES = {"graphgen.ipc", "graphgen.base"}
"""Messages, errors and small helpers, which all parts use."""
CALLS = VALUES | {"graphgen.calls"}
CLIENT = CALLS | {"graphgen.remote"}
CONFIG = VALUES | {"graphgen.launch", "graphgen.models", "graphgen.capture"}
ENGINE = CALLS | CONFIG | {"graphgen.api", "graphgen.demo", "graphgen.requests", "graphgen.router"}
LOADS = {
    "AsyncClient": CLIENT,
    "AsyncEngine": ENGINE,
    "Chat": CALLS,
    "Client": CLIENT,
    "Engine": ENGINE,
    "EngineConfig": CONFIG,
    "Logprob": CALLS,
    "Logprobs": CALLS,
    "RequestOutput": CALLS,
    "SamplingParams": CALLS,
    "StreamPiece": CALLS,
    "Timing": CALLS,
    "TokenLogprob": CALLS,
    "Choice": CALLS,
    "Grammar": CALLS,
    "JsonSchema": CALLS,
    "Regex": CALLS,
}
"""Of which folders a public name may load modules; the others, all errors among them, of VALUES alone."""
ENGINES_OWN = {"graphgen.api", "graphgen.requests"}
"""What is loaded with an engine and with nothing else."""


def test_importing_graphgen_loads_nothing_heavy() -> None:
    loaded = modules_after("import graphgen")
    assert {name for name in loaded if name.startswith("graphgen")} == {
        "graphgen",
        "graphgen.base",
        "graphgen.base.version",
    }
    assert not loaded & (HEAVY | {"zmq", "msgspec"})


@pytest.mark.parametrize("names", [{name} for name in LOADS] + [PUBLIC - set(LOADS)], ids=lambda names: min(names))
def test_a_public_name_loads_only_what_it_needs(names: set[str]) -> None:
    loaded = modules_after(f"from graphgen import {', '.join(sorted(names))}")
    folders = set().union(*(LOADS.get(name, VALUES) for name in names))
    ours = {name for name in loaded if name.startswith("graphgen.")}
    assert {".".join(name.split(".")[:2]) for name in ours} <= folders
    is_engine = names <= {"Engine", "AsyncEngine"}
    assert not loaded & (HEAVY - {"tokenizers", "jinja2", "numpy"} if is_engine else HEAVY | ENGINES_OWN)


def test_keyword_arguments_and_config_have_the_same_fields_and_types() -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(EngineConfig)}
    assert typing.get_type_hints(EngineSettings) == fields


def test_every_error_is_one_of_ours() -> None:
    errors = [value for name in PUBLIC if inspect.isclass(value := getattr(graphgen, name)) and "Error" in name]
    assert len(errors) == 14
    assert all(issubclass(error, GraphgenError) for error in errors)


def test_the_readme_states_the_embedded_models_own_figures() -> None:
    training = json.loads((demo.model_folder() / "training.json").read_text())
    readme = (ROOT / "README.md").read_text()
    token_loss, character_loss = training["validation_nats_per_token"], training["validation_nats_per_character"]
    assert f"{token_loss:.2f} nats per token, {character_loss:.2f} nats per character" in readme
    assert training["command"] in readme


def test_the_readmes_program_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    for program in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 20
