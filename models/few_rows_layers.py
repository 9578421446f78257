"""Which models the kernels of few_rows.py compute: those made of the parts that are written here, and no others.

A part is compared with one that has its values in the fields listed here and its defaults in all others. A trait that
layers learn is therefore left to the compiled layers, which are slower but right, until the kernels have it and it is
written here.

Needs no Triton and no GPU. Called by the decoder when it is built, and by few_rows_step.py.
"""

from collections.abc import Iterable

import msgspec
import torch

from graphgen.models.formats import as_they_lie
from graphgen.models.spec import GQA, Dense, Embedding, Experts, Head, Latent, Layer, ModelSpec, Norm, QKNorm, Router
from graphgen.models.spec.formats import PACKED_BLOCK, LinearFormat

MOST_ROWS = 64
"""With more rows a product is no longer a matter of reading weights, and cuBLAS is faster."""
MOST_ROWS_OF_E4M3 = 8
"""The same where the compiled layers multiply in e4m3 with the codes as they lie. Of Llama-3.1-8B on an H200, fp8: a
step of 4, 8 and 16 rows takes 3.0, 3.2 and 4.1 ms in the kernels, and in the compiled layers one of 8, 16 and 32 rows
3.2, 3.5 and 3.9."""
MOST_ROWS_OF_INT4 = 1
"""The same of int4: one, 2, 4 and 8 rows take 1.6, 3.4, 3.4 and 3.6 ms in the kernels, and in the compiled layers 2, 4
and 8 rows 2.7, 2.8 and 3.0. Only of one row are the sums made of integers. Experts, which have no product of few rows
with the codes as they lie, are not meant."""
MOST_ROWS_OF_MADE = 16
"""The same where they first make another weight of it (see formats/as_they_lie.py), or where the device is not the one
that their products of few rows are cut for. And of ranks, whose sums the kernels make themselves."""
MOST_ROWS_OF_EXPERTS = 4
"""A step of Qwen3-30B-A3B on an H200: 1, 2, 4 and 8 rows take 3.2, 3.6, 4.6 and 6.2 ms here, compiled 1 row takes 4.1
and 16 rows 5.4."""
MOST_SENT = 96
"""Parts of a row's sum that a rank sends to others. Of Llama-3.1-8B on four H200s a step of 32 rows takes 3.25 ms in
the kernels, one of 48 rows 4.06 and one of 64 rows 4.78; the compiled layers take 3.85 for 64 and 4.30 for 96."""
MOST_PAIRS = 64
"""Pairs of a row and one of its experts, of any number of experts."""
EXPERTS_OF_A_PAIR = 2
"""Experts that there are for each pair, at least: with fewer, several rows have the same, whose weights would be read
again; the tiles of the compiled layers read them once."""
MOST_EXPERTS = 512
"""Each program ranks them all."""

LEAST_DEPTH = 64
"""Columns of a weight that a kernel reads at a time, at least: a product's depth is a multiple of it."""
LEAST_COLUMNS = 32
"""Columns of the narrowest program: a product's width is a multiple of it."""
IN_KERNELS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
"""Activations that few_rows_kernels.gated has, and its numbers for them."""

_DTYPE = torch.bfloat16  # in float16 a norm's product would leave the range, since its division comes last

_HEADS = ("num_heads", "num_kv_heads", "head_dim", "padded_head_dim", "qkv_bias", "o_bias", "qk_norm")
_SCORES = ("scale", "rope", "window", "segment", "softcap", "alibi", "sinks")  # the attention kernel's concern alone
_LATENTS = (
    "num_heads",
    "latent_size",
    "plain_dim",
    "rope_dim",
    "value_dim",
    "q_rank",
    "bias",
    "norm",
    "rope",
    "window",
)
_LATENT_FORMATS = ("q_down_format", "q_up_format", "kv_down_format")
_ABOVE_O = {GQA: (*_HEADS, *_SCORES, "clip", "qkv_format"), Latent: (*_LATENTS, *_LATENT_FORMATS)}
"""Fields of the mixers behind which the kernels compute: these change nothing behind what the heads gathered, but for
the width of it and the output's bias."""
_OF_EXPERTS = ("num_experts", "top_k", "size", "activation", "bias", "limit", "up_plus_one", "shared", "shared_gate")
_FORMATS = ("gate_up_format", "down_format")
_ROUTER = ("score", "bias", "correction", "num_groups", "kept_groups", "group_score", "renormalise", "scale")


def serves_model(spec: ModelSpec, dtype: torch.dtype) -> bool:
    """Whether the kernels compute what comes before and behind the layers, and of each layer the second half at
    least."""
    return (
        dtype is _DTYPE
        and spec.embedding == Embedding()
        and spec.head == Head(tied=spec.head.tied)
        and _is_plain(spec.final_norm)
        and spec.vocab_size % LEAST_COLUMNS == 0
        and all(serves_feed_forward(layer, spec.hidden_size) for layer in spec.layers)
    )


