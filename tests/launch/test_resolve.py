"""resolve makes every open choice once, and refuses what does not fit the model."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from graphgen import ConfigError, EngineConfig, demo
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.resolve import resolve
from graphgen.models.families import load_spec
from graphgen.models.spec import ModelSpec, RopeSpec

FOLDER = Path("/models/demo")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_spec(demo.model_folder())


def test_defaults_on_the_cpu(spec: ModelSpec) -> None:
    launch = resolve(EngineConfig(device="cpu"), spec, FOLDER)
    assert (launch.dtype, launch.token_budget, launch.page_size, launch.compile) == ("float32", 256, 16, False)
    assert launch.max_model_len == spec.max_position_embeddings
    assert launch.eos_token_ids == spec.eos_token_ids


def test_defaults_on_cuda(spec: ModelSpec) -> None:
    launch = resolve(EngineConfig(device="cuda:1"), spec, FOLDER)
    assert (launch.device, launch.dtype, launch.token_budget) == ("cuda:1", spec.dtype, 1024)
    assert (launch.page_size, launch.compile, launch.num_slots) == (64, True, 256)
    assert resolve(EngineConfig(device="cuda", objective="throughput"), spec, FOLDER).token_budget == 2048
    stored_wide = msgspec.structs.replace(spec, dtype="float32")
    assert resolve(EngineConfig(device="cuda"), stored_wide, FOLDER).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("budget", "asked", "slots"), [(8, 256, 6), (16, 256, 12), (16, 12, 12), (16, 5, 5), (17, 99, 13)]
)
def test_prompts_always_keep_a_quarter_of_the_budget(spec: ModelSpec, budget: int, asked: int, slots: int) -> None:
    config = EngineConfig(device="cpu", token_budget=budget, max_num_seqs=asked)
    assert resolve(config, spec, FOLDER).num_slots == slots


def test_a_context_beyond_the_models_is_refused_unless_its_rotation_is_scaled(spec: ModelSpec) -> None:
    config = EngineConfig(device="cpu", max_model_len=1500)
    with pytest.raises(ConfigError, match="max_model_len is 1500, the model's limit is 1024"):
        resolve(config, spec, FOLDER)
    scaled = msgspec.structs.replace(spec, ropes=(RopeSpec(kind="dynamic", factor=2.0, original_max_len=1024),))
    assert resolve(config, scaled, FOLDER).max_model_len == 1500
    assert resolve(EngineConfig(device="cpu"), scaled, FOLDER).max_model_len == 1024


@pytest.mark.parametrize(("num_pages", "fits"), [(1, False), (15, False), (16, True), (17, True)])
def test_a_cache_holds_one_full_step_at_least(spec: ModelSpec, num_pages: int, fits: bool) -> None:
    config = EngineConfig(device="cpu", num_pages=num_pages)  # pages of 16 positions, steps of 256
    if fits:
        assert resolve(config, spec, FOLDER).num_pages == num_pages
        return
    with pytest.raises(ConfigError, match=f"num_pages is {num_pages}, .*: use 16 pages or more"):
        resolve(config, spec, FOLDER)


def test_a_short_context_needs_no_more_pages_than_its_own(spec: ModelSpec) -> None:
    assert resolve(EngineConfig(device="cpu", num_pages=2, max_model_len=32), spec, FOLDER).num_pages == 2


def test_prompts_are_not_shared_where_keys_depend_on_the_prompts_length(spec: ModelSpec) -> None:
    dynamic = msgspec.structs.replace(spec, ropes=(RopeSpec(kind="dynamic", factor=2.0, original_max_len=1024),))
    assert resolve(EngineConfig(device="cpu"), spec, FOLDER).prefix_cache
    assert not resolve(EngineConfig(device="cpu"), dynamic, FOLDER).prefix_cache
    assert not resolve(EngineConfig(device="cpu", prefix_cache=False), spec, FOLDER).prefix_cache


def test_the_launch_file_is_what_was_resolved(spec: ModelSpec, tmp_path: Path) -> None:
    launch = resolve(EngineConfig(device="cpu", step_log="steps.jsonl"), spec, FOLDER)
    launch.write(tmp_path)
    assert LaunchConfig.read(tmp_path) == launch
    assert launch.step_log == str(Path.cwd() / "steps.jsonl")


@pytest.mark.parametrize(
    ("settings", "stands_by"),
    [
        ({"device": "cpu"}, False),
        ({"device": "cpu", "standby": True}, True),
        ({"device": "cpu", "compile": True}, True),
        ({"device": "cuda"}, True),
        ({"device": "cuda", "standby": False}, False),
    ],
)
def test_a_process_stands_by_where_its_imports_are_what_a_pause_would_wait_for(
    spec: ModelSpec, settings: dict[str, Any], stands_by: bool
) -> None:
    assert resolve(EngineConfig(**settings), spec, FOLDER).standby == stands_by


@pytest.mark.parametrize("limit", ["window", "segment"])
def test_a_window_that_holds_every_request_is_none(spec: ModelSpec, limit: str) -> None:
    """Phi-4-mini states one of twice its context: it needs no kernels for windows."""
    first, *others = spec.layers
    windowed = msgspec.structs.replace(first, mixer=msgspec.structs.replace(first.mixer, **{limit: 512}))
    limited = msgspec.structs.replace(spec, layers=(windowed, *others))
    assert resolve(EngineConfig(device="cpu", max_model_len=512), limited, FOLDER).spec == spec
    assert resolve(EngineConfig(device="cpu", max_model_len=513), limited, FOLDER).spec == limited
