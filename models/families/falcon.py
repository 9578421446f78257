"""Falcon: both blocks read the layer's input, which has a norm for each in the newer ones."""

from msgspec.structs import replace

from graphgen.models.families.family import ATTENTION, PLAIN, Family, Rotary, TensorNames
from graphgen.models.families.gpt2 import NORM
from graphgen.models.families.words import activation, choose, flag, four_times, key, none_if, only_if
from graphgen.models.spec import NO_ROPE, Alibi, Layer

_BIAS = flag("bias")
_ATTENTION = replace(
    ATTENTION,
    num_kv_heads=key("num_kv_heads", key("num_attention_heads")),
    qkv_bias=_BIAS,
    o_bias=_BIAS,
    rope=choose("alibi", 1, 0),
    alibi=only_if("alibi", Alibi(scaled=True)),
)
_FEED_FORWARD = replace(
    PLAIN, size=key("ffn_hidden_size", four_times("hidden_size")), activation=activation("activation"), bias=_BIAS
)
_NAMES = TensorNames(
    embedding="transformer.word_embeddings.weight",
    final_norm="transformer.ln_f",
    layer="transformer.h.{layer}.",
    input_norm="input_layernorm",
    qkv=("self_attention.query_key_value",),
    qkv_order="groups",
    o="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
_SHARED = Layer(
    mixer=_ATTENTION, feed_forward=_FEED_FORWARD, input_norm=NORM, ff_norm=None, parallel=True, shared_norm=True
)
_PARALLEL = flag("parallel_attn", True)
_EITHER = replace(_SHARED, parallel=_PARALLEL, shared_norm=_PARALLEL, ff_norm=none_if("parallel_attn", NORM))

FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    variant="two norms",
    when={"new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (None, 2)},
    checkpoints={"Falcon 40B": 41.3, "Falcon 180B": 180.0},
    defaults={
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "max_position_embeddings": 2048,
        "activation": "gelu",
        "tie_word_embeddings": True,
        "bos_token_id": 11,
        "eos_token_id": 11,
    },
    only={"parallel_attn": (True,)},
    unread=("rope_parameters", "rope_scaling", "rope_theta"),  # where the scores know distances instead
    layer=replace(_SHARED, ff_norm=NORM, shared_norm=False),
    rotaries=(Rotary(), NO_ROPE),
    final_norm=NORM,
    names=replace(_NAMES, input_norm="ln_attn", ff_norm="ln_mlp"),
)
FALCON_ONE_NORM = replace(
    FALCON,
    variant="one norm",
    when={"new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (1,)},
    checkpoints={"Falcon 2 11B": 11.1},
    layer=_SHARED,
    names=_NAMES,
)
FALCON_7B = replace(
    FALCON,
    variant="multi-query",
    when={"new_decoder_architecture": (False, None), "multi_query": (True,)},
    checkpoints={"Falcon 7B": 7.22},
    only={},
    unread=("num_kv_heads", *FALCON.unread),
    layer=replace(_EITHER, mixer=replace(_ATTENTION, num_kv_heads=1)),
    names=replace(_NAMES, qkv_order="blocks"),
)
FALCON_RW = replace(
    FALCON_7B,
    variant="multi-head",
    when={"new_decoder_architecture": (False, None), "multi_query": (False,)},
    checkpoints={"Falcon-RW 1B": 1.31, "Falcon-RW 7B": 7.54},
    layer=replace(_EITHER, mixer=replace(_ATTENTION, num_kv_heads=key("num_attention_heads"))),
    names=_NAMES,
)

FAMILIES = (FALCON, FALCON_ONE_NORM, FALCON_7B, FALCON_RW)