def serves_rank(own: ModelSpec, dtype: torch.dtype, num_ranks: int) -> bool:
    """Whether the kernels compute what one of several ranks has of a model that they serve: `own`, see
    ModelSpec.shared_by. Experts' sums are not made over ranks within a kernel."""
    return (
        serves_model(own, dtype)
        and all(serves_mixer(layer, own.hidden_size) for layer in own.layers)
        and not any(isinstance(layer.feed_forward, Experts) for layer in own.layers)
        and -(-own.vocab_size // num_ranks) % LEAST_COLUMNS == 0
    )


def most_rows(spec: ModelSpec, num_ranks: int = 1, reads_codes: bool = True) -> int:
    """Decode rows up to which a model that is served runs in the kernels. reads_codes: the device has the products of
    the compiled layers that read codes as they lie."""
    all_experts = [layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Experts)]
    reads_codes, is_dense = reads_codes and num_ranks == 1, not all_experts
    in_e4m3 = [_most_rows_in_e4m3(form, reads_codes, is_dense) for form in spec.formats if form.rounds_input]
    sent = [MOST_SENT // (num_ranks - 1)] if num_ranks > 1 else []
    return min([MOST_ROWS, *sent, *in_e4m3, *(_most_rows(experts) for experts in all_experts)])


def _most_rows_in_e4m3(form: LinearFormat, reads_codes: bool, is_dense: bool) -> int:
    if not reads_codes or not as_they_lie.is_read(form):
        return MOST_ROWS_OF_MADE
    return MOST_ROWS_OF_INT4 if form.storage == "int4" and is_dense else MOST_ROWS_OF_E4M3


def _most_rows(experts: Experts) -> int:
    most_pairs = min(MOST_PAIRS, experts.num_experts // EXPERTS_OF_A_PAIR)
    return max(1, min(MOST_ROWS_OF_EXPERTS, most_pairs // experts.top_k))


def serves_mixer(layer: Layer, hidden_size: int) -> bool:
    """Whether the kernels compute the first half of a layer: its norm, and what its heads gather."""
    mixer = layer.mixer
    return (
        type(mixer) is GQA
        and _has_only(mixer, (*_HEADS, *_SCORES, "qkv_format", "o_format"))
        and reads(mixer.qkv_format, hidden_size)
        and _is_plain_around(layer)
        and _norms_heads_plainly(mixer)
        and hidden_size % LEAST_DEPTH == 0
        and (mixer.q_size + 2 * mixer.kv_size) % LEAST_COLUMNS == 0
    )


def serves_feed_forward(layer: Layer, hidden_size: int) -> bool:
    """Whether the kernels compute the second half of a layer: the output projection of its mixer and what follows."""
    mixer, feed_forward = layer.mixer, layer.feed_forward
    fields = _ABOVE_O.get(type(mixer))
    gathered = mixer.q_size if isinstance(mixer, GQA) else mixer.num_heads * mixer.value_dim
    return (
        fields is not None
        and _has_only(mixer, (*fields, "o_format"))
        and reads(mixer.o_format, gathered)
        and _is_plain_around(layer)
        and (
            _serves_experts(feed_forward, hidden_size)
            if isinstance(feed_forward, Experts)
            else _serves_dense(feed_forward)
            and reads(feed_forward.gate_up_format, hidden_size)
            and reads(feed_forward.down_format, feed_forward.size)
        )
        and hidden_size % LEAST_DEPTH == 0
        and gathered % LEAST_DEPTH == 0
    )


def reads_fitted(spec: ModelSpec, held: Iterable[tuple[LinearFormat | None, int]]) -> bool:
    """Whether the kernels read the formats that layers have otherwise than the spec says, since some rows and
    columns of a stored weight cannot keep its format (formats/fitting.py). held: format and K of every linear layer."""
    return all(form in spec.formats or reads(form, num_columns) for form, num_columns in held)


def reads(form: LinearFormat | None, num_columns: int) -> bool:
    """Whether the kernels read a weight of this format with so many columns."""
    if form is None:
        return True
    group = form.group or num_columns
    return (
        num_columns % PACKED_BLOCK == 0
        and (group in (32, 64) or group % PACKED_BLOCK == 0)
        and (form.storage == "int4" or not form.zeros)
    )


def _serves_dense(dense: Dense) -> bool:
    return (
        type(dense) is Dense
        and _has_only(dense, ("size", "activation", "bias", *_FORMATS))
        and dense.activation in IN_KERNELS
        and dense.size % LEAST_DEPTH == 0
    )


def _serves_experts(experts: Experts, hidden_size: int) -> bool:
    router, shared = experts.router, experts.shared
    read = [(experts.gate_up_format, hidden_size), (experts.down_format, experts.size)]
    if shared is not None:
        read += [(shared.gate_up_format, hidden_size), (shared.down_format, shared.size)]
    return (
        type(experts) is Experts
        and _has_only(experts, ("router", *_OF_EXPERTS, *_FORMATS))
        and type(router) is Router
        and _has_only(router, _ROUTER)
        and router.score in ("softmax", "sigmoid")
        and router.kept_groups >= router.num_groups  # then groups decide nothing
        and (shared is None or _serves_dense(shared))
        and all(reads(form, num_columns) for form, num_columns in read)
        and experts.size % LEAST_DEPTH == 0
        and experts.num_experts <= MOST_EXPERTS
        and experts.top_k <= MOST_PAIRS
    )


def _has_only(part: msgspec.Struct, fields: Iterable[str]) -> bool:
    """Whether a part has its defaults in every field but these."""
    return part == type(part)(**{name: getattr(part, name) for name in fields})


def _is_plain_around(layer: Layer) -> bool:
    """Whether both halves are on the residual stream as the kernels have them."""
    return (
        layer
        == Layer(
            mixer=layer.mixer,
            feed_forward=layer.feed_forward,
            input_norm=layer.input_norm,
            ff_norm=layer.ff_norm,
        )
        and _is_plain(layer.input_norm)
        and _is_plain(layer.ff_norm)
    )


def _is_plain(norm: Norm | None) -> bool:
    """The kernels round a row's norm once, whichever way the layers round."""
    return norm is not None and norm == Norm(eps=norm.eps, round_first=norm.round_first)


def _norms_heads_plainly(mixer: GQA) -> bool:
    norm = mixer.qk_norm
    return norm is None or (
        norm == QKNorm(norm.norm, norm.over)
        and norm.over != "own_head"
        and norm.norm == Norm(eps=norm.norm.eps)
        and mixer.padded_head_dim is None
    )
