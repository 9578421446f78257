"""Tiny random checkpoints of every family, written by Hugging Face: the reference is not ours.

Used by the tests of the models and of everything that runs one.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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
        "beta_fast": 9.0,
        "beta_slow": 0.6,
        "truncate": False,
    },
}


def rope(kind: str, theta: float = 10_000.0) -> dict[str, Any]:
    """rope_parameters of a config; each call gives a fresh dict because transformers changes it."""
    return {"rope_theta": theta, **ROPE_KINDS[kind]}


_LATENT = {
    **{"num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 22, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6},
    **{"v_head_dim": 14, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    **{"n_shared_experts": 2, "first_k_dense_replace": 1, "num_hidden_layers": 2},
}
_YARN_OF_SCORES = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    **{"mscale": 0.7, "mscale_all_dim": 0.7},
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
    "llama_yarn_attention_factor": ("llama", {"rope_parameters": "yarn_attention_factor", "head_dim": 20}),
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
    "gpt2": ("gpt2", {}),
    "gpt2_unscaled": ("gpt2", {"scale_attn_weights": False, "n_inner": 72, "tie_word_embeddings": False}),
    "bigcode_one_kv_head": ("gpt_bigcode", {}),
    "bigcode_fused_by_head": ("gpt_bigcode", {"multi_query": False}),
    "opt": ("opt", {"ffn_dim": 80}),
    "opt_350m": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt_no_biases": ("opt", {"ffn_dim": 80, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "neox": ("gpt_neox", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
    "neox_sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gptj": ("gptj", {"rotary_dim": 6}),
    "codegen": ("codegen", {"num_attention_heads": 4, "rotary_dim": 4}),
    "phi": ("phi", {}),
    "phi_head_norms": (
        "phi",
        {"hidden_size": 60, "num_attention_heads": 3, "qk_layernorm": True, "partial_rotary_factor": 0.4},
    ),
    "olmo": ("olmo", {"clip_qkv": 0.7, "hidden_act": "gelu_pytorch_tanh"}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 9, "num_hidden_layers": 5}),
    "olmo3_yarn": ("olmo3", {"num_hidden_layers": 4, "sliding_window": 16, "rope_scaling": rope("yarn", 900.0)}),
    "exaone4": ("exaone4", {"sliding_window": 12, "num_hidden_layers": 5}),
    "phi3": ("phi3", {}),
    "phi3_window_partial": ("phi3", {"sliding_window": 14, "partial_rotary_factor": 0.5}),
    "phi3_longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.1, 1.4, 2.0],
                "long_factor": [1.2, 2.0, 5.0, 9.0],
            },
            "original_max_position_embeddings": 64,
        },
    ),
    "seed_oss": ("seed_oss", {"head_dim": 12, "attention_out_bias": True}),
    "arcee": ("arcee", {"hidden_act": "relu2", "mlp_bias": True}),
    "ernie": ("ernie4_5", {"head_dim": 12, "use_bias": True}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.7,
            "attention_bias": True,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3_listed": ("smollm3", {"no_rope_layers": [0, 1, 0]}),
    "glm": ("glm", {"head_dim": 12}),
    "glm4": ("glm4", {"head_dim": 12}),
    "starcoder2": ("starcoder2", {"sliding_window": 13, "use_bias": True}),
    "starcoder2_no_biases": ("starcoder2", {"use_bias": False}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "nemotron": ("nemotron", {"head_dim": 12, "mlp_bias": True, "hidden_act": "relu2"}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "cohere_head_norms": ("cohere", {"use_qk_norm": True, "attention_bias": True, "rope_parameters": "linear"}),
    "falcon_40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3, "bias": True}),
    "falcon_11b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon_7b": ("falcon", {"ffn_hidden_size": 72}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "mixtral_window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 9}),
    "phimoe": (
        "phimoe",
        {"num_local_experts": 5, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2},
    ),
    "phimoe_longrope": (
        "phimoe",
        {
            "num_local_experts": 4,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.3, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
                "short_mscale": 1.2,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    "minimax_m2": ("minimax_m2", {"head_dim": 12, "rotary_dim": 6, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 9,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.9}),
    "olmoe_renormalised": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "glm4_moe": (
        "glm4_moe",
        {
            "head_dim": 12,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.7,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "glm4_moe_one_group": (
        "glm4_moe",
        {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
        },
    ),
    "granite_moe": (
        "granitemoe",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
        },
    ),
    "granite_moe_shared": (
        "granitemoeshared",
        {"num_local_experts": 4, "shared_intermediate_size": 40, "attention_multiplier": 0.3},
    ),
    "granite_moe_without_shared": ("granitemoeshared", {"num_local_experts": 4, "attention_multiplier": 0.3}),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 12,
            "intermediate_size": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 9,
            "swiglu_limit": 1.5,
        },
    ),
    "apertus": ("apertus", {"attention_bias": True}),
    "hunyuan": (
        "hunyuan_v1_dense",
        {"head_dim": 12, "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 1e4, "factor": 1.0}},
    ),
    "falcon_rw": (
        "falcon",
        {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True, "max_position_embeddings": 2048},
    ),
    "gemma": ("gemma", {"head_dim": 16, "hidden_act": "gelu", "attention_bias": True}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 17,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 5,
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 4.0,
        },
    ),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 15}),
    "bloom": ("bloom", {}),
    "bloom_residual_from_norm": (
        "bloom",
        {"apply_residual_connection_post_layernorm": True, "num_attention_heads": 4},
    ),
    "mpt": (
        "mpt",
        {"attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.4}, "tie_word_embeddings": True},
    ),
    "cohere2": ("cohere2", {"sliding_window": 18, "num_hidden_layers": 4, "attention_bias": True}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.6,
            },
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 12,
            "intermediate_size_mlp": 80,
            "moe_layers": [],
            "num_hidden_layers": 4,
            "attention_chunk_size": 24,
            "floor_scale": 20,
            "attn_scale": 0.5,
        },
    ),
    "llama4_experts": (
        "llama4_text",
        {
            "head_dim": 12,
            "intermediate_size": 24,
            "intermediate_size_mlp": 80,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
            "attention_chunk_size": 24,
        },
    ),
    "llama4_tower": (
        "llama4",
        {
            "head_dim": 12,
            "intermediate_size": 24,
            "intermediate_size_mlp": 80,
            "num_local_experts": 4,
            "moe_layers": [1],
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 40,
            "use_qk_norm": False,
            "floor_scale": 20,
            "attn_scale": 0.5,
        },
    ),
    "gemma3_tower": (
        "gemma3",
        {"head_dim": 12, "query_pre_attn_scalar": 5, "sliding_window": 16, "sliding_window_pattern": 2},
    ),
    "mistral3_tower": ("mistral3", {"model_type": "mistral", "sliding_window": 19}),
    "ministral3_tower": (
        "mistral3",
        {
            "model_type": "ministral3",
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.6,
            },
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**_LATENT, "q_lora_rank": None, "rope_scaling": _YARN_OF_SCORES, "attention_bias": True, "mlp_bias": True},
    ),
    "deepseek_v2_groups": (
        "deepseek_v2",
        {
            **_LATENT,
            **{"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.3},
            "rope_scaling": {**_YARN_OF_SCORES, "mscale": 0.5},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LATENT,
            **{"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "attention_bias": True},
            "rope_scaling": {**_YARN_OF_SCORES, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "moonlight": (
        "deepseek_v3",
        {
            **_LATENT,
            **{"q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
            **{"norm_topk_prob": False, "rope_interleave": False, "num_hidden_layers": 3},
        },
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {**_LATENT, "n_group": 4, "topk_group": 2, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_theta": 500.0}},
    ),
    "exaone4_full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
}
"""Name of a case -> model type and what differs from SMALL; a string as rope_parameters names one of
ROPE_KINDS."""


_ENCODER = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14, "head_dim": 8},
}
TOWERS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {"vision_config": _ENCODER, "mm_tokens_per_image": 4, "tie_word_embeddings": True},
    "mistral3": {"vision_config": _ENCODER, "tie_word_embeddings": False},
    "llama4": {
        "vision_config": {**_ENCODER, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    },
}
"""Model type -> what stands beside the text model's config."""


