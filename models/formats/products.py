"""x @ weight.T for a weight in a format: the one place where a way to multiply is chosen.

Owns the choice, and the ways that torch alone offers. A device's own way stands beside the general one, which makes the
weight a matrix of the input's dtype and is right everywhere. Called by linear.py, inside the compiled layer on CUDA.

On the CPU int8 has a product of its own for a few rows in bfloat16.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgen.models.formats.layout import Quantised, matrix_of, unpack_int4
from graphgen.models.spec.formats import LinearFormat

CPU_FEW_ROWS = 16
"""Rows up to which torch's own product of int8 is faster on the CPU than making a matrix first. With 2048 x 2048 on one
core with AVX512 it takes 1.6 ms at 16 rows against 1.5, and 0.2 at one row against 0.9."""


class Weight(NamedTuple):
    """A weight of a format as it lies in a layer: see formats/layout.py."""

    format: LinearFormat
    codes: Tensor
    scale: Tensor
    zeros: Tensor | None
    permutation: Tensor | None

    def unpacked(self) -> Quantised:
        codes = unpack_int4(self.codes) if self.format.storage == "int4" else self.codes
        return Quantised(self.format, codes, self.scale, self.zeros, self.permutation)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, [..., N] in x's dtype. x: [..., K]; bias: [N]."""
    if weight.permutation is not None:
        x = x.index_select(-1, weight.permutation)
    if x.device.type == "cpu" and _has_row_scales(weight):
        return _scaled_behind(x, weight, bias)
    return F.linear(x, matrix_of(weight.unpacked(), x.dtype), bias)


def _has_row_scales(weight: Weight) -> bool:
    """int8 codes that are the weight but for one factor a row."""
    form = weight.format
    return form.storage == "int8" and form.group is None and form.rows == 1 and not form.zeros


def _scaled_behind(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The scale comes behind the product: the codes themselves are exact in every dtype."""
    rows = x.flatten(0, -2)
    if x.dtype == torch.bfloat16 and rows.shape[0] <= CPU_FEW_ROWS:
        ones = rows.new_ones(weight.codes.shape[0])
        sums = torch._weight_int8pack_mm(rows.contiguous(), weight.codes, ones)
    else:
        sums = F.linear(rows, weight.codes.to(x.dtype))
    result = sums * weight.scale.t()  # in float32
    result = result if bias is None else result + bias
    return result.to(x.dtype).view(*x.shape[:-1], -1)
