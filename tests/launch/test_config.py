"""EngineConfig refuses what can work nowhere, and is made of settings or of a struct."""

from typing import Any

import pytest

from graphgen import ConfigError, EngineConfig
from graphgen.launch.config import make_config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("device", "tpu"),
        ("device", "cuda:"),
        ("device", "cuda:x"),
        ("dtype", "int8"),
        ("max_model_len", 0),
        ("max_model_len", True),
        ("max_num_seqs", 0),
        ("max_waiting", 0),
        ("max_waiting_tokens", -1),
        ("max_long_prompts", 0),
        ("itl_target_ms", 0.0),
        ("itl_target_ms", float("nan")),
        ("ttft_target_ms", -1.0),
        ("tpot_target_ms", 0.0),
        ("itl_target_ms", 2e9),  # which no request may ask for either
        ("prefix_cache", None),
        ("max_num_seqs", None),
        ("token_budget", 7),
        ("token_budget", 2.0),
        ("page_size", 0),
        ("page_size", 24),
        ("num_pages", 0),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.1),
        ("memory_fraction", float("nan")),
        ("load_format", "pickle"),
        ("quantization", "int5"),
        ("attention", "sdpa"),
        ("seed", -1),
        ("compile", 1),
        ("cpu_threads", 0),
        ("start_timeout_s", 0.0),
        ("start_timeout_s", float("inf")),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is"):
        EngineConfig(**{name: value})


def test_settings_make_the_same_config_as_the_struct() -> None:
    assert make_config("folder", {"seed": 3}) == EngineConfig(model="folder", seed=3)
    assert make_config(None, {"model": "folder"}) == EngineConfig(model="folder")
    config = EngineConfig(seed=5)
    assert make_config(config, {}) is config
    with pytest.raises(ConfigError, match="seed were given"):
        make_config(config, {"seed": 3})
    with pytest.raises(ConfigError, match="given twice"):
        make_config("one", {"model": "two"})
