"""What a row of the table of families says.

A family is a template of a ModelSpec: the Structs of spec/ with a word of words.py wherever the config decides. Never
reads a file and holds no family, but what many of them have in common. Called by the families' own modules, and by
reader.py, which fills the templates in.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from msgspec import Struct

from graphgen.models.families.words import Kinds, activation, flag, head_dim, key, uniform
from graphgen.models.spec import GQA, Dense, Embedding, FeedForward, Head, Layer, Mixer, Norm, QKNorm, RopeSpec

# --- where a checkpoint keeps its tensors ----------------------------------------------------------------------


class ExpertNames(Struct, frozen=True):
    """The same of a mixture of experts, relative to the layer. `{expert}` is the expert's number, where each has a
    tensor of its own; else all are stacked in one."""

    router: str = "mlp.gate.weight"
    router_bias: str = "mlp.router.bias"
    correction: str = "mlp.gate.e_score_correction_bias"
    gate_up: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight")
    gate_up_bias: str = "mlp.experts.gate_up_proj_bias"
    down: str = "mlp.experts.{expert}.down_proj.weight"
    down_bias: str = "mlp.experts.down_proj_bias"
    # Those from here on lack their ".weight" or ".bias".
    shared_gate_up: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"
    # How they lie.
    transposed: bool = False  # matrices of experts are [in, out]
    alternating: bool = False  # rows of gate and up alternate


class LatentNames(Struct, frozen=True):
    """The same of latent attention, without ".weight" or ".bias"."""

    q: str = "self_attn.q_proj"  # where there is no q_down
    q_down: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm"
    q_up: str = "self_attn.q_b_proj"
    kv_down: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm"
    kv_up: str = "self_attn.kv_b_proj"  # rows of each head in turn: of its key, of its value


class TensorNames(Struct, frozen=True):
    """Where a family's checkpoints keep their tensors, and how those lie. `{layer}` is the layer's number."""

    embedding: str = "model.embed_tokens.weight"
    positions: str = "model.embed_positions.weight"
    project_in: str = "model.project_in.weight"
    project_out: str = "model.project_out.weight"
    head: str = "lm_head.weight"
    head_bias: str = "lm_head.bias"
    layer: str = "model.layers.{layer}."
    # Those from here on lack their ".weight" or ".bias".
    embedding_norm: str = "model.embed_norm"
    final_norm: str = "model.norm"
    # The rest is relative to `layer`.
    input_norm: str = "input_layernorm"
    mixer_output_norm: str = "post_attention_layernorm"
    ff_norm: str = "post_attention_layernorm"
    ff_output_norm: str = "post_feedforward_layernorm"
    output_norm: str = "final_layer_norm"
    q_norm: str = "self_attn.q_norm"  # `{head}` is the head's number, where each head has a tensor of its own
    k_norm: str = "self_attn.k_norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # or one tensor of all three
    o: str = "self_attn.o_proj"
    sinks: str = "self_attn.sinks"  # whole
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # or one tensor of both; of a plain one its only
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    latent: LatentNames = LatentNames()
    experts: ExpertNames = ExpertNames()
    # How they lie.
    qkv_order: Literal["blocks", "groups", "mesh"] = "blocks"
    """Rows of a fused tensor. blocks: all q, all k, all v. groups: of each KV head in turn its q, k and v.
    mesh: four blocks, of q, v and k each."""
    transposed: bool = False  # matrices of a layer are [in, out]


class Rotary(Struct, frozen=True, kw_only=True):
    """Where a family's configs say how positions rotate, and what they mean where they do not say it."""

    interleaved: Any = False  # or a word
    partial: bool = False  # a share of each head may turn
    default_theta: float = 10_000.0
    default_share: Any = 1.0  # a number or a word
    theta: str = "rope_theta"  # key of the base, where it stands beside the dictionary
    share: str = "partial_rotary_factor"  # key of the share, where it stands beside the dictionary
    dim: str | None = None  # key of the number of dimensions that turn, where that is said instead
    layer_type: str | None = None  # whose entry to take, where the dictionary has one for each type of layer
    mscales: bool = False  # of longrope: the keys short_mscale and long_mscale say what scales cos and sin
    beta: str | None = None  # key in the dictionary of the queries' Temperature, whose length is the original one
    alpha: bool = False  # `alpha` of the kind "dynamic" stretches the base once for all lengths
    scales_scores: bool = False  # `mscale_all_dim` of yarn scales scores: RopeSpec.score_factor
    scaled: bool = True  # False: rope_scaling is of the other layers
    kinds: Mapping[str, str] = MappingProxyType({})  # names of kinds that mean another here


