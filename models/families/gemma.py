"""Gemma 1 to 3, text: norms whose weights are stored less one, wide heads, a scaled embedding."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, GATED, RMS_WIDE, Family, Rotary, TensorNames
from graphgen.models.families.words import FULL, SLIDING, activation, every, flag, key, listed, to_power, window
from graphgen.models.spec import Embedding, Head, Layer, QKNorm

_NORM = replace(RMS_WIDE, plus_one=True)
_BIAS = flag("attention_bias")
_ATTENTION = replace(ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS)
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    checkpoints={"Gemma 2B": 2.51, "Gemma 7B": 8.54},
    notes="also CodeGemma",
    defaults=_DEFAULTS,
    unread=("hidden_activation",),
    layer=Layer(
        mixer=_ATTENTION,
        feed_forward=replace(GATED, activation=activation(meant={"gelu": "gelu_pytorch_tanh"})),
        input_norm=_NORM,
        ff_norm=_NORM,
    ),
    embedding=Embedding(scale=to_power("hidden_size", 0.5), round_scale=True),
    final_norm=_NORM,
    float16=False,
    needs_bos=True,
)

_DEFAULTS_2 = {
    **_DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_SCALED = replace(_ATTENTION, scale=to_power("query_pre_attn_scalar", -0.5))
_CAPPED = replace(_SCALED, softcap=key("attn_logit_softcapping", None))
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    checkpoints={"Gemma 2 2B": 2.61, "Gemma 2 9B": 9.24, "Gemma 2 27B": 27.2},
    notes="",
    defaults=_DEFAULTS_2,
    unread=("hidden_act", "cache_implementation"),
    layer=Layer(
        mixer=_CAPPED,
        feed_forward=replace(GATED, activation=activation("hidden_activation")),
        input_norm=_NORM,
        ff_norm=_NORM,
        mixer_output_norm=_NORM,
        ff_output_norm=_NORM,
    ),
    mixers={FULL: _CAPPED, SLIDING: replace(_CAPPED, window=window())},
    mixer_kinds=listed(otherwise=every(2, FULL, SLIDING)),
    head=Head(tied=flag("tie_word_embeddings"), softcap=key("final_logit_softcapping", None)),
    names=TensorNames(ff_norm="pre_feedforward_layernorm"),
)

_NORMED = replace(_SCALED, qk_norm=QKNorm(_NORM))
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    checkpoints={"Gemma 3 270M": 0.268, "Gemma 3 1B": 1.0},
    defaults={
        **_DEFAULTS_2,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "sliding_window_pattern": 6,
    },
    layer=replace(GEMMA2.layer, mixer=_NORMED),
    mixers={FULL: _NORMED, SLIDING: replace(_NORMED, window=window(), rope=1)},
    mixer_kinds=listed(otherwise=every("sliding_window_pattern", FULL, SLIDING)),
    rotaries=(
        Rotary(layer_type=FULL, default_theta=1_000_000.0),
        Rotary(layer_type=SLIDING, theta="rope_local_base_freq", scaled=False),
    ),
)

FAMILIES = (GEMMA, GEMMA2, GEMMA3)
