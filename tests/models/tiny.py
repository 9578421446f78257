"""Tiny random checkpoints of every family, written by Hugging Face: the reference is not ours.

Used by the tests of the models and of everything that runs one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from graphgen.models.families import spec_from_hf
from graphgen.models.spec import ModelSpec

HuggingFaceModel = Any
"""A causal language model of transformers, which publishes no types."""

SMALL: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide enough that positions, masks and biases show in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""Config values of every checkpoint; a case overrides some. Values differ by family, hence Any."""

ROPE_KINDS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.8,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}


def rope(kind: str, theta: float = 10_000.0) -> dict[str, Any]:
    """rope_parameters of a config; each call gives a fresh dict because transformers changes it."""
    return {"rope_theta": theta, **ROPE_KINDS[kind]}


_CLASSES: Mapping[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied_one_kv_head": (
        "llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama_biases_wide_heads": ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "llama_no_groups": ("llama", {"num_key_value_heads": 6, "hidden_act": "gelu"}),
    "llama_linear": ("llama", {"rope_parameters": "linear"}),
    "llama_dynamic": ("llama", {"rope_parameters": "dynamic", "max_position_embeddings": 40}),
    "llama_llama3": ("llama", {"rope_parameters": "llama3"}),
    "llama_yarn": ("llama", {"rope_parameters": "yarn"}),
    "llama_yarn_attention_factor": ("llama", {"rope_parameters": "yarn_attention_factor"}),
    "mistral_window": ("mistral", {"sliding_window": 11}),
    "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_window": (
        "qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
}
"""Name of a case -> family and what differs from SMALL; a string as rope_parameters names one of
ROPE_KINDS."""


def build(case: str, seed: int = 0, **overrides: Any) -> HuggingFaceModel:
    """The Hugging Face model of a case, float32, in eval mode, with every tensor random."""
    family, changes = CASES[case]
    values = {**SMALL, **changes, **overrides}
    if isinstance(values.get("rope_parameters"), str):
        values["rope_parameters"] = rope(values["rope_parameters"])
    config_class, model_class = _CLASSES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as ones and biases as zeros, which would hide a mixed-up one
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def spec_of(model: HuggingFaceModel) -> ModelSpec:
    """Its ModelSpec. The config of a model that was never saved does not name its class."""
    model.config.architectures = [type(model).__name__]
    return spec_from_hf(model.config)


def save(case: str, folder: Path, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any) -> HuggingFaceModel:
    """Writes the checkpoint of a case into `folder` and returns its Hugging Face model."""
    model = build(case, seed, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