# --- a row of the table ----------------------------------------------------------------------------------------

ALWAYS_IGNORED = ("*.rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from the config."""


class Family(Struct, frozen=True, kw_only=True):
    """What one architecture is, as a template; rows for the variants of one name differ in `when`."""

    model_type: str
    architecture: str
    variant: str = ""  # tells the rows of one architecture apart
    when: Mapping[str, tuple[Any, ...]] = MappingProxyType({})  # path -> values for which it is the one
    checkpoints: Mapping[str, float]  # for people: some that are meant, and their weights in billions
    notes: str = ""  # for people: what else is meant, what is not supported
    defaults: Mapping[str, Any]  # what transformers takes for a key that a file leaves out
    aliases: Mapping[str, str] = MappingProxyType({})  # common name of a key -> the family's, as transformers' own map
    only: Mapping[str, tuple[Any, ...]] = MappingProxyType(
        {}
    )  # key -> the values graphgen computes; others are refused

    unread: tuple[str, ...] = ()  # keys from which no arithmetic of this family follows

    layer: Layer  # the mixer and the feed-forward of most layers among it
    mixers: Mapping[str, Mixer] = MappingProxyType({})  # by kind, where layers differ
    mixer_kinds: Kinds = uniform()
    feed_forwards: Mapping[str, FeedForward] = MappingProxyType({})
    feed_forward_kinds: Kinds | None = None
    rotaries: tuple[Rotary | RopeSpec, ...] = (Rotary(),)  # GQA.rope counts them; NO_ROPE where nothing turns
    embedding: Embedding = Embedding()
    final_norm: Norm | None
    head: Head = Head(tied=flag("tie_word_embeddings"))
    max_positions: Any = key("max_position_embeddings")
    initializer_std: Any = key("initializer_range")
    float16: bool = True
    needs_bos: bool = False  # what it says of a text without a beginning-of-sequence token is of no use
    dequantised: tuple[str, ...] = ()  # methods of a quantization_config that checkpoint.py undoes

    nested: str | None = None  # key of the text model's config, where a checkpoint has more than that
    beside: Mapping[str, Any] = MappingProxyType({})  # defaults of keys that stand beside it and hold for it
    names: TensorNames = TensorNames()
    renames: tuple[tuple[str, str], ...] = ()  # (beginning of a stored name, what stands for it), the first that fits
    ignored: tuple[str, ...] = ()  # patterns of stored names that follow from the config

    @property
    def name(self) -> str:
        """Its key in the table."""
        return f"{self.architecture} {self.variant}".rstrip()

    def stored_name(self, name: str) -> str:
        """A tensor's name as `names` has it: checkpoints of one family differ in what names begin with."""
        for beginning, stands_for in self.renames:
            if name.startswith(beginning):
                return stands_for + name.removeprefix(beginning)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor of that name follows from the config."""
        return any(fnmatchcase(name, pattern) for pattern in (*ALWAYS_IGNORED, *self.ignored))


# --- what many families have in common -------------------------------------------------------------------------

RMS = Norm(eps=key("rms_norm_eps"))
RMS_WIDE = Norm(eps=key("rms_norm_eps"), round_first=False)
"""Times its weight in float32."""
LAYER_NORM = Norm("layer", eps=key("layer_norm_eps"), bias=True)
HEAD_NORM = QKNorm(RMS)

ATTENTION = GQA(
    num_heads=key("num_attention_heads"),
    num_kv_heads=key("num_key_value_heads", key("num_attention_heads")),
    head_dim=head_dim(),
)
GATED = Dense(size=key("intermediate_size"), activation=activation())
PLAIN = Dense(size=key("intermediate_size"), activation=activation(), gated=False, bias=True)
