"""Apertus and HunYuan: Llama with a norm of each query and key, before the rotation or behind it."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, GATED, HEAD_NORM, PLAIN, RMS, Family, Rotary, TensorNames
from graphgen.models.families.words import flag
from graphgen.models.spec import Layer, QKNorm

_BIAS = flag("attention_bias")
_ATTENTION = replace(ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS)

APERTUS = Family(
    model_type="apertus",
    architecture="ApertusForCausalLM",
    checkpoints={"Apertus 8B": 8.05, "Apertus 70B": 70.6},
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12_000_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    layer=Layer(
        mixer=replace(_ATTENTION, qk_norm=HEAD_NORM),
        feed_forward=replace(PLAIN, bias=False),
        input_norm=RMS,
        ff_norm=RMS,
    ),
    rotaries=(Rotary(default_theta=12_000_000.0),),
    final_norm=RMS,
    names=TensorNames(input_norm="attention_layernorm", ff_norm="feedforward_layernorm", gate_up=("mlp.up_proj",)),
)
HUNYUAN = Family(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    checkpoints={"Hunyuan 0.5B": 0.54, "Hunyuan 1.8B": 1.79, "Hunyuan 4B": 4.02, "Hunyuan 7B": 7.5},
    notes="also Hunyuan-MT; checkpoints of this class, not HunYuanForCausalLM's",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 290943,
        "rms_norm_eps": 1e-5,
    },
    layer=Layer(
        mixer=replace(_ATTENTION, qk_norm=QKNorm(RMS, rotated=True)),
        feed_forward=GATED,
        input_norm=RMS,
        ff_norm=RMS,
    ),
    rotaries=(Rotary(alpha=True),),
    final_norm=RMS,
    names=TensorNames(q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm"),
)

FAMILIES = (APERTUS, HUNYUAN)
