"""GPT-NeoX, GPT-J, CodeGen and Phi: both blocks read the layer's input, and part of each head rotates."""

from msgspec.structs import replace

from graphgen.models.families import gpt2
from graphgen.models.families.family import ATTENTION, LAYER_NORM, PLAIN, Family, Rotary, TensorNames
from graphgen.models.families.words import flag, key, only_if
from graphgen.models.spec import Head, Layer, QKNorm

_TIED = flag("tie_word_embeddings")

_NEOX_BIAS = flag("attention_bias", True)
NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    checkpoints={"Pythia 70M": 0.07, "Pythia 1B": 1.01, "Pythia 12B": 11.8, "GPT-NeoX 20B": 20.6},
    notes="also Dolly 2, RedPajama-INCITE",
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "use_parallel_residual": True,
    },
    layer=Layer(
        mixer=replace(ATTENTION, num_kv_heads=key("num_attention_heads"), qkv_bias=_NEOX_BIAS, o_bias=_NEOX_BIAS),
        feed_forward=PLAIN,
        input_norm=LAYER_NORM,
        ff_norm=LAYER_NORM,
        parallel=flag("use_parallel_residual", True),
    ),
    rotaries=(Rotary(partial=True, default_share=0.25, share="rotary_pct", theta="rotary_emb_base"),),
    final_norm=LAYER_NORM,
    names=TensorNames(
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        final_norm="gpt_neox.final_layer_norm",
        layer="gpt_neox.layers.{layer}.",
        qkv=("attention.query_key_value",),
        qkv_order="groups",
        o="attention.dense",
        gate_up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
    ),
    renames=(("lm_head.", "embed_out."),),
    ignored=("*.attention.bias", "*.attention.masked_bias"),
)

_GPTJ_NAMES = replace(
    gpt2.NAMES,
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    o="attn.out_proj",
    gate_up=("mlp.fc_in",),
    down="mlp.fc_out",
)
GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    checkpoints={"GPT-J 6B": 6.05},
    defaults={
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    aliases=gpt2.ALIASES,
    unread=("n_ctx", "rotary"),
    layer=Layer(
        mixer=replace(ATTENTION, num_kv_heads=key("num_attention_heads")),
        feed_forward=gpt2.LAYER.feed_forward,
        input_norm=gpt2.NORM,
        ff_norm=None,
        parallel=True,
        shared_norm=True,
    ),
    rotaries=(Rotary(partial=True, interleaved=True, dim="rotary_dim"),),
    final_norm=gpt2.NORM,
    head=Head(tied=_TIED, bias=True),
    names=_GPTJ_NAMES,
    ignored=("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions"),
)
CODEGEN = replace(
    GPTJ,
    model_type="codegen",
    architecture="CodeGenForCausalLM",
    checkpoints={"CodeGen 350M": 0.357, "CodeGen 2B": 2.78, "CodeGen 16B": 16.0},
    defaults={**GPTJ.defaults, "n_ctx": 2048},
    names=replace(_GPTJ_NAMES, qkv=("attn.qkv_proj",), qkv_order="mesh"),
)

_PHI_NORM = only_if("qk_layernorm", QKNorm(LAYER_NORM))
PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    checkpoints={"Phi-1.5": 1.42, "Phi-2": 2.78},
    defaults={
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    layer=Layer(
        mixer=replace(ATTENTION, qkv_bias=True, o_bias=True, qk_norm=_PHI_NORM),
        feed_forward=PLAIN,
        input_norm=LAYER_NORM,
        ff_norm=None,
        parallel=True,
        shared_norm=True,
    ),
    rotaries=(Rotary(partial=True, default_share=0.5),),
    final_norm=LAYER_NORM,
    head=Head(tied=_TIED, bias=True),
    names=TensorNames(
        final_norm="model.final_layernorm",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        o="self_attn.dense",
        gate_up=("mlp.fc1",),
        down="mlp.fc2",
    ),
)

FAMILIES = (NEOX, GPTJ, CODEGEN, PHI)
