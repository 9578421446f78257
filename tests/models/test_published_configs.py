"""Configs as they are published, with the keys that they have: each is read, and as many parameters come of it as its
authors count."""

import json
from pathlib import Path
from typing import Any

import pytest

from graphgen.models.families import load_spec
from tests import ROOT

_SHAPES = ROOT / "benchmarks" / "shapes"
_PHI = {
    **{"architectures": ["PhimoeForCausalLM"], "model_type": "phimoe", "attention_bias": True, "hidden_size": 4096},
    **{"intermediate_size": 6400, "lm_head_bias": True, "max_position_embeddings": 131072, "num_attention_heads": 32},
    **{"num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16},
    **{"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_dropout": 0.0},
    **{"router_jitter_noise": 0.01, "input_jitter_noise": 0.01, "sliding_window": 131072, "vocab_size": 32064},
    "rope_scaling": {
        **{"long_factor": [1.5] * 64, "short_factor": [1.0] * 64, "type": "longrope"},
        **{"long_mscale": 1.243163121016122, "short_mscale": 1.243163121016122},
        "original_max_position_embeddings": 4096,
    },
}
_MINIMAX = {
    **{"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "attn_type_list": [1] * 62},
    **{"head_dim": 128, "hidden_size": 3072, "intermediate_size": 1536, "num_attention_heads": 48},
    **{"num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8, "num_local_experts": 256},
    **{"qk_norm_type": "per_layer", "rotary_dim": 64, "rope_theta": 5000000, "scoring_func": "sigmoid"},
    **{"use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064},
}
_GLM = {
    **{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True, "head_dim": 128},
    **{"partial_rotary_factor": 0.5, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536},
    **{"num_attention_heads": 96, "num_key_value_heads": 8, "n_routed_experts": 160, "n_shared_experts": 1},
    **{"num_experts_per_tok": 8, "num_hidden_layers": 92, "first_k_dense_replace": 3, "norm_topk_prob": True},
    **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "rope_theta": 1000000, "use_qk_norm": True},
    **{"num_nextn_predict_layers": 1, "vocab_size": 151552, "eos_token_id": [151329, 151336, 151338]},
}
_QWEN2 = {
    **{"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 2048, "num_experts": 60},
    **{"intermediate_size": 5632, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    **{"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 4},
    **{"norm_topk_prob": False, "sliding_window": 32768, "max_window_layers": 21, "use_sliding_window": False},
    **{"decoder_sparse_step": 1, "router_aux_loss_coef": 0.001, "vocab_size": 151936},
}
_GRANITE = {
    **{"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "attention_multiplier": 0.015625},
    **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0, "hidden_size": 1536},
    **{"intermediate_size": 512, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8},
    **{"num_local_experts": 40, "num_experts_per_tok": 8, "tie_word_embeddings": True, "vocab_size": 49155},
}
_LLAMA = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "vision_config": {},
    "text_config": {
        **{"model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384},
        **{"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128},
        **{"num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "use_qk_norm": False},
        **{"moe_layers": list(range(1, 48, 2)), "no_rope_layers": [1, 1, 1, 0] * 12, "attention_chunk_size": 8192},
        **{"attn_temperature_tuning": 4, "vocab_size": 202048, "for_llm_compressor": False},
    },
}
_GPT_OSS = {
    **json.loads((_SHAPES / "gpt-oss-20b" / "config.json").read_text()),
    **{"num_hidden_layers": 36, "num_local_experts": 128, "experts_per_token": 4, "initial_context_length": 4096},
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


def _shape(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((_SHAPES / name / "config.json").read_text())
    return config


BILLIONS: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen3 30B-A3B": (_shape("qwen3-30b-a3b"), 30.5),
    "DeepSeek-V2-Lite": (_shape("deepseek-v2-lite"), 15.7),
    "Gemma 3 12B, text": (_shape("gemma-3-12b"), 11.8),
    "Phi-4-mini": (_shape("phi-4-mini"), 3.84),
    "OPT 6.7B": (_shape("opt-6.7b"), 6.66),
    "gpt-oss 120B": (_GPT_OSS, 116.8),
    "Phi-3.5-MoE": (_PHI, 41.9),
    "MiniMax-M2": (_MINIMAX, 228.7),
    "GLM-4.5": (_GLM, 352.8),
    "Qwen1.5-MoE A2.7B": (_QWEN2, 14.3),
    "Granite 3.1 3B-A800M": (_GRANITE, 3.3),
    "Llama 4 Maverick, text": (_LLAMA, 400.7),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_a_published_config_has_the_published_size(name: str, tmp_path: Path) -> None:
    config, billions = BILLIONS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_spec(tmp_path).num_parameters / 1e9 == pytest.approx(billions, abs=0.05)