_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


def build(case: str, seed: int = 0, **overrides: Any) -> HuggingFaceModel:
    """The Hugging Face model of a case, float32, in eval mode, with every tensor random."""
    model_type, changes = CASES[case]
    values = copy.deepcopy({**SMALL, **changes, **overrides})
    if isinstance(values.get("rope_parameters"), str):
        values["rope_parameters"] = rope(values["rope_parameters"])
    torch.manual_seed(seed)
    if model_type in TOWERS:
        values = {**copy.deepcopy(TOWERS[model_type]), "text_config": values}
    config = AutoConfig.for_model(model_type, **values)
    for part in (config, getattr(config, "text_config", config)):
        for name in _EPSILONS:
            if hasattr(part, name):
                setattr(part, name, 0.02)  # large enough to show
    kind = AutoModelForImageTextToText if model_type in TOWERS else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    if model_type == "llama4":  # transformers 5.24 fails behind its text model where there is no image
        model.forward = model.language_model.forward
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms start as ones or zeros and biases as zeros, which would hide a mixed-up one.
            if parameter.ndim == 1 or "norm" in name or name.endswith("_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for buffer in _corrections(model):
            buffer.add_(torch.randn_like(buffer) * 0.3)
    return model


def num_parameters(model: HuggingFaceModel) -> int:
    """Of the text model, with the biases of routers, which are buffers there."""
    of_text = [tensor for name, tensor in model.named_parameters() if "vision" not in name and "modal" not in name]
    return sum(tensor.numel() for tensor in (*of_text, *_corrections(model)))


def _corrections(model: HuggingFaceModel) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def spec_of(model: HuggingFaceModel) -> ModelSpec:
    """Its ModelSpec. The config of a model that was never saved does not name its class."""
    model.config.architectures = [type(model).__name__]
    return spec_from_hf(model.config)


def save(case: str, folder: Path, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any) -> HuggingFaceModel:
    """Writes the checkpoint of a case into `folder` and returns its Hugging Face model."""
    model = build(case, seed, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
