"""OLMo 1 to 3 and EXAONE 4: from OLMo 2 on the norms stand behind the blocks alone."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, GATED, HEAD_NORM, RMS, RMS_WIDE, Family, Rotary
from graphgen.models.families.words import FULL, SLIDING, choose, every, flag, key, listed, window
from graphgen.models.spec import NO_ROPE, Layer, Norm, QKNorm

_BIAS = flag("attention_bias")
_DEFAULTS = {**llama.DEFAULTS, "vocab_size": 50304, "bos_token_id": None, "eos_token_id": 50279}
_BARE_NORM = Norm("layer", eps=1e-5, weight=False)

OLMO = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    checkpoints={"OLMo 1B": 1.18, "OLMo 7B": 6.89},
    defaults=_DEFAULTS,
    layer=Layer(
        mixer=replace(ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS, clip=key("clip_qkv", None)),
        feed_forward=GATED,
        input_norm=_BARE_NORM,
        ff_norm=_BARE_NORM,
    ),
    final_norm=_BARE_NORM,
)

_ATTENTION = replace(ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS, qk_norm=QKNorm(RMS_WIDE, "all_heads"))
OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    checkpoints={"OLMo 2 1B": 1.48, "OLMo 2 7B": 7.3, "OLMo 2 32B": 32.2},
    defaults={**_DEFAULTS, "rms_norm_eps": 1e-5},
    layer=Layer(
        mixer=_ATTENTION,
        feed_forward=GATED,
        input_norm=None,
        ff_norm=None,
        mixer_output_norm=RMS_WIDE,
        ff_output_norm=RMS_WIDE,
    ),
    final_norm=RMS_WIDE,
)

_FULL_ROPE = Rotary(layer_type=FULL, default_theta=500_000.0)
OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    checkpoints={"OLMo 3 7B": 7.3, "OLMo 3 32B": 32.2},
    defaults={**OLMO2.defaults, "sliding_window": 4096},
    mixers={FULL: _ATTENTION, SLIDING: replace(_ATTENTION, window=window(), rope=1)},
    mixer_kinds=listed(otherwise=every(4, FULL, SLIDING)),
    rotaries=(_FULL_ROPE, replace(_FULL_ROPE, layer_type=SLIDING, scaled=False)),
)

_EXAONE = replace(ATTENTION, qk_norm=HEAD_NORM)
EXAONE4 = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    checkpoints={"EXAONE 4.0 1.2B": 1.28, "EXAONE 4.0 32B": 32.0},
    notes="rotates in the layers with a window alone, where there are such",
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 102400,
        "intermediate_size": 16384,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "bos_token_id": 0,
    },
    layer=Layer(
        mixer=_EXAONE,
        feed_forward=GATED,
        input_norm=None,
        ff_norm=None,
        mixer_output_norm=RMS,
        ff_output_norm=RMS,
    ),
    mixers={FULL: replace(_EXAONE, rope=choose("sliding_window", 1, 0)), SLIDING: replace(_EXAONE, window=window())},
    mixer_kinds=listed(otherwise=every("sliding_window_pattern", FULL, SLIDING)),
    rotaries=(Rotary(), NO_ROPE),
    final_norm=RMS,
)

FAMILIES = (OLMO, OLMO2, OLMO3, EXAONE4)
