"""The architectures of GGUF files that graphgen reads: a table of data.

Owns what each name of general.architecture is called by Hugging Face, and how llama.cpp's converters changed its
tensors. Called by gguf/config.py and gguf/checkpoint.py.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from msgspec import Struct


class Architecture(Struct, frozen=True, kw_only=True):
    """A value of general.architecture."""

    model_type: str  # of config.json, as the next
    architecture: str
    pairs: bool = False  # rows of q and k lie in the pairs that turn together: back to halves
    always_biased: bool = False  # q, k and v are, which config.json has no key for
    norms_plus_one: bool = False  # norms have the weight that is multiplied by, config.json's class that less one
    keys: Mapping[str, str] = MappingProxyType({})  # metadata key, without the architecture's name -> config.json's
    scaling_keys: Mapping[str, str] = MappingProxyType({})  # metadata key -> that of rope_parameters
    partial: bool = False  # a part of a head may turn
    implied: Mapping[str, Any] = MappingProxyType({})  # keys of config.json that the file leaves out
    instead: Mapping[str, "Architecture"] = MappingProxyType({})  # metadata key -> what a file is that has it, not as 0


KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Of every architecture here."""

_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}

_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_MIXTRAL = Architecture(model_type="mixtral", architecture="MixtralForCausalLM", pairs=True, keys=_EXPERTS)
_MINISTRAL = Architecture(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    pairs=True,
    scaling_keys={
        "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
        "attention.temperature_scale": "llama_4_scaling_beta",
    },
    implied={"rope_parameters": {}},  # the class would have others than the file says
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama", architecture="LlamaForCausalLM", pairs=True, instead={"expert_count": _MIXTRAL}
    ),
    "mistral3": Architecture(
        model_type="mistral",
        architecture="MistralForCausalLM",
        pairs=True,
        implied={"sliding_window": None},
        instead={"attention.temperature_scale": _MINISTRAL},
    ),
    "phi3": Architecture(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        keys={**_WINDOW, "rope.scaling.original_context_length": "original_max_position_embeddings"},
        partial=True,
    ),
    "qwen2": Architecture(model_type="qwen2", architecture="Qwen2ForCausalLM", always_biased=True),
    "qwen3": Architecture(model_type="qwen3", architecture="Qwen3ForCausalLM"),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        implied={"norm_topk_prob": True},
    ),
    "smollm3": Architecture(model_type="smollm3", architecture="SmolLM3ForCausalLM", pairs=True),
    "olmo2": Architecture(model_type="olmo2", architecture="Olmo2ForCausalLM"),
    "granite": Architecture(
        model_type="granite",
        architecture="GraniteForCausalLM",
        pairs=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "gemma": Architecture(model_type="gemma", architecture="GemmaForCausalLM", norms_plus_one=True, implied={**_GELU}),
    "gemma2": Architecture(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        norms_plus_one=True,
        keys={**_WINDOW, **_SOFTCAPS},
        implied=_GELU,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        norms_plus_one=True,
        keys={**_WINDOW, **_SOFTCAPS, "rope.freq_base_swa": "rope_local_base_freq"},
        implied=_GELU,
    ),
}
