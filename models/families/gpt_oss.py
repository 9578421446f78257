"""gpt-oss: sinks, a window in every second layer, and experts with biases and limits. The router's softmax over the
chosen experts is one over all, renormalised."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, RMS_WIDE, ExpertNames, Family, Rotary, TensorNames
from graphgen.models.families.words import FULL, SLIDING, every, flag, key, listed, window
from graphgen.models.spec import Experts, Layer, Router

_BIAS = flag("attention_bias", True)
_ATTENTION = replace(ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS, sinks=True)
GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    checkpoints={"gpt-oss 20B": 20.9, "gpt-oss 120B": 116.8},
    notes="the published files' MXFP4 becomes bfloat16 when it is loaded",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "bos_token_id": None,
        "eos_token_id": None,
    },
    aliases={"num_experts": "num_local_experts"},
    only={"swiglu_alpha": (None, 1.702)},  # that of quick_gelu
    unread=("hidden_act", "experts_per_token", "initial_context_length"),
    layer=Layer(
        mixer=_ATTENTION,
        feed_forward=Experts(
            num_experts=key("num_local_experts"),
            top_k=key("num_experts_per_tok"),
            size=key("intermediate_size"),
            activation="quick_gelu",
            router=Router(bias=True, renormalise=True),
            bias=True,
            limit=key("swiglu_limit", 7.0, float),
            up_plus_one=True,
        ),
        input_norm=RMS_WIDE,
        ff_norm=RMS_WIDE,
    ),
    mixers={FULL: _ATTENTION, SLIDING: replace(_ATTENTION, window=window())},
    mixer_kinds=listed(otherwise=every(2, FULL, SLIDING)),
    rotaries=(Rotary(default_theta=150_000.0),),
    final_norm=RMS_WIDE,
    dequantised=("mxfp4",),
    names=TensorNames(
        experts=ExpertNames(
            router="mlp.router.weight",
            gate_up=("mlp.experts.gate_up_proj",),
            down="mlp.experts.down_proj",
            transposed=True,
            alternating=True,
        )
    ),
)

FAMILIES = (GPT_OSS,)
