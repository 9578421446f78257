"""Mixtral and others whose experts have the names w1 (gate), w2 (down) and w3 (up): Phi-3.5-MoE, MiniMax-M2."""

from typing import Any

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, RMS, ExpertNames, Family, Rotary, TensorNames
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import Computed, activation, flag, key, uniform, window
from graphgen.models.spec import Experts, Head, Layer, Norm, QKNorm, Router

_EXPERTS = Experts(
    num_experts=key("num_local_experts"),
    top_k=key("num_experts_per_tok"),
    size=key("intermediate_size"),
    activation=activation(),
    router=Router(renormalise=True),
)
_NAMES = TensorNames(
    experts=ExpertNames(
        router="block_sparse_moe.gate.weight",
        correction="block_sparse_moe.e_score_correction_bias",
        gate_up=("block_sparse_moe.experts.{expert}.w1.weight", "block_sparse_moe.experts.{expert}.w3.weight"),
        down="block_sparse_moe.experts.{expert}.w2.weight",
    )
)


def _share_of_head(dim: str) -> Any:
    """A number of dimensions as a share of a head; all where the config does not say it."""
    return Computed(lambda config: (config.get(dim) or config.need("head_dim")) / config.need("head_dim"))


_DEFAULTS = {
    **llama.DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    checkpoints={"Mixtral 8x7B": 46.7, "Mixtral 8x22B": 141.0},
    notes="Hugging Face's files; convert consolidated ones",
    defaults=_DEFAULTS,
    aliases={"num_experts": "num_local_experts"},
    layer=replace(LLAMA_LAYER, mixer=replace(ATTENTION, window=window()), feed_forward=_EXPERTS),
    mixer_kinds=uniform("sliding_window"),
    rotaries=(Rotary(default_theta=1_000_000.0),),
    final_norm=RMS,
    names=_NAMES,
)
MINIMAX_M2 = replace(
    MIXTRAL,
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    checkpoints={"MiniMax-M2": 229.0},
    notes="published in FP8, which a GPU keeps",
    defaults={
        **_DEFAULTS,
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "head_dim": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
    },
    layer=replace(
        LLAMA_LAYER,
        mixer=replace(ATTENTION, qk_norm=QKNorm(RMS, "all_heads")),
        feed_forward=replace(_EXPERTS, router=Router(score="sigmoid", correction=True, renormalise=True)),
    ),
    mixer_kinds=uniform(),
    rotaries=(Rotary(partial=True, default_share=_share_of_head("rotary_dim"), default_theta=5_000_000.0),),
)

_NORM = Norm("layer", eps=key("rms_norm_eps"), bias=True)
PHIMOE = replace(
    MIXTRAL,
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    checkpoints={"Phi-3.5-MoE": 41.9},
    notes="a prompt beyond the original length (4096) has another rotation: no prompts are shared where it may come",
    defaults={
        **_DEFAULTS,
        "vocab_size": 32064,
        "intermediate_size": 6400,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
    },
    aliases={},
    only={"num_experts_per_tok": (None, 2)},
    layer=Layer(
        mixer=replace(ATTENTION, window=window(), qkv_bias=flag("attention_bias"), o_bias=flag("attention_bias")),
        feed_forward=replace(_EXPERTS, router=Router(score="sparsemixer", jitter=key("router_jitter_noise"))),
        input_norm=_NORM,
        ff_norm=_NORM,
    ),
    rotaries=(Rotary(default_theta=1_000_000.0, kinds={"su": "longrope"}, mscales=True),),
    final_norm=_NORM,
    head=Head(tied=flag("tie_word_embeddings"), bias=flag("lm_head_bias")),
)

FAMILIES = (MIXTRAL, PHIMOE, MINIMAX_M2)
