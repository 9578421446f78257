"""Multi-head latent attention, absorbed: what a position keeps is one row for all heads.

Owns its arithmetic and which tensors of a checkpoint it takes; spec.Latent has the formula. Built and called by the
decoder layer like Attention of layers.py.

Shapes: `T` token rows, `H` heads, `N` plain, `R` turning and `V` value elements of a head, `L` of a latent.
"""

import numpy as np
import torch
from torch import Tensor, nn

from graphgen.models.attention.backend import StepTensors
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.variant import AttentionVariant, Numbers
from graphgen.models.families.family import TensorNames
from graphgen.models.formats.fitting import fitted
from graphgen.models.formats.linear import Linear
from graphgen.models.norms import make_norm, norm_targets
from graphgen.models.orders import Order
from graphgen.models.rope import rotate
from graphgen.models.spec import Latent, RopeSpec, Shard
from graphgen.models.targets import (
    Piece,
    Target,
    Targets,
    arranged,
    heads_order,
    linear_targets,
    rotated_order,
    row_parallel_targets,
)


class LatentAttention(nn.Module):
    """A rank of several holds some of the heads and all that makes the latents, and the ranks' results are added up.
    Each keeps the latents of all positions."""

    def __init__(self, spec: Latent, rope: RopeSpec, hidden_size: int, dtype: torch.dtype, shard: Shard) -> None:
        super().__init__()
        self.heads = shard.part(spec.num_heads, "attention heads")
        self.spec, self.rope = spec, rope
        num_heads = len(self.heads)
        self.variant = AttentionVariant(Numbers(spec.score_scale * rope.score_factor).packed())
        self.q_down = None
        if spec.q_rank is not None:
            self.q_down = Linear(hidden_size, spec.q_rank, spec.bias, dtype, spec.q_down_format)
        self.q_norm = None if spec.q_rank is None else make_norm(spec.norm, spec.q_rank, dtype)
        q_up = fitted(spec.q_up_format, self._q_rows, [spec.num_heads * spec.query_dim])
        self.q_up = Linear(spec.q_rank or hidden_size, num_heads * spec.query_dim, False, dtype, q_up)
        kv_down = fitted(spec.kv_down_format, self._turned(spec.latent_size), [spec.row_size])
        self.kv_down = Linear(hidden_size, spec.row_size, spec.bias, dtype, kv_down)
        self.kv_norm = make_norm(spec.norm, spec.latent_size, dtype)
        up = torch.empty(num_heads, spec.plain_dim + spec.value_dim, spec.latent_size, dtype=dtype)
        self.kv_up = nn.Parameter(up, requires_grad=False)
        o = fitted(spec.o_format, columns=self._columns, num_columns=spec.num_heads * spec.value_dim)
        self.o = Linear(num_heads * spec.value_dim, hidden_size, spec.bias and shard.rank == 0, dtype, o)

    def forward(self, x: Tensor, pages: LayerPages, step: StepTensors) -> Tensor:
        """What each head of each row gathered, [T, H * V]: the input of the output projection `o`."""
        spec = self.spec
        up_k, up_v = self.kv_up.split((spec.plain_dim, spec.value_dim), dim=1)
        plain, turning = self._queries(x).split((spec.plain_dim, spec.rope_dim), dim=-1)
        q = torch.cat((_by_head(plain, up_k), rotate(turning, step.cos, step.sin)), dim=-1)
        kept = self.kv_down(x).view(-1, 1, spec.row_size)  # as of one head
        latent, shared = kept.split((spec.latent_size, spec.rope_dim), dim=-1)
        latent = latent if self.kv_norm is None else self.kv_norm(latent)
        row = torch.cat((latent, rotate(shared, step.cos, step.sin)), dim=-1).flatten(1)
        gathered = step.attention.attend_latent(q, row, pages.k, spec.latent_size, self.variant)
        values: Tensor = _by_head(gathered, up_v.transpose(1, 2))
        return values.flatten(1)

    def _queries(self, x: Tensor) -> Tensor:
        """[T, H, N + R], before their rotation."""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x))
        queries: Tensor = self.q_up(x)
        return queries.view(-1, len(self.heads), self.spec.query_dim)

    def weights(self, prefix: str, names: TensorNames) -> Targets:
        """Every tensor of a checkpoint that it takes."""
        spec, own, heads = self.spec, names.latent, np.array(self.heads)
        if self.q_down is not None:
            whole = np.arange(self.q_down.out_features)
            yield from linear_targets(self.q_down, [Piece(prefix + own.q_down, 0, len(whole), whole)])
        yield from norm_targets(prefix + own.q_norm, self.q_norm, spec.norm)
        q_name = prefix + (own.q if self.q_down is None else own.q_up)
        yield from linear_targets(self.q_up, [Piece(q_name, 0, spec.num_heads * spec.query_dim, self._q_rows)])
        kept = self._turned(spec.latent_size)
        yield from linear_targets(self.kv_down, [Piece(prefix + own.kv_down, 0, spec.row_size, kept)])
        yield from norm_targets(prefix + own.kv_norm, self.kv_norm, spec.norm)
        both = spec.plain_dim + spec.value_dim
        rows, num_stored = heads_order(heads * both, np.arange(both)), spec.num_heads * both
        up = self.kv_up.data.view(-1, spec.latent_size)
        yield f"{prefix}{own.kv_up}.weight", Target(up, (num_stored, spec.latent_size), arranged(rows, num_stored))
        yield from row_parallel_targets(
            prefix + names.o, self.o, self._columns, spec.num_heads * spec.value_dim, spec.bias, names.transposed
        )

    @property
    def _q_rows(self) -> Order:
        return heads_order(np.array(self.heads) * self.spec.query_dim, self._turned(self.spec.plain_dim))

    @property
    def _columns(self) -> Order:
        """Of the output projection."""
        return heads_order(np.array(self.heads) * self.spec.value_dim, np.arange(self.spec.value_dim))

    def _turned(self, num_before: int) -> Order:
        """Of what has `num_before` elements that stay and then those that turn."""
        turned = rotated_order(self.rope, *self.spec.rotated)
        return np.concatenate((np.arange(num_before), num_before + turned))


def product_by_head(x: Tensor, weights: Tensor) -> Tensor:
    """[T, H, B], contiguous: of each head its own product of x [T, H, A] and weights [H, A, B]."""
    product = x.new_empty(*x.shape[:2], weights.shape[2])
    torch.bmm(x.transpose(0, 1), weights, out=product.transpose(0, 1))
    return product


# An operator: of a product that it sees the compiler asks whether there is one row, and is called again for that.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define("product_by_head(Tensor x, Tensor weights) -> Tensor")
_library.impl("product_by_head", product_by_head, "CompositeExplicitAutograd")
torch.library.register_fake(
    "graphgen::product_by_head", lambda x, weights: x.new_empty(*x.shape[:2], weights.shape[2]), lib=_library
)
_by_head = torch.ops.graphgen.product_by_head.default
