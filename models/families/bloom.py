"""BLOOM and MPT: positions are known by how far away they are, each head caring in its own measure."""

from msgspec.structs import replace

from graphgen.models.families.family import ATTENTION, PLAIN, Family, TensorNames
from graphgen.models.families.gpt2 import NORM
from graphgen.models.families.words import OFF, flag, four_times, key, within
from graphgen.models.spec import NO_ROPE, Alibi, Embedding, Layer

_DEFAULTS = {"layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True}
_HEADS = key("num_attention_heads")

BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    checkpoints={"BLOOM 560M": 0.559, "BLOOM 7.1B": 7.07, "BLOOM 176B": 176.0},
    notes="also BLOOMZ; files with and without the prefix `transformer.`; served up to `seq_length`",
    defaults={
        **_DEFAULTS,
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "apply_residual_connection_post_layernorm": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    aliases={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "n_embed": "hidden_size"},
    unread=(
        "slow_but_exact",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "attention_softmax_in_fp32",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "offset_alibi",
        "n_inner",
        "max_position_embeddings",
    ),
    layer=Layer(
        mixer=replace(ATTENTION, num_kv_heads=_HEADS, qkv_bias=True, o_bias=True, alibi=Alibi()),
        feed_forward=replace(PLAIN, size=four_times("hidden_size"), activation="gelu_tanh"),
        input_norm=NORM,
        ff_norm=NORM,
        residual_from_norm=flag("apply_residual_connection_post_layernorm"),
    ),
    rotaries=(NO_ROPE,),
    embedding=Embedding(norm=NORM),
    final_norm=NORM,
    max_positions=key("seq_length", 2048),
    names=TensorNames(
        embedding="transformer.word_embeddings.weight",
        embedding_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        layer="transformer.h.{layer}.",
        qkv=("self_attention.query_key_value",),
        qkv_order="groups",
        o="self_attention.dense",
        gate_up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
    ),
    renames=tuple((name, f"transformer.{name}") for name in ("h.", "word_embeddings", "ln_f.")),
)

_BARE = replace(NORM, bias=False)
MPT = Family(
    model_type="mpt",
    architecture="MptForCausalLM",
    checkpoints={"MPT 7B": 6.65, "MPT 30B": 30.0},
    notes="Hugging Face's class; files that name MPTForCausalLM must name this one",
    defaults={
        **_DEFAULTS,
        "vocab_size": 50368,
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
    },
    aliases={"num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers"},
    only={
        "expansion_ratio": (4,),
        "no_bias": (True,),
        "norm_type": ("low_precision_layernorm", "layernorm"),
        "logit_scale": OFF,
        "attn_config.alibi": (True,),
        "attn_config.alibi_bias_max": (8,),
        "attn_config.qk_ln": OFF,
        "attn_config.prefix_lm": OFF,
        "attn_config.attn_uses_sequence_id": OFF,
        "attn_config.attn_type": ("multihead_attention",),
    },
    unread=(
        "learned_pos_emb",
        "embedding_fraction",
        "init_device",
        "init_config",
        "verbose",
        "max_position_embeddings",
    ),
    layer=Layer(
        mixer=replace(
            ATTENTION,
            num_kv_heads=_HEADS,
            clip=within("attn_config", key("clip_qkv", None)),
            scale=within("attn_config", key("softmax_scale", None)),
            alibi=Alibi(),
        ),
        feed_forward=replace(PLAIN, size=four_times("hidden_size"), activation="gelu", bias=False),
        input_norm=_BARE,
        ff_norm=_BARE,
    ),
    rotaries=(NO_ROPE,),
    final_norm=_BARE,
    max_positions=key("max_seq_len"),
    names=TensorNames(
        embedding="transformer.wte.weight",
        final_norm="transformer.norm_f",
        layer="transformer.blocks.{layer}.",
        input_norm="norm_1",
        ff_norm="norm_2",
        qkv=("attn.Wqkv",),
        o="attn.out_proj",
        gate_up=("ffn.up_proj",),
        down="ffn.down_proj",
    ),
)

FAMILIES = (BLOOM, MPT)
