"""A decoder layer: norms, attention, feed-forward, and how they meet on the residual stream.

Owns the arithmetic, in the order of operations of Hugging Face, so that bfloat16 rounds alike, and which tensors of a
checkpoint each part takes. Every part is built from its Struct of spec/. Knows no layer number, no checkpoint name
and no bucket: every layer of one kind traces to the same graph. Built and called by decoder.py.

Shapes: `T` token rows, `Hq`/`Hkv` heads, `D` head size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.variant import FULL_ATTENTION, AttentionVariant, Numbers, alibi_slopes
from graphgen.models.collectives import Ranks
from graphgen.models.experts.block import MixtureOfExperts
from graphgen.models.families.family import TensorNames
from graphgen.models.feed_forward import MLP
from graphgen.models.formats.fitting import fitted
from graphgen.models.formats.linear import Linear
from graphgen.models.latent import LatentAttention
from graphgen.models.norms import AnyNorm, head_norm_targets, make_head_norm, make_norm, norm_targets
from graphgen.models.orders import Order
from graphgen.models.rope import rotate
from graphgen.models.spec import GQA, WHOLE, Dense, FeedForward, Layer, Mixer, RopeSpec, Shard
from graphgen.models.targets import (
    Target,
    Targets,
    arranged,
    heads_order,
    linear_targets,
    pieces_of,
    plain_order,
    qkv_starts,
    rotated_order,
    row_parallel_targets,
)


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache. A rank of several holds some of the heads, and the ranks'
    results are added up."""

    def __init__(self, spec: GQA, rope: RopeSpec, hidden_size: int, dtype: torch.dtype, shard: Shard) -> None:
        super().__init__()
        self.heads, self.kv_heads = spec.heads_of(shard)
        self.num_heads, self.num_kv_heads, self.head_dim = len(self.heads), len(self.kv_heads), spec.width
        sinks = torch.empty(self.num_heads, dtype=torch.float32) if spec.sinks else None
        self.sinks = None if sinks is None else nn.Parameter(sinks, requires_grad=False)
        self.variant = variant_of(spec, self.heads, self.sinks)
        self.clip = spec.clip
        self.norms_rotated = spec.qk_norm is not None and spec.qk_norm.rotated
        self.spec, self.rope = spec, rope
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * spec.width
        # Were q, k and v one tensor, its rows would be in another order, but no such checkpoint has blocks of them.
        qkv = fitted(spec.qkv_format, self._rows("blocks"), self._num_stored_rows)
        self.qkv = Linear(hidden_size, num_rows, spec.qkv_bias, dtype, qkv)
        self.q_norm = make_head_norm(spec, self.num_heads, dtype)
        self.k_norm = make_head_norm(spec, self.num_kv_heads, dtype)
        o = fitted(spec.o_format, columns=self._columns, num_columns=spec.num_heads * spec.head_dim)
        self.o = Linear(self.num_heads * spec.width, hidden_size, spec.o_bias and shard.rank == 0, dtype, o)
        self.k_scales: Tensor
        """[Hkv] float32: what stored keys are multiplied by where the KV format is fp8: 1, or the checkpoint's."""
        self.v_scales: Tensor
        """[Hkv] float32, the same of values."""
        self.register_buffer("k_scales", torch.ones(self.num_kv_heads, dtype=torch.float32), persistent=False)
        self.register_buffer("v_scales", torch.ones(self.num_kv_heads, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor, pages: LayerPages, step: StepTensors) -> Tensor:
        """What each head of each row gathered, [T, Hq * D]: the input of the output projection `o`."""
        qkv = self.qkv(x).unflatten(-1, (self.num_heads + 2 * self.num_kv_heads, self.head_dim))
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        cos, sin = step.cos, step.sin
        if self.norms_rotated:  # here instead of in the backend, which turns by nothing
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        gathered = step.attention.attend(q, k, v, cos, sin, pages, self.variant, step.temperatures)
        return gathered.flatten(1)

    def weights(self, prefix: str, names: TensorNames) -> Targets:
        """Every tensor of a checkpoint that it takes."""
        spec, turned = self.spec, rotated_order(self.rope, *self.spec.rotated)
        held = (self.num_heads * spec.width, self.num_kv_heads * spec.width, self.num_kv_heads * spec.width)
        qkv_names = [prefix + name for name in names.qkv]
        qkv = pieces_of(qkv_names, self._rows(names.qkv_order), self._num_stored_rows, held)
        yield from linear_targets(self.qkv, qkv, transposed=names.transposed)
        num_columns = spec.num_heads * spec.head_dim
        yield from row_parallel_targets(
            prefix + names.o, self.o, self._columns, num_columns, spec.o_bias, names.transposed
        )
        if self.sinks is not None:
            own = arranged(np.array(self.heads), spec.num_heads)
            yield prefix + names.sinks, Target(self.sinks.data, (spec.num_heads,), own)
        for name, norm, heads, count in (
            (names.q_norm, self.q_norm, self.heads, spec.num_heads),
            (names.k_norm, self.k_norm, self.kv_heads, spec.num_kv_heads),
        ):
            yield from head_norm_targets(prefix + name, norm, spec, heads, count, turned)

    def _rows(self, layout: str) -> Order:
        """Of q, k and v, counted through all that the checkpoint has of them. layout: see TensorNames.qkv_order."""
        spec = self.spec
        turned, plain = rotated_order(self.rope, *spec.rotated), plain_order(spec)
        q, k, v = qkv_starts(spec, layout)
        own, own_kv = np.array(self.heads), np.array(self.kv_heads)
        return np.concatenate(
            (heads_order(q[own], turned), heads_order(k[own_kv], turned), heads_order(v[own_kv], plain))
        )

    @property
    def _columns(self) -> Order:
        """Of the output projection."""
        return heads_order(np.array(self.heads) * self.spec.head_dim, plain_order(self.spec))

    @property
    def _num_stored_rows(self) -> tuple[int, int, int]:
        """Of q, k and v in a checkpoint."""
        dim = self.spec.head_dim
        return self.spec.num_heads * dim, self.spec.num_kv_heads * dim, self.spec.num_kv_heads * dim


def variant_of(spec: GQA, heads: range, sinks: Tensor | None) -> AttentionVariant:
    """How a layer scores. heads: a rank's. sinks: of these."""
    numbers = Numbers(spec.score_scale, spec.window or FULL_ATTENTION, spec.segment or 0, spec.softcap or 0.0)
    slopes = None
    if (alibi := spec.alibi) is not None:
        slopes = alibi_slopes(spec.num_heads)[heads.start : heads.stop]
        slopes = slopes * spec.score_scale if alibi.scaled else slopes
    return AttentionVariant(numbers.packed(), sinks, slopes)


class DecoderLayer(nn.Module):
    """One layer, in two halves with nothing between them that a compiler could fuse.

    Attention needs every row of a step, since later rows read its keys and values; what follows treats each row
    alone, so after the last layer's attention the rows whose result nobody reads can be left out.

    Takes and returns the residual stream as two terms, `residual + update`: their sum is formed where the
    next norm reads it, so a compiled layer has one kernel for both instead of two around the layer's edge.
    """

    def __init__(
        self,
        spec: Layer,
        ropes: Sequence[RopeSpec],
        hidden_size: int,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
    ) -> None:
        """ranks: that share the layer; each adds its part to every block, and the sums are the blocks' results."""
        super().__init__()
        shard = WHOLE if ranks is None else ranks.shard
        self.ranks = ranks
        self.input_norm = make_norm(spec.input_norm, hidden_size, dtype)
        self.attention = _make_mixer(spec.mixer, ropes[spec.mixer.rope], hidden_size, dtype, shard)
        self.mixer_output_norm = make_norm(spec.mixer_output_norm, hidden_size, dtype)
        self.ff_norm = make_norm(spec.ff_norm, hidden_size, dtype)
        self.mlp = _make_feed_forward(spec.feed_forward, hidden_size, dtype, shard)
        self.ff_output_norm = make_norm(spec.ff_output_norm, hidden_size, dtype)
        self.output_norm = make_norm(spec.output_norm, hidden_size, dtype)
        self.rope = spec.mixer.rope
        self.parallel, self.shared_norm = spec.parallel, spec.shared_norm
        self.residual_from_norm, self.residual_scale = spec.residual_from_norm, spec.residual_scale
        self.spec = spec

    def attend(self, residual: Tensor, update: Tensor, pages: LayerPages, step: StepTensors) -> tuple[Tensor, Tensor]:
        """residual, update: [T, hidden]. Returns their sum and what attention gathered, [T, Hq * D]."""
        residual = residual + update
        normed = residual if self.input_norm is None else self.input_norm(residual)
        gathered = self.attention(normed, pages, step)
        return normed if self.residual_from_norm else residual, gathered

    def feed_forward(self, residual: Tensor, gathered: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rest, over any rows of attend's result: the new (residual, update). live: [rows] bool, those that hold a
        token; only experts ask."""
        part = self.attention.o(gathered)
        if self.parallel:
            norm = self.input_norm if self.shared_norm else self.ff_norm
            return residual, self._both(part, self.mlp(residual if norm is None else norm(residual), live))
        attended = self._scaled(self._summed(part), self.mixer_output_norm)
        # In float32 the sum rounds as it would in bfloat16, and the compiler leaves it to the norm that reads it;
        # an addition in the matrices' own dtype it would move into the product, at the price of a copy kernel.
        residual = (residual.float() + attended.float()).to(residual.dtype)
        normed = residual if self.ff_norm is None else self.ff_norm(residual)
        if self.residual_from_norm:
            residual = normed
        update = self._scaled(self._summed(self.mlp(normed, live)), self.ff_output_norm)
        if self.output_norm is None:
            return residual, update
        return self.output_norm(residual + update), torch.zeros_like(update)

    def _summed(self, part: Tensor) -> Tensor:
        """A block's result, of which each rank has made a part."""
        return part if self.ranks is None else self.ranks.all_reduce(part)

    def _both(self, attended: Tensor, update: Tensor) -> Tensor:
        """What a parallel layer's blocks add to the stream, after one sum over the ranks."""
        if self.mixer_output_norm is None and self.ff_output_norm is None:
            if self.ranks is not None:
                return self._scaled(self._summed(attended + update), None)
        elif self.ranks is not None:  # side by side, so that their sums have an order
            attended, update = self._summed(torch.stack((attended, update))).unbind()
        return self._scaled(attended, self.mixer_output_norm) + self._scaled(update, self.ff_output_norm)

    def _scaled(self, update: Tensor, norm: AnyNorm | None) -> Tensor:
        """What a block adds to the stream."""
        update = update if norm is None else norm(update)
        return update if self.residual_scale == 1.0 else update * self.residual_scale

    def weights(self, prefix: str, names: TensorNames) -> Targets:
        """Every tensor of a checkpoint that it takes."""
        spec = self.spec
        yield from self.attention.weights(prefix, names)
        yield from self.mlp.weights(prefix, names)
        yield from norm_targets(prefix + names.input_norm, self.input_norm, spec.input_norm)
        yield from norm_targets(prefix + names.mixer_output_norm, self.mixer_output_norm, spec.mixer_output_norm)
        yield from norm_targets(prefix + names.ff_norm, self.ff_norm, spec.ff_norm)
        yield from norm_targets(prefix + names.ff_output_norm, self.ff_output_norm, spec.ff_output_norm)
        yield from norm_targets(prefix + names.output_norm, self.output_norm, spec.output_norm)


def _make_mixer(
    spec: Mixer, rope: RopeSpec, hidden_size: int, dtype: torch.dtype, shard: Shard
) -> Attention | LatentAttention:
    if isinstance(spec, GQA):
        return Attention(spec, rope, hidden_size, dtype, shard)
    return LatentAttention(spec, rope, hidden_size, dtype, shard)


def _make_feed_forward(spec: FeedForward, hidden_size: int, dtype: torch.dtype, shard: Shard) -> MLP | MixtureOfExperts:
    if isinstance(spec, Dense):
        return MLP(spec, hidden_size, dtype, shard)
    return MixtureOfExperts(spec, hidden_size, dtype, shard)
