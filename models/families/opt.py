"""OPT: learned positions that begin at row 2; the 350M has its norms on the stream and a narrow embedding."""

from msgspec.structs import replace

from graphgen.models.families.family import ATTENTION, PLAIN, Family, TensorNames
from graphgen.models.families.words import activation, flag, key, none_if
from graphgen.models.spec import NO_ROPE, Embedding, Layer, Norm

_AFFINE, _BIAS = flag("layer_norm_elementwise_affine", True), flag("enable_bias", True)
_NORM = Norm("layer", eps=1e-5, weight=_AFFINE, bias=_AFFINE)
_ATTENTION = replace(ATTENTION, num_kv_heads=key("num_attention_heads"), qkv_bias=_BIAS, o_bias=_BIAS)
_FEED_FORWARD = replace(PLAIN, size=key("ffn_dim"), activation=activation("activation_function"), bias=_BIAS)
_NAMES = TensorNames(
    embedding="model.decoder.embed_tokens.weight",
    positions="model.decoder.embed_positions.weight",
    project_in="model.decoder.project_in.weight",
    project_out="model.decoder.project_out.weight",
    final_norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{layer}.",
    input_norm="self_attn_layer_norm",
    ff_norm="final_layer_norm",
    o="self_attn.out_proj",
    gate_up=("fc1",),
    down="fc2",
)

OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    checkpoints={"OPT 125M": 0.125, "OPT 1.3B": 1.32, "OPT 6.7B": 6.66, "OPT 66B": 65.7},
    notes="also Galactica; convert those that have pytorch_model.bin alone",
    when={"do_layer_norm_before": (True,)},
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "init_std": 0.02,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    layer=Layer(mixer=_ATTENTION, feed_forward=_FEED_FORWARD, input_norm=_NORM, ff_norm=_NORM),
    rotaries=(NO_ROPE,),
    embedding=Embedding(
        size=key("word_embed_proj_dim", key("hidden_size")),
        num_positions=key("max_position_embeddings"),
        position_offset=2,
    ),
    final_norm=none_if("_remove_final_layer_norm", _NORM),
    initializer_std=key("init_std"),
    names=_NAMES,
    renames=(("decoder.", "model.decoder."),),
)
OPT_350M = replace(
    OPT,
    variant="post-norm",
    when={"do_layer_norm_before": (False,)},
    checkpoints={"OPT 350M": 0.331},
    notes="",
    layer=Layer(
        mixer=_ATTENTION,
        feed_forward=_FEED_FORWARD,
        input_norm=None,
        ff_norm=_NORM,
        residual_from_norm=True,
        output_norm=_NORM,
    ),
    final_norm=None,
    names=replace(_NAMES, ff_norm="self_attn_layer_norm", output_norm="final_layer_norm"),
)

FAMILIES = (OPT, OPT_350M)
