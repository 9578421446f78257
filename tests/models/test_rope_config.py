"""Rotary keys mean what they mean to transformers, wherever they stand; a key that nothing reads is refused."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.families import load_spec
from graphgen.models.rope import inverse_frequencies
from tests.models import tiny

YARN = {"rope_type": "yarn", "factor": 4.0}
NEWER: dict[str, Any] = {
    "absent": {},
    "empty": {"rope_parameters": {}},
    "default": {"rope_parameters": {"rope_type": "default"}},
    "default_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 50.0, "original_max_position_embeddings": 32}},
}
OLDER: dict[str, Any] = {
    "absent": {},
    "null": {"rope_scaling": None},
    "empty": {"rope_scaling": {}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn_length": {"rope_scaling": {**YARN, "original_max_position_embeddings": 64, "rope_theta": 90.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
}
BESIDE: dict[str, Any] = {
    "nothing": {},
    "theta": {"rope_theta": 70.0},
    "length": {"original_max_position_embeddings": 16},
    "both": {"rope_theta": 70.0, "original_max_position_embeddings": 16},
}


def write(folder: Path, **keys: Any) -> Path:
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **tiny.SMALL, **keys}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(("newer", "older", "beside"), list(itertools.product(NEWER, OLDER, BESIDE)))
def test_keys_count_in_the_order_of_transformers(newer: str, older: str, beside: str, tmp_path: Path) -> None:
    write(tmp_path, **NEWER[newer], **OLDER[older], **BESIDE[beside])
    reference = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    spec = load_spec(tmp_path)
    torch.testing.assert_close(
        inverse_frequencies(spec.ropes[0], spec.attention.head_dim), reference.inv_freq, rtol=1e-6, atol=0
    )
    assert spec.ropes[0].attention_factor == pytest.approx(reference.attention_scaling)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "default", "factor": 4.0}, "rope key 'factor' = 4.0, which rope type 'default' does not"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 32}, "rope key 'beta_fast' = 32"),
        (
            {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
            "'original_max_position_embeddings'",
        ),
        ({"type": "yarn", "factor": 4.0, "finetuned": True}, "rope key 'finetuned' = True"),
        ({"rope_type": "default", "mrope_section": [2, 2]}, "rope key 'mrope_section'"),
        ({"rope_type": "yarn", "type": "linear", "factor": 4.0}, "rope_type 'yarn' and type 'linear'"),
        ({"type": "linear"}, "rope type 'linear' without factor"),
        ({"type": "linear", "factor": "4"}, "factor '4': use a finite number"),
        ({"type": "linear", "factor": float("inf")}, "factor inf: use a finite number"),
        ({"type": "linear", "factor": 0}, "factor 0: use a number above 0"),
        ({"full_attention": {"rope_theta": 1e4}}, "rope parameters per layer type"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rope_key_that_nothing_reads_is_refused_by_name(
    key: str, parameters: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, **{key: parameters})
    with pytest.raises(UnsupportedModelError, match=message):
        load_spec(tmp_path)


def test_a_theta_that_does_not_count_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers drops it without a word, and people add rope_scaling to configs that have it."""
    write(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_scaling=YARN)
    with caplog.at_level(logging.WARNING):
        assert load_spec(tmp_path).ropes[0].theta == 10_000.0
    assert "the rope_theta of rope_parameters, 1000000.0, does not count" in caplog.text
    caplog.clear()
    write(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_theta=1e6)
    assert load_spec(tmp_path).ropes[0].theta == 1e6
    assert not caplog.text
