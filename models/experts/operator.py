"""The operator of a mixture of experts: what each chosen expert makes of its row.

Owns its schema, its form for the CPU, which is the reference, and the choice of the form by device. The compiler of
layers sees one opaque call, so which experts have rows, and how many, never reaches the host in a graph. Called by
block.py.

Shapes: `T` token rows, `K` experts a row, `P` = T * K pairs of the two, `E` experts, `I` inner columns, `H` hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.activations import ACTIVATIONS

_SCHEMA = (
    "experts(Tensor x, Tensor experts, Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias,"
    " str activation, float? limit, bool up_plus_one) -> Tensor"
)


def run_experts(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> Tensor:
    """The output of each pair, [T, K, H] in x's dtype.

    x: [T, H], or [P, H] where a row differs by expert. experts: [T, K] int64; E stands for none, whose output is
    undefined. gate_up: [E, 2 I, H], gate before up. gate_up_bias: [E, 2 I]. down: [E, H, I]. down_bias: [E, H].
    activation, limit, up_plus_one: see spec.Experts.
    """
    result: Tensor = _operator(x, experts, gate_up, gate_up_bias, down, down_bias, activation, limit, up_plus_one)
    return result


def gated(gate_up: Tensor, activation: str, limit: float | None, up_plus_one: bool) -> Tensor:
    """gate_up: [rows, 2 I]. Returns [rows, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ACTIVATIONS[activation](gate) * (up + 1 if up_plus_one else up)


def _one_by_one(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> Tensor:
    """The experts that have rows, one after the other."""
    pairs, num_experts = experts.flatten(), gate_up.shape[0]
    order = pairs.argsort(stable=True)
    ends = pairs.bincount(minlength=num_experts + 1)[:num_experts].cumsum(0).tolist()
    rows = order // (pairs.shape[0] // x.shape[0]) if x.shape[0] else order
    out = x.new_zeros(pairs.shape[0], x.shape[1])
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if begin < end:
            own = x[rows[begin:end]]
            inner = F.linear(own, gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
            inner = gated(inner, activation, limit, up_plus_one)
            out[order[begin:end]] = F.linear(inner, down[expert], None if down_bias is None else down_bias[expert])
    return out.view(*experts.shape, x.shape[1])


def _in_tiles(*arguments: Any) -> Tensor:
    # Triton exists where CUDA does; elsewhere it must not be needed.
    from graphgen.models.experts.tiles import run_in_tiles

    return run_in_tiles(*arguments)


def _result_like(x: Tensor, experts: Tensor, *_: object) -> Tensor:
    return x.new_empty(*experts.shape, x.shape[1])


# A Library ends with its last reference. define + impl cost a third of torch.library.custom_op at every call.
_library = torch.library.Library("graphgen", "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("experts", _one_by_one, "CPU")
_library.impl("experts", _in_tiles, "CUDA")
torch.library.register_fake("graphgen::experts", _result_like, lib=_library)
_operator = torch.ops.graphgen.experts.default
