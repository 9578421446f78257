"""Llama 4, text: segments in three layers of four, a temperature where nothing rotates, and experts whose input is
scaled."""

from collections.abc import Sequence

from msgspec.structs import replace

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, GATED, RMS, ExpertNames, Family, Rotary, TensorNames
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import Config, activation, every, flag, from_flags, key, only_if
from graphgen.models.spec import NO_ROPE, Experts, Norm, QKNorm, Router, Temperature

_BIAS = flag("attention_bias")
_ROPELESS = replace(ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS, rope=1)
_ROTATED = replace(
    _ROPELESS,
    rope=0,
    segment=key("attention_chunk_size", None),
    qk_norm=only_if("use_qk_norm", QKNorm(Norm(eps=key("rms_norm_eps"), weight=False))),
)
_FLAGS = from_flags("no_rope_layers", "rope", "none", otherwise=every("no_rope_layer_interval", "none", "rope"))


def _kinds(config: Config, num_layers: int) -> Sequence[str]:
    kinds = _FLAGS(config, num_layers)
    segmented = "full_attention" if config.get("attention_chunk_size") is None else "chunked_attention"
    types = [segmented if kind == "rope" else "full_attention" for kind in kinds]
    if (listed := config.get("layer_types") or types) != types:
        raise UnsupportedModelError(f"config.json has layer_types {listed}, supported are those of no_rope_layers")
    return kinds


_EXPERTS = Experts(
    num_experts=key("num_local_experts"),
    top_k=key("num_experts_per_tok"),
    size=key("intermediate_size"),
    activation=activation(),
    router=Router(score="sigmoid"),
    input_scaled=True,
    shared=GATED,
)
_EVERY = every("interleave_moe_layer_step", "experts", "dense")


def _feed_forward_kinds(config: Config, num_layers: int) -> Sequence[str]:
    kinds, numbers = _EVERY(config, num_layers), config.get("moe_layers")
    if numbers is None:
        return kinds
    return ["experts" if number in numbers else "dense" for number in range(num_layers)]


LLAMA4 = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    checkpoints={},
    notes="the text model alone, as it is saved from one that reads images",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
    },
    layer=replace(LLAMA_LAYER, feed_forward=_EXPERTS),
    feed_forwards={"dense": replace(GATED, size=key("intermediate_size_mlp")), "experts": _EXPERTS},
    feed_forward_kinds=_feed_forward_kinds,
    mixers={"rope": _ROTATED, "none": _ROPELESS},
    mixer_kinds=_kinds,
    rotaries=(
        Rotary(interleaved=True, default_theta=500_000.0),
        replace(
            NO_ROPE,
            temperature=only_if(
                "attn_temperature_tuning", Temperature(beta=key("attn_scale"), length=key("floor_scale"), offset=1)
            ),
        ),
    ),
    final_norm=RMS,
    names=TensorNames(
        gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"),
        down="feed_forward.down_proj",
        experts=ExpertNames(
            router="feed_forward.router.weight",
            gate_up=("feed_forward.experts.gate_up_proj",),
            down="feed_forward.experts.down_proj",
            shared_gate_up=("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
            shared_down="feed_forward.shared_expert.down_proj",
            transposed=True,
        ),
    ),
)

FAMILIES = (LLAMA4,)
