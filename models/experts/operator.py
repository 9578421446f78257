"""The operator of a mixture of experts: what each chosen expert makes of its row.

Owns its schema, its form for the CPU, which is the reference, and the choice of the form by device. The compiler of
layers sees one opaque call, so which experts have rows, and how many, never reaches the host in a graph. Called by
block.py.

Shapes: `T` token rows, `K` experts a row, `P` = T * K pairs of the two, `E` experts, `I` inner columns, `H` hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.activations import ACTIVATIONS
from graphgen.models.formats.layout import STORAGES
from graphgen.models.formats.products import Weight, product
from graphgen.models.spec.formats import LinearFormat

_SCHEMA = (
    "experts(Tensor x, Tensor experts, Tensor[] gate_up, int[] gate_up_block, Tensor? gate_up_bias, Tensor[] down,"
    " int[] down_block, Tensor? down_bias, str activation, float? limit, bool up_plus_one) -> Tensor"
)
"""A weight is one tensor, or codes, scale and zeros, and the rows and columns that share a scale: see as_weight."""

_OF_ROWS = 0
"""Columns that share a scale, where all of a row do."""


def run_experts(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor | Weight,
    gate_up_bias: Tensor | None,
    down: Tensor | Weight,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> Tensor:
    """The output of each pair, [T, K, H] in x's dtype.

    x: [T, H], or [P, H] where a row differs by expert. experts: [T, K] int64; E stands for none, whose output is
    undefined. gate_up: [E, 2 I, H], gate before up; or a stack of quantised weights, each of these sizes. gate_up_bias:
    [E, 2 I]. down: [E, H, I], alike. down_bias: [E, H]. activation, limit, up_plus_one: see spec.Experts.
    """
    result: Tensor = _operator(
        x,
        experts,
        *_as_tensors(gate_up),
        gate_up_bias,
        *_as_tensors(down),
        down_bias,
        activation,
        limit,
        up_plus_one,
    )
    return result


def _as_tensors(weight: Tensor | Weight) -> tuple[list[Tensor], list[int]]:
    """As the operator takes it."""
    if isinstance(weight, Tensor):
        return [weight], []
    tensors = [weight.codes, weight.scale]
    form = weight.format
    return tensors if weight.zeros is None else [*tensors, weight.zeros], [form.rows, form.group or _OF_ROWS]


def as_weight(tensors: Sequence[Tensor], block: Sequence[int]) -> Tensor | Weight:
    """The weight again."""
    if not block:
        return tensors[0]
    codes, scale, *rest = tensors
    form = LinearFormat(
        storage=STORAGES[codes.dtype],
        rows=block[0],
        group=block[1] or None,
        zeros=bool(rest),
        scale_dtype=str(scale.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # of a layer of ours
    )
    return Weight(form, codes, scale, rest[0] if rest else None, None)


def gated(gate_up: Tensor, activation: str, limit: float | None, up_plus_one: bool) -> Tensor:
    """gate_up: [rows, 2 I]. Returns [rows, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ACTIVATIONS[activation](gate) * (up + 1 if up_plus_one else up)


def _one_by_one(
    x: Tensor,
    experts: Tensor,
    gate_up: list[Tensor],
    gate_up_block: list[int],
    gate_up_bias: Tensor | None,
    down: list[Tensor],
    down_block: list[int],
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> Tensor:
    """The experts that have rows, one after the other."""
    of_gate_up, of_down = as_weight(gate_up, gate_up_block), as_weight(down, down_block)
    pairs, num_experts = experts.flatten(), gate_up[0].shape[0]
    order = pairs.argsort(stable=True)
    ends = pairs.bincount(minlength=num_experts + 1)[:num_experts].cumsum(0).tolist()
    rows = order // (pairs.shape[0] // x.shape[0]) if x.shape[0] else order
    out = x.new_zeros(pairs.shape[0], x.shape[1])
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if begin < end:
            own = x[rows[begin:end]]
            inner = gated(_product(own, of_gate_up, gate_up_bias, expert), activation, limit, up_plus_one)
            out[order[begin:end]] = _product(inner, of_down, down_bias, expert)
    return out.view(*experts.shape, x.shape[1])


def _product(x: Tensor, weights: Tensor | Weight, biases: Tensor | None, expert: int) -> Tensor:
    bias = None if biases is None else biases[expert]
    return product(x, weights.of(expert), bias) if isinstance(weights, Weight) else F.linear(x, weights[expert], bias)


def _in_tiles(
    x: Tensor,
    experts: Tensor,
    gate_up: list[Tensor],
    gate_up_block: list[int],
    gate_up_bias: Tensor | None,
    down: list[Tensor],
    down_block: list[int],
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> Tensor:
    # Triton exists where CUDA does; elsewhere it must not be needed.
    from graphgen.models.experts.tiles import run_in_tiles

    weights = as_weight(gate_up, gate_up_block), gate_up_bias, as_weight(down, down_block), down_bias
    return run_in_tiles(x, experts, *weights, activation, limit, up_plus_one)


def _result_like(x: Tensor, experts: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*experts.shape, x.shape[1])


# A Library ends with its last reference. define + impl cost a third of torch.library.custom_op at every call.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("experts", _one_by_one, "CPU")
_library.impl("experts", _in_tiles, "CUDA")
torch.library.register_fake("graphgen::experts", _result_like, lib=_library)
_operator = torch.ops.graphgen.experts.default
