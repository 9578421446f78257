"""A step of a few decode rows: embedding, all layers, and the head, in the kernels of few_rows.py. CUDA only.

Owns the order of the kernels; few_rows_layers.py says which layers they compute. A layer has two halves: its mixer, and
what follows it, from the output projection on. The second is always computed here. A mixer that has no kernels here, as
latent attention, is left to the half of the plain layer, compiled where that is.

Owns no weights. Called by the decoder in place of all its layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.flashinfer import FlashInferStep
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.split_kv import HeadNorms
from graphgen.models.collectives.exchange import Exchange, Meeting
from graphgen.models.compilation import Attend
from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.experts.few_rows import run_experts
from graphgen.models.feed_forward import MLP
from graphgen.models.few_rows import (
    adding_linear,
    embed,
    gated_linear,
    norm_queries_and_keys,
    normed_linear,
)
from graphgen.models.few_rows_layers import serves_mixer
from graphgen.models.kv_cache import KVCache
from graphgen.models.layers import Attention, DecoderLayer
from graphgen.models.normed import Normed
from graphgen.models.norms import AllHeadsNorm, RMSNorm


class Ends(NamedTuple):
    """What comes before and behind the layers."""

    embedding: Tensor  # [V, hidden]
    norm: nn.Module | None  # an RMSNorm
    head: Tensor  # [V, hidden]


def next_logits(
    ends: Ends,
    layers: Sequence[DecoderLayer],
    token_ids: Tensor,
    kv_cache: KVCache,
    steps: Sequence[Sequence[StepTensors]],
    live: Tensor | None,
    attend: Attend,
    chained: bool,
    exchange: Exchange | None = None,
) -> Tensor:
    """Logits, [T, V], of few_rows_layers.most_rows decode rows at most. token_ids: [T] int64. steps: of each rope and
    page group. live: [T] bool, which rows hold a token; the others go to no expert. attend: the first half of a layer
    whose mixer has no kernels.

    chained=False launches every kernel after the one ahead. exchange: of ranks, which have parts of the layers, none
    of them with experts, and of the head.
    """
    norms = [_plain(norm) for norm in (*(layer.input_norm for layer in layers), ends.norm)]
    sums, normed = embed(token_ids, ends.embedding, norms[0], exchange)
    nothing = torch.zeros_like(sums)
    for number, layer in enumerate(layers):
        pages, step = kv_cache.pages[number], steps[layer.rope][kv_cache.groups[number]]
        if serves_mixer(layer.spec, sums.shape[1]):
            gathered = _gathered(layer.attention, normed, norms[number].eps, pages, step, chained)
        else:
            sums, gathered = attend(layer, sums, nothing, pages, step)
        o, norm = layer.attention.o, _plain(layer.ff_norm)
        behind_mixer, behind_all = (None if exchange is None else Meeting(exchange, number, part) for part in (0, 1))
        sums, normed = adding_linear(gathered, o.stored, o.bias, sums, norm, chained, meeting=behind_mixer)
        sums, normed = _feed_forward(layer.mlp, sums, normed, norm.eps, norms[number + 1], live, behind_all, chained)
    return normed_linear(normed, norms[-1].eps, ends.head, None, chained)


def _gathered(block: nn.Module, x: Normed, eps: float, pages: LayerPages, step: StepTensors, chained: bool) -> Tensor:
    """What each head of each row gathered, [T, Hq * D]."""
    assert isinstance(block, Attention), "few_rows_layers.py serves no other"
    qkv = normed_linear(x, eps, block.qkv.stored, block.qkv.bias, chained)
    heads = qkv.view(-1, block.num_heads + 2 * block.num_kv_heads, block.head_dim)
    q, k, v = heads.split((block.num_heads, block.num_kv_heads, block.num_kv_heads), dim=1)
    attention, cos, sin = step.attention, step.cos, step.sin
    if block.q_norm is not None and block.k_norm is not None:
        q_norm, k_norm = block.q_norm, block.k_norm
        if isinstance(attention, FlashInferStep) and attention.norms_heads and isinstance(q_norm, RMSNorm):
            norms = HeadNorms(_weight(q_norm), _weight(k_norm), q_norm.eps)
            return attention.attend(q, k, v, cos, sin, pages, block.variant, step.temperatures, norms).flatten(1)
        sizes = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
        norm_queries_and_keys(qkv, _of_heads(q_norm), _of_heads(k_norm), *sizes, chained)
    return attention.attend(q, k, v, cos, sin, pages, block.variant, step.temperatures).flatten(1)


def _feed_forward(
    block: nn.Module,
    sums: Tensor,
    x: Normed,
    eps: float,
    norm: RMSNorm,
    live: Tensor | None,
    meeting: Meeting | None,
    chained: bool,
) -> tuple[Tensor, Normed]:
    """The residual stream behind the feed-forward, and its norm begun."""
    if isinstance(block, MixtureOfExperts):
        return run_experts(block, sums, x, eps, norm, live, chained)
    assert isinstance(block, MLP), "few_rows_layers.py serves no other"
    gated = gated_linear(x, eps, block.gate_up.stored, block.gate_up.bias, block.activation, chained)
    return adding_linear(gated, block.down.stored, block.down.bias, sums, norm, chained, meeting=meeting)


def _weight(norm: nn.Module) -> Tensor:
    weight = _plain(norm).weight
    assert weight is not None, "few_rows_layers.py lets no other through"
    return weight


def _of_heads(norm: nn.Module) -> RMSNorm:
    return _plain(norm.norm if isinstance(norm, AllHeadsNorm) else norm)


def _plain(norm: nn.Module | None) -> RMSNorm:
    assert isinstance(norm, RMSNorm), "few_rows_layers.py lets no other through"
    return norm
