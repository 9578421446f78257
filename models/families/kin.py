"""Llama's kin: a bias, an activation, a rotation or a factor apart."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, GATED, RMS, Family, Rotary, TensorNames
from graphgen.models.families.llama import LLAMA, LLAMA_LAYER
from graphgen.models.families.words import every, flag, from_flags, inverse, key
from graphgen.models.spec import NO_ROPE, Embedding, Head

SEED_OSS = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    checkpoints={"Seed-OSS 36B": 36.2},
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "bos_token_id": 0,
    },
    layer=replace(
        LLAMA.layer, mixer=replace(ATTENTION, qkv_bias=flag("attention_bias", True), o_bias=flag("attention_out_bias"))
    ),
    final_norm=RMS,
)
ARCEE = replace(
    LLAMA,
    model_type="arcee",
    architecture="ArceeForCausalLM",
    checkpoints={"AFM 4.5B": 4.62},
    notes="",
    defaults={
        **llama.DEFAULTS,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    layer=replace(LLAMA.layer, feed_forward=replace(LLAMA.layer.feed_forward, gated=False)),
    names=TensorNames(gate_up=("mlp.up_proj",)),
)
_ERNIE_BIAS = flag("use_bias")
ERNIE = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    checkpoints={"ERNIE 4.5 0.3B": 0.361},
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    layer=replace(
        LLAMA_LAYER,
        mixer=replace(ATTENTION, qkv_bias=_ERNIE_BIAS, o_bias=_ERNIE_BIAS),
        feed_forward=replace(GATED, bias=_ERNIE_BIAS),
    ),
    rotaries=(Rotary(interleaved=True, default_theta=500_000.0),),
    final_norm=RMS,
)
GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    checkpoints={"Granite 3.3 2B": 2.53, "Granite 3.3 8B": 8.17},
    notes="",
    defaults=llama.DEFAULTS,
    layer=replace(
        LLAMA.layer,
        mixer=replace(LLAMA.layer.mixer, scale=key("attention_multiplier", 1.0, float)),
        residual_scale=key("residual_multiplier", 1.0, float),
    ),
    embedding=Embedding(scale=key("embedding_multiplier", 1.0, float)),
    head=Head(tied=flag("tie_word_embeddings"), scale=key("logits_scaling", 1.0, inverse)),
)
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    checkpoints={"SmolLM3 3B": 3.08},
    notes="",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    mixers={"rope": LLAMA.layer.mixer, "none": replace(LLAMA.layer.mixer, rope=1)},
    mixer_kinds=from_flags("no_rope_layers", "rope", "none", otherwise=every("no_rope_layer_interval", "none", "rope")),
    rotaries=(Rotary(default_theta=2_000_000.0), NO_ROPE),
    only={"use_sliding_window": (None, False)},
    unread=("sliding_window", "layer_types", "max_window_layers"),
)

FAMILIES = (SEED_OSS, ARCEE, ERNIE, GRANITE, SMOLLM3)
