"""Llama 4, text: segments in three layers of four, and a temperature where nothing rotates."""

from collections.abc import Sequence

from msgspec.structs import replace

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, GATED, RMS, Family, Rotary, TensorNames
from graphgen.models.families.llama import LLAMA_LAYER
from graphgen.models.families.words import Config, every, flag, from_flags, key, only_if
from graphgen.models.spec import NO_ROPE, Norm, QKNorm, Temperature

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


LLAMA4 = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    checkpoints={},
    notes="those without experts",
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
    },
    layer=replace(LLAMA_LAYER, feed_forward=replace(GATED, size=key("intermediate_size_mlp"))),
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
    names=TensorNames(gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"), down="feed_forward.down_proj"),
)

FAMILIES = (LLAMA4,)
