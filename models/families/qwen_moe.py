"""Qwen's mixtures of experts and OLMoE."""

from msgspec.structs import replace

from graphgen.models.families import llama, qwen
from graphgen.models.families.family import ATTENTION, GATED, HEAD_NORM, RMS, Family
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import activation, every, except_listed, flag, key
from graphgen.models.spec import Dense, Experts, QKNorm, Router

_EXPERTS = Experts(
    num_experts=key("num_experts"),
    top_k=key("num_experts_per_tok"),
    size=key("moe_intermediate_size"),
    activation=activation(),
    router=Router(renormalise=flag("norm_topk_prob")),
)
_KINDS = except_listed("mlp_only_layers", "dense", every("decoder_sparse_step", "experts", "dense"))
_BIAS = flag("attention_bias")
_DEFAULTS = {
    **qwen.DEFAULTS,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "mlp_only_layers": None,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
}

_EXPERTS_2 = replace(
    _EXPERTS, shared=Dense(size=key("shared_expert_intermediate_size"), activation=activation()), shared_gate=True
)
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    checkpoints={"Qwen1.5-MoE A2.7B": 14.3, "Qwen2 57B-A14B": 57.4},
    defaults={
        **_DEFAULTS,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
    only={"use_sliding_window": (None, False)},
    unread=("sliding_window", "max_window_layers"),
    layer=replace(LLAMA_LAYER, mixer=replace(ATTENTION, qkv_bias=flag("qkv_bias", True)), feed_forward=_EXPERTS_2),
    feed_forwards={"dense": GATED, "experts": _EXPERTS_2},
    feed_forward_kinds=_KINDS,
    final_norm=RMS,
)
QWEN3_MOE = replace(
    QWEN2_MOE,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    checkpoints={"Qwen3 30B-A3B": 30.5, "Qwen3-Coder 30B-A3B": 30.5, "Qwen3 235B-A22B": 235.0},
    defaults={
        **_DEFAULTS,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_local_experts": 128,
    },
    aliases={"num_experts": "num_local_experts"},
    layer=replace(
        LLAMA_LAYER,
        mixer=replace(ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS, qk_norm=HEAD_NORM),
        feed_forward=_EXPERTS,
    ),
    feed_forwards={"dense": GATED, "experts": _EXPERTS},
)
OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    checkpoints={"OLMoE 1B-7B": 6.92},
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
        "bos_token_id": None,
        "eos_token_id": 50279,
    },
    aliases={"num_local_experts": "num_experts"},
    layer=replace(
        LLAMA_LAYER,
        mixer=replace(
            ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS, qk_norm=QKNorm(RMS, "all_heads"), clip=key("clip_qkv", None)
        ),
        feed_forward=replace(_EXPERTS, size=key("intermediate_size")),
    ),
    final_norm=RMS,
)

FAMILIES = (QWEN2_MOE, QWEN3_MOE, OLMOE)
