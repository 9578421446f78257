"""int4 weights on the CPU: torch's own product for a few rows in bfloat16, and its order of codes.

Owns that order, which depends on the instructions that the CPU has, and the way back from it. torch has no name for the
way back, so it is found by putting numbered codes in order. Called by linear.py, once all of a weight is there, and by
products.py.

torch's order: blocks of some rows one behind the other; of a block, column by column, half as many bytes as it has
rows, each with the codes of two. Scales and zeros are one tensor [groups, N, 2] bfloat16, (scale, (8 - zero) * scale).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.formats.layout import ZERO_CODES, Quantised
from graphgen.models.spec.formats import LinearFormat

_GROUPS = (32, 64, 128, 256)
_ROWS = 16
"""The number of rows is a multiple of it."""
_BLOCKS = (64, 32, 16, 128)
"""Rows of a block that a CPU may have."""


class CpuInt4(NamedTuple):
    """A weight [N, K] in torch's order."""

    codes: Tensor
    """[N, K / 2] uint8"""
    scales_and_zeros: Tensor
    """[groups, N, 2] bfloat16"""


def serves(form: LinearFormat, num_rows: int, num_columns: int, dtype: torch.dtype) -> bool:
    """Whether torch multiplies such a weight. dtype: of the input."""
    return (
        form.storage == "int4"
        and form.rows == 1
        and form.group in _GROUPS
        and num_columns % form.group == 0
        and num_rows % _ROWS == 0
        and dtype is torch.bfloat16
    )


def in_torchs_order(weight: Quantised) -> CpuInt4:
    """A weight that is served, without its permutation."""
    scale = weight.scale.float()
    zeros = ZERO_CODES["int4"] if weight.zeros is None else weight.zeros.float()
    offsets = (ZERO_CODES["int4"] - zeros) * scale
    both = torch.stack((scale.t(), offsets.t()), dim=-1).bfloat16().contiguous()
    return CpuInt4(torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1), both)


def product_of_few_rows(x: Tensor, weight: CpuInt4) -> Tensor:
    """x @ weight.T, [T, N] bfloat16. x: [T, K] bfloat16."""
    group = x.shape[1] // weight.scales_and_zeros.shape[0]
    result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.codes, group, weight.scales_and_zeros)
    return result


def matrix_of(weight: CpuInt4, dtype: torch.dtype) -> Tensor:
    """[N, K] in that dtype."""
    codes = codes_of(weight)
    group = codes.shape[1] // weight.scales_and_zeros.shape[0]
    scale, offsets = (part.t().unsqueeze(-1) for part in weight.scales_and_zeros.float().unbind(-1))
    values: Tensor = (codes.unflatten(1, (-1, group)).float() - ZERO_CODES["int4"]) * scale + offsets
    return values.flatten(1).to(dtype)


def codes_of(weight: CpuInt4) -> Tensor:
    """[N, K] uint8: back from torch's order."""
    num_rows, num_columns = weight.codes.shape[0], 2 * weight.codes.shape[1]
    block, flat = _block_rows(), weight.codes.flatten()
    full = num_rows // block * block
    parts = [_ordered(flat[: full * num_columns // 2], block, num_columns)] if full else []
    if full < num_rows:
        parts.append(_ordered(flat[full * num_columns // 2 :], num_rows - full, num_columns))
    return torch.cat(parts)


def _ordered(flat: Tensor, block: int, num_columns: int) -> Tensor:
    """Rows of blocks of equal size, [rows, K]."""
    packed = flat.view(-1, num_columns, block // 2)
    codes = torch.cat((packed & 15, packed >> 4), dim=-1)
    order = _row_order(block)
    assert order is not None, "the last block has an order of its own"
    ordered: Tensor = codes.index_select(-1, order.argsort())
    return ordered.transpose(1, 2).flatten(0, 1)


def _row_order(block: int, num_rows: int | None = None) -> Tensor | None:
    """The row that each code of a column is of: low halves of its bytes first, then high ones. num_rows: of a weight
    that is put in order, of which the first block is read. None: blocks are not of that size."""
    rows = torch.arange(num_rows or block)
    digits = torch.stack((rows % 16, rows // 16), dim=1).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits, 1).flatten()[:block].view(2, block // 2)
    low, high = torch.cat((packed & 15, packed >> 4), dim=-1).long()
    order = low + 16 * high
    return order if torch.equal(order.sort().values, torch.arange(block)) else None


def _block_rows() -> int:
    """Of this CPU."""
    return next(size for size in _BLOCKS if _row_order(size, 2 * max(_BLOCKS)) is not None)


def product(x: Tensor, weight: CpuInt4, bias: Tensor | None, few_rows: int) -> Tensor:
    """x @ weight.T + bias, [..., N] bfloat16. few_rows: up to which torch's own product serves."""
    rows = x.flatten(0, -2)
    if rows.shape[0] > few_rows:
        return F.linear(x, matrix_of(weight, x.dtype), bias)
    result = product_of_few_rows(rows.contiguous(), weight)
    return (result if bias is None else result + bias).view(*x.shape[:-1], -1)
