"""GLM-4: half of each head rotates, in pairs side by side; the newer ones have a norm on both sides of each block.
GLM-4.5 is a mixture of experts of another build."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import (
    ATTENTION,
    GATED,
    HEAD_NORM,
    RMS,
    ExpertNames,
    Family,
    Rotary,
    TensorNames,
)
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import activation, flag, from_layer, key, only_if, product
from graphgen.models.spec import Dense, Experts, Layer, Router

_ATTENTION = replace(ATTENTION, qkv_bias=flag("attention_bias", True))
_NAMES = TensorNames(gate_up=("mlp.gate_up_proj",))

GLM = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    checkpoints={"GLM-4 9B": 9.4},
    notes="checkpoints whose names end in -hf",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "bos_token_id": None,
        "eos_token_id": [151329, 151336, 151338],
    },
    layer=replace(LLAMA_LAYER, mixer=_ATTENTION),
    rotaries=(Rotary(partial=True, default_share=0.5, interleaved=True),),
    final_norm=RMS,
    float16=False,
    names=_NAMES,
)
GLM4 = replace(
    GLM,
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    checkpoints={"GLM-4 9B 0414": 9.4, "GLM-4 32B 0414": 32.6},
    notes="also GLM-Z1",
    layer=Layer(
        mixer=_ATTENTION,
        feed_forward=GATED,
        input_norm=RMS,
        ff_norm=RMS,
        mixer_output_norm=RMS,
        ff_output_norm=RMS,
    ),
    names=replace(_NAMES, mixer_output_norm="post_self_attn_layernorm", ff_output_norm="post_mlp_layernorm"),
)

_SHARED = Dense(size=product("moe_intermediate_size", "n_shared_experts"), activation=activation())
_EXPERTS = Experts(
    num_experts=key("num_local_experts"),
    top_k=key("num_experts_per_tok"),
    size=key("moe_intermediate_size"),
    activation=activation(),
    router=Router(
        score="sigmoid",
        correction=True,
        num_groups=key("n_group"),
        kept_groups=key("topk_group"),
        group_score="top_two",
        renormalise=flag("norm_topk_prob", True),
        scale=key("routed_scaling_factor", 1.0, float),
    ),
    shared=_SHARED,
)
GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    checkpoints={"GLM-4.5-Air": 107.0, "GLM-4.5, 4.6, 4.7": 353.0},
    notes="without its layer for drafting tokens",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 151552,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    aliases={"num_local_experts": "n_routed_experts"},
    unread=("num_nextn_predict_layers",),
    layer=replace(
        LLAMA_LAYER,
        mixer=replace(ATTENTION, qkv_bias=flag("attention_bias"), qk_norm=only_if("use_qk_norm", HEAD_NORM)),
        feed_forward=_EXPERTS,
    ),
    feed_forwards={"dense": GATED, "experts": _EXPERTS},
    feed_forward_kinds=from_layer("first_k_dense_replace", "experts", "dense"),
    rotaries=(Rotary(partial=True, default_share=0.5),),
    final_norm=RMS,
    names=TensorNames(
        experts=ExpertNames(
            shared_gate_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            shared_down="mlp.shared_experts.down_proj",
        )
    ),
    ignored=("model.layers.46.*", "model.layers.92.*"),  # the layer behind the last, by which it drafts
)

FAMILIES = (GLM, GLM4, GLM4_MOE)
