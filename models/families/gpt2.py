"""GPT-2 and what took its names: learned positions, layer norms, a feed-forward without a gate."""

from msgspec.structs import replace

from graphgen.models.families.family import ATTENTION, LAYER_NORM, PLAIN, Family, TensorNames
from graphgen.models.families.words import OFF, activation, four_times, key, repeated, unless
from graphgen.models.spec import NO_ROPE, Embedding, Layer

NORM = replace(LAYER_NORM, eps=key("layer_norm_epsilon"))
ATTENTION_WITH_BIASES = replace(
    ATTENTION,
    num_kv_heads=key("num_attention_heads"),
    qkv_bias=True,
    o_bias=True,
    scale=unless("scale_attn_weights", 1.0),
)
LAYER = Layer(
    mixer=ATTENTION_WITH_BIASES,
    feed_forward=replace(
        PLAIN, size=key("n_inner", four_times("hidden_size")), activation=activation("activation_function")
    ),
    input_norm=NORM,
    ff_norm=NORM,
)
NAMES = TensorNames(
    embedding="transformer.wte.weight",
    positions="transformer.wpe.weight",
    final_norm="transformer.ln_f",
    layer="transformer.h.{layer}.",
    input_norm="ln_1",
    ff_norm="ln_2",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
)
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
WITHOUT_PREFIX = tuple((name, f"transformer.{name}") for name in ("h.", "wte.", "wpe.", "ln_f."))
"""The hub's own files lack it."""

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    checkpoints={"distilgpt2": 0.082, "GPT-2": 0.124, "GPT-2 XL": 1.56},
    notes="also DialoGPT; files with and without the prefix `transformer.`",
    defaults=DEFAULTS,
    aliases=ALIASES,
    only={"scale_attn_by_inverse_layer_idx": OFF, "add_cross_attention": OFF},
    unread=("reorder_and_upcast_attn", "n_ctx"),
    layer=LAYER,
    rotaries=(NO_ROPE,),
    embedding=Embedding(num_positions=key("max_position_embeddings")),
    final_norm=NORM,
    names=replace(NAMES, transposed=True),
    renames=WITHOUT_PREFIX,
    ignored=("*.attn.bias", "*.attn.masked_bias"),
)

_BIGCODE = replace(
    GPT2,
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    checkpoints={"SantaCoder": 1.1, "StarCoder": 15.5, "Granite Code 20B": 20.1},
    notes="",
    defaults={**DEFAULTS, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
    unread=(
        *("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "num_key_value_heads", "n_ctx"),
        *("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache"),
        "validate_runner_input",
    ),
    only={"add_cross_attention": OFF},
    names=NAMES,
)
BIGCODE = (
    replace(
        _BIGCODE,
        variant="multi-query",
        when={"multi_query": (True,)},
        layer=replace(LAYER, mixer=replace(ATTENTION_WITH_BIASES, num_kv_heads=1)),
    ),
    replace(
        _BIGCODE,
        variant="multi-head",
        when={"multi_query": (False,)},
        checkpoints={},
        names=replace(NAMES, qkv_order="groups"),
    ),
)

_NEO_ATTENTION = replace(ATTENTION, num_kv_heads=key("num_attention_heads"), o_bias=True, scale=1.0)
GPT_NEO = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    checkpoints={"GPT-Neo 125M": 0.125, "GPT-Neo 1.3B": 1.32, "GPT-Neo 2.7B": 2.65},
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "window_size": 256,
    },
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    unread=("attention_layers",),
    layer=replace(
        LAYER,
        mixer=_NEO_ATTENTION,
        feed_forward=replace(LAYER.feed_forward, size=key("intermediate_size", four_times("hidden_size"))),
    ),
    mixers={"global": _NEO_ATTENTION, "local": replace(_NEO_ATTENTION, window=key("window_size"))},
    mixer_kinds=repeated("attention_types", otherwise=((("global", "local"), 12),)),
    rotaries=(NO_ROPE,),
    embedding=Embedding(num_positions=key("max_position_embeddings")),
    final_norm=NORM,
    names=replace(
        NAMES,
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        o="attn.attention.out_proj",
    ),
    renames=WITHOUT_PREFIX,
    ignored=("*.attn.attention.bias", "*.attn.attention.masked_bias"),
)

FAMILIES = (GPT2, *BIGCODE, GPT_NEO)
