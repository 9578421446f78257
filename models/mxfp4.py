"""Stored tensors in MXFP4, as gpt-oss is published: two of them, `NAME_blocks` and `NAME_scales`, become one NAME.

Blocks [E, rows, columns / 32, 16] uint8 hold two numbers of four bits (E2M1) a byte, the first in the low bits; scales
[E, rows, columns / 32] uint8 are the exponents of 32 numbers each, 127 meaning 2**0 (OCP Microscaling Formats 1.0).
NAME is [E, columns, rows], as checkpoints that are not quantised have it. Called by checkpoint.py.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from graphgen.models.checkpoint_files import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits; the fourth is the sign."""
_BIAS = 127
"""The exponent that means 2**0."""


def unpacked_name(name: str, stored: Mapping[str, StoredTensor]) -> str | None:
    """What the tensor `name` becomes a part of; None for one that is not in MXFP4."""
    for own, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        base = name.removesuffix(own)
        if base != name and base + other in stored:
            return base
    return None


def with_unpacked(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors as a loader sees them: one for each pair."""
    tensors = {}
    for name, tensor in stored.items():
        base = unpacked_name(name, stored)
        if base is None:
            tensors[name] = tensor
        elif name.endswith(BLOCKS):
            *experts, rows, num_blocks, num_bytes = tensor.shape
            tensors[base] = replace(tensor, dtype="MXFP4", shape=(*experts, num_blocks * num_bytes * 2, rows))
    return tensors


def unpack(blocks: "Tensor", scales: "Tensor", dtype: "torch.dtype") -> "Tensor":
    """[E, columns, rows] of that dtype, one expert at a time."""
    import torch

    num_experts, num_rows, num_blocks, num_bytes = blocks.shape
    values = torch.tensor((*_VALUES, *(-value for value in _VALUES)), dtype=torch.float32, device=blocks.device)
    out = torch.empty(num_experts, num_blocks * num_bytes * 2, num_rows, dtype=dtype, device=blocks.device)
    for expert, (own, exponents) in enumerate(zip(blocks, scales, strict=True)):
        numbers = torch.stack((values[(own & 15).long()], values[(own >> 4).long()]), dim=-1).flatten(-2)
        factors = torch.exp2(exponents.float() - _BIAS)
        out[expert] = (numbers * factors.unsqueeze(-1)).flatten(1).T
    return out
