"""StarCoder2, StableLM, Nemotron and Cohere: Llama's blocks between layer norms."""

from msgspec.structs import replace

from graphgen.models.families import llama
from graphgen.models.families.family import ATTENTION, GATED, LAYER_NORM, PLAIN, Family, Rotary, TensorNames
from graphgen.models.families.words import (
    FULL,
    SLIDING,
    choose,
    every,
    flag,
    key,
    listed,
    none_if,
    only_if,
    uniform,
    window,
)
from graphgen.models.spec import NO_ROPE, Head, Layer, Norm, QKNorm

_BIAS = flag("use_bias", True)
_NORM = replace(LAYER_NORM, eps=key("norm_epsilon"))
STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    checkpoints={"StarCoder2 3B": 3.03, "StarCoder2 7B": 7.17, "StarCoder2 15B": 16.0},
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    layer=Layer(
        mixer=replace(ATTENTION, qkv_bias=_BIAS, o_bias=_BIAS, window=window()),
        feed_forward=replace(PLAIN, bias=_BIAS),
        input_norm=_NORM,
        ff_norm=_NORM,
    ),
    mixer_kinds=uniform("sliding_window"),
    final_norm=_NORM,
    names=TensorNames(gate_up=("mlp.c_fc",), down="mlp.c_proj"),
)

_HEAD_NORMS = only_if("qk_layernorm", QKNorm(replace(LAYER_NORM, bias=False), "own_head"))
STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    checkpoints={"StableLM 2 1.6B": 1.64, "StableLM 3B": 2.8, "StableLM 2 12B": 12.1},
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    layer=Layer(
        mixer=replace(ATTENTION, qkv_bias=flag("use_qkv_bias"), qk_norm=_HEAD_NORMS),
        feed_forward=GATED,
        input_norm=LAYER_NORM,
        ff_norm=none_if("use_parallel_residual", LAYER_NORM),
        parallel=flag("use_parallel_residual"),
        shared_norm=flag("use_parallel_residual"),
    ),
    rotaries=(Rotary(partial=True, default_share=0.25),),
    final_norm=LAYER_NORM,
    names=TensorNames(q_norm="self_attn.q_layernorm.norms.{head}", k_norm="self_attn.k_layernorm.norms.{head}"),
)

_PLUS_ONE = Norm("layer", eps=key("norm_eps"), bias=True, plus_one=True)
NEMOTRON = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    checkpoints={"Minitron 4B": 4.19, "Minitron 8B": 8.27, "Nemotron-4 15B": 15.6},
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_attention_heads": 48,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "initializer_range": 0.0134,
        "norm_eps": 1e-5,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    layer=Layer(
        mixer=replace(ATTENTION, qkv_bias=flag("attention_bias"), o_bias=flag("attention_bias")),
        feed_forward=replace(PLAIN, bias=flag("mlp_bias")),
        input_norm=_PLUS_ONE,
        ff_norm=_PLUS_ONE,
    ),
    rotaries=(Rotary(partial=True, default_share=0.5),),
    final_norm=_PLUS_ONE,
    names=TensorNames(gate_up=("mlp.up_proj",)),
)

_BARE = replace(LAYER_NORM, bias=False)
COHERE = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    checkpoints={"Aya 23 8B": 8.03, "Command-R 35B": 35.0, "Command-R+ 104B": 104.0},
    defaults={
        **llama.DEFAULTS,
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
        "bos_token_id": 5,
        "eos_token_id": 255001,
    },
    layer=Layer(
        mixer=replace(
            ATTENTION,
            qkv_bias=flag("attention_bias"),
            o_bias=flag("attention_bias"),
            qk_norm=only_if("use_qk_norm", QKNorm(_BARE, "own_head")),
        ),
        feed_forward=GATED,
        input_norm=_BARE,
        ff_norm=None,
        parallel=True,
        shared_norm=True,
    ),
    rotaries=(Rotary(interleaved=True, default_theta=500_000.0),),
    final_norm=_BARE,
    head=Head(tied=flag("tie_word_embeddings"), scale=key("logit_scale", 1.0, float)),
)

_ATTENTION = replace(ATTENTION, qkv_bias=flag("attention_bias"), o_bias=flag("attention_bias"))
COHERE2 = replace(
    COHERE,
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    checkpoints={"Command R7B": 8.03, "Command-A 111B": 111.0},
    notes="rotates in the layers with a window alone",
    defaults={**COHERE.defaults, "sliding_window": 4096, "sliding_window_pattern": 4},
    layer=replace(COHERE.layer, mixer=_ATTENTION),
    mixers={
        FULL: replace(_ATTENTION, rope=1),
        SLIDING: replace(_ATTENTION, window=window(), rope=choose("sliding_window", 0, 1)),
    },
    mixer_kinds=listed(otherwise=every("sliding_window_pattern", FULL, SLIDING)),
    rotaries=(Rotary(interleaved=True), NO_ROPE),
)

FAMILIES = (STARCODER2, STABLELM, NEMOTRON, COHERE, COHERE2)
