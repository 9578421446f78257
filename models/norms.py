"""RMSNorm and LayerNorm, over a row, a head, or all heads at once.

Owns their arithmetic and which tensors of a checkpoint they take. Built from the Norm of a spec by layers.py and
decoder.py.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.models.orders import Order
from graphgen.models.spec import GQA, Norm
from graphgen.models.targets import Arrange, Target, Targets, arranged, heads_order, in_turn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), in float32, rounded before the
    weight or, where that is float32 itself, after it."""

    def __init__(
        self, size: int, spec: Norm, dtype: torch.dtype, num_heads: int | None = None, num_zeros: int = 0
    ) -> None:
        """num_heads: with a weight each; None: one weight. num_zeros: elements of a row that only fill it up."""
        super().__init__()
        self.eps = spec.eps
        self.round_first = spec.round_first
        self.stretch = 1.0 if num_zeros == 0 else size / (size - num_zeros)
        self._least_norm = torch.tensor(math.sqrt(size * spec.eps), dtype=torch.float32, device="cpu")
        self.weight = _weight(spec.weight, size, num_heads, dtype if spec.round_first else torch.float32)
        if spec.bias:
            raise UnsupportedModelError("a norm by the root mean square has a bias: no model is known to have one")

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.is_cpu
            and x.dtype == torch.float32
            and self.stretch == 1.0
            and (self.weight is None or self.weight.ndim == 1)
        ):
            return self._in_few_calls(x)
        wide = x.float()
        square = wide.pow(2).mean(-1, keepdim=True)
        if self.stretch != 1.0:
            square = square * self.stretch
        wide = wide * torch.rsqrt(square + self.eps)
        if self.weight is None:
            return wide.to(x.dtype)
        return self.weight * wide.to(x.dtype) if self.round_first else (self.weight * wide).to(x.dtype)

    def _in_few_calls(self, x: Tensor) -> Tensor:
        """In float32 on the CPU, where each call of torch costs a row as much as its arithmetic; F.rms_norm makes a
        dozen. By rms = sqrt(|x|^2 + n * eps) / sqrt(n)."""
        rms = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._least_norm)
        normed = torch.div(x, rms.mul_(x.shape[-1] ** -0.5))
        return normed if self.weight is None else normed.mul_(self.weight)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension (arXiv 1607.06450), rounded once."""

    def __init__(self, size: int, spec: Norm, dtype: torch.dtype, num_heads: int | None = None) -> None:
        """num_heads: with a weight each; None: one weight."""
        super().__init__()
        self.eps = spec.eps
        self.size = size
        self.weight = _weight(spec.weight, size, num_heads, dtype)
        self.bias = _weight(spec.bias, size, num_heads, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.ndim == 1:
            return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
        wide = F.layer_norm(x.float(), (self.size,), eps=self.eps) * self.weight.float()
        return (wide if self.bias is None else wide + self.bias.float()).to(x.dtype)


class AllHeadsNorm(nn.Module):
    """A norm over the whole width of [T, heads, D]."""

    def __init__(self, norm: RMSNorm | LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, heads: Tensor) -> Tensor:
        normed: Tensor = self.norm(heads.flatten(1))
        return normed.view_as(heads)


AnyNorm = RMSNorm | LayerNorm


def _weight(present: bool, size: int, num_heads: int | None, dtype: torch.dtype) -> nn.Parameter | None:
    shape = (size,) if num_heads is None else (num_heads, size)
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False) if present else None


def make_norm(spec: Norm | None, size: int, dtype: torch.dtype) -> AnyNorm | None:
    """A norm of rows of `size`, uninitialised; None for none."""
    if spec is None:
        return None
    return RMSNorm(size, spec, dtype) if spec.kind == "rms" else LayerNorm(size, spec, dtype)


def make_head_norm(attention: GQA, num_heads: int, dtype: torch.dtype) -> AnyNorm | AllHeadsNorm | None:
    """The norm of a rank's queries or keys, [T, heads, D]; None for none."""
    if attention.qk_norm is None:
        return None
    spec, over, num_zeros = attention.qk_norm.norm, attention.qk_norm.over, attention.width - attention.head_dim
    if over == "all_heads":
        size, num_zeros = num_heads * attention.width, num_heads * num_zeros
        rms = spec.kind == "rms"
        return AllHeadsNorm(RMSNorm(size, spec, dtype, None, num_zeros) if rms else LayerNorm(size, spec, dtype))
    weights = num_heads if over == "own_head" else None
    if spec.kind == "rms":
        return RMSNorm(attention.width, spec, dtype, weights, num_zeros)
    return LayerNorm(attention.width, spec, dtype, weights)


def norm_targets(name: str, norm: nn.Module | None, spec: Norm | None) -> Targets:
    """Of a norm of rows."""
    if norm is not None and spec is not None:
        for kind, weight in norm.named_parameters():
            yield f"{name}.{kind}", Target(weight.data, tuple(weight.shape), _completed(kind, weight, spec))


def head_norm_targets(
    name: str, norm: nn.Module | None, attention: GQA, heads: range, num_stored: int, order: Order
) -> Targets:
    """Of a norm of a rank's `heads`, of `num_stored` that the checkpoint has. order: of the elements of a head in
    memory, the stored ones. Where each head has a tensor of its own, `name` has `{head}` for its number."""
    if norm is None or attention.qk_norm is None:
        return
    spec, over, dim = attention.qk_norm.norm, attention.qk_norm.over, attention.head_dim
    in_order = arranged(order, dim)
    for path, weight in norm.named_parameters():
        kind = path.removeprefix("norm.")
        complete = _completed(kind, weight, spec)
        if over == "head":
            yield f"{name}.{kind}", Target(weight.data, (dim,), in_turn(in_order, complete))
        elif over == "all_heads":
            rows = heads_order(np.array(heads) * dim, order)
            whole = arranged(rows, num_stored * dim)
            yield f"{name}.{kind}", Target(weight.data, (num_stored * dim,), in_turn(whole, complete))
        elif "{head}" in name:
            for head in range(num_stored):
                own = weight.data[head - heads.start] if head in heads else None
                yield f"{name.format(head=head)}.{kind}", Target(own, (dim,), in_turn(in_order, complete))
        else:
            table = arranged(np.array(heads), num_stored, order, dim)
            yield f"{name}.{kind}", Target(weight.data, (num_stored, dim), in_turn(table, complete))


def _completed(kind: str, weight: Tensor, spec: Norm) -> Arrange | None:
    """Adds what checkpoints leave out, in the dtype that the weight has."""
    if kind != "weight" or not spec.plus_one:
        return None
    return lambda stored: stored.to(weight.dtype) + 1
