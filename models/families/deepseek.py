"""DeepSeek V2 and V3 and those built like them: latent attention, and mixtures of experts of which some see every
row."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import GATED, RMS, ExpertNames, Family, Rotary, TensorNames
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import activation, flag, from_layer, key, listed, product
from graphgen.models.spec import Dense, Experts, Latent, Router

_LATENT = Latent(
    num_heads=key("num_attention_heads"),
    latent_size=key("kv_lora_rank"),
    plain_dim=key("qk_nope_head_dim"),
    rope_dim=key("qk_rope_head_dim"),
    value_dim=key("v_head_dim"),
    q_rank=key("q_lora_rank", None),
    bias=flag("attention_bias"),
)
_NAMES = TensorNames(
    experts=ExpertNames(
        shared_gate_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        shared_down="mlp.shared_experts.down_proj",
    )
)
_ROUTED = {"num_experts": key("n_routed_experts"), "top_k": key("num_experts_per_tok")}
_SCALE = key("routed_scaling_factor", 1.0, float)
_SHARED = Dense(size=product("moe_intermediate_size", "n_shared_experts"), activation=activation())
_KINDS = from_layer("first_k_dense_replace", "experts", "dense")
_ONE_KIND = {"moe_layer_freq": (1,)}
_UNREAD = (
    *("num_key_value_heads", "head_dim", "qk_head_dim"),  # follow from others, or from nothing
    *("seq_aux", "aux_loss_alpha", "ep_size", "num_nextn_predict_layers", "num_mtp_layers"),
)
_LATENT_DEFAULTS = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128}

_EXPERTS_2 = Experts(
    **_ROUTED,
    size=key("moe_intermediate_size"),
    activation=activation(),
    router=Router(scale=_SCALE),
    shared=replace(_SHARED, bias=flag("mlp_bias")),
)
_DENSE_2 = replace(GATED, bias=flag("mlp_bias"))
V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    variant="greedy",
    when={"topk_method": ("greedy", None)},
    checkpoints={"DeepSeek-V2-Lite": 15.7},
    notes="also DeepSeek-Coder-V2-Lite",
    defaults={
        **llama.DEFAULTS,
        **_LATENT_DEFAULTS,
        "vocab_size": 102400,
        "qk_nope_head_dim": 128,
        "moe_intermediate_size": 1407,
        "num_experts_per_tok": None,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    aliases={"num_experts": "n_routed_experts"},
    only={**_ONE_KIND, "scoring_func": ("softmax",), "norm_topk_prob": (False,)},
    unread=(*_UNREAD, "n_group", "topk_group"),
    layer=replace(LLAMA_LAYER, mixer=_LATENT, feed_forward=_EXPERTS_2),
    feed_forwards={"dense": _DENSE_2, "experts": _EXPERTS_2},
    feed_forward_kinds=_KINDS,
    rotaries=(Rotary(interleaved=True, scales_scores=True),),
    final_norm=RMS,
    names=_NAMES,
)
_GROUPED_2 = replace(_EXPERTS_2, router=Router(num_groups=key("n_group"), kept_groups=key("topk_group"), scale=_SCALE))
V2_GROUPED = replace(
    V2,
    variant="groups of experts",
    when={"topk_method": ("group_limited_greedy",)},
    checkpoints={"DeepSeek-V2, V2.5": 236.0},
    notes="",
    unread=_UNREAD,
    layer=replace(V2.layer, feed_forward=_GROUPED_2),
    feed_forwards={"dense": _DENSE_2, "experts": _GROUPED_2},
)

_EXPERTS_3 = Experts(
    **_ROUTED,
    size=key("moe_intermediate_size"),
    activation=activation(),
    router=Router(
        score="sigmoid",
        correction=True,
        num_groups=key("n_group"),
        kept_groups=key("topk_group"),
        group_score="top_two",
        renormalise=flag("norm_topk_prob", True),
        scale=_SCALE,
    ),
    shared=_SHARED,
)
V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    checkpoints={"Moonlight 16B-A3B": 16.0, "DeepSeek-V3, R1": 671.0},
    notes="without its layer for drafting tokens; V3 and R1 are published in FP8, which a GPU keeps",
    defaults={
        **llama.DEFAULTS,
        **_LATENT_DEFAULTS,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "qk_nope_head_dim": 128,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    aliases={"num_local_experts": "n_routed_experts"},
    only={**_ONE_KIND, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    unread=_UNREAD,
    layer=replace(LLAMA_LAYER, mixer=_LATENT, feed_forward=_EXPERTS_3),
    feed_forwards={"dense": GATED, "experts": _EXPERTS_3},
    feed_forward_kinds=_KINDS,
    rotaries=(Rotary(interleaved=flag("rope_interleave", True), scales_scores=True),),
    final_norm=RMS,
    names=_NAMES,
    ignored=("model.layers.61.*",),  # the layer behind the last, by which it drafts
)
GLM4_MOE_LITE = replace(
    V3,
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    checkpoints={"GLM-4.7-Flash": 30.0},
    notes="without its layer for drafting tokens",
    defaults={
        **V3.defaults,
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "moe_intermediate_size": 1536,
        "num_experts_per_tok": 4,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    only={**V3.only, "first_k_dense_replace": (1,)},
    feed_forwards={"dense": GATED, "sparse": _EXPERTS_3},
    feed_forward_kinds=listed("mlp_layer_types", otherwise=from_layer(1, "sparse", "dense")),
    ignored=("model.layers.47.*",),
)

FAMILIES = (V2, V2_GROUPED, V3, GLM4_MOE_LITE)
