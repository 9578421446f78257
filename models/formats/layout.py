"""How a quantised weight lies in memory, and the reference that says what it means.

Owns the one layout that layers and kernels know; files with other layouts are brought into it by readers/. Never
multiplies anything. Used by linear.py, by the readers, and by the tests of every kernel.

A weight [N, K] of a LinearFormat `format` is made of these tensors, all of them contiguous:

    codes        e4m3   [N, K]       float8_e4m3fn
                 int8   [N, K]       int8
                 int4   [N, K / 2]   uint8, two codes of 0 to 15 a byte, see below; K is even
    scale        [ceil(N / format.rows), ceil(K / format.group)] of format.scale_dtype; [N, 1] for a scale a row
    zeros        where format.zeros: a zero for each scale, in the same places. int8 for int8, uint8 for int4
    permutation  where format.permuted: [K] int32, see below

    weight[n, k] = (code[n, k] - zero[n // rows, k // group]) * scale[n // rows, k // group]

Without zeros the zero is 0 for e4m3 and int8, and 8 for int4.

int4: the columns are cut into blocks of 128, whatever the groups are; where 128 does not divide K the last block has
the R = K % 128 columns that are left. A block of B columns takes B / 2 bytes: byte j has the code of the block's column
j in its low four bits, and that of column B / 2 + j in its high four bits. So in a full block, bytes 0 to 63 are
columns 0 to 63 (low) and 64 to 127 (high), and a kernel that reads a block multiplies the low halves with the first 64
inputs and the high halves with the last 64: nothing is interleaved. Bytes 64 b to 64 b + 63 of a row are block b.

permutation: the input is reordered before the product, x[:, permutation] @ weight.T, since checkpoints that were
quantised in the order of activations ("desc_act") have groups of columns that are not neighbours. The groups of the
weight as it lies here are neighbours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from graphgen.models.spec.formats import PACKED_BLOCK, LinearFormat, Storage

CODE_DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
"""Of a storage's codes; of int4, packed or not."""
STORAGES: dict[torch.dtype, Storage] = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.uint8: "int4"}
"""The other way round."""
ZERO_CODES = {"e4m3": 0, "int8": 0, "int4": 8}
"""The code of zero where a format has no zeros."""
E4M3_MOST = 448.0
"""Largest finite number of float8_e4m3fn."""


class Quantised(NamedTuple):
    """A quantised weight, or some rows of it, whose int4 codes are not packed: [N, K] uint8. The rest is as above."""

    format: LinearFormat
    codes: Tensor
    scale: Tensor
    zeros: Tensor | None = None
    permutation: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[0], self.codes.shape[1]

    def equals(self, other: "Quantised") -> bool:
        """Whether every tensor of both holds the same bits."""
        pairs = zip(self[1:], other[1:], strict=True)
        return self.format == other.format and all(
            one is two if one is None or two is None else torch.equal(one.view(torch.uint8), two.view(torch.uint8))
            for one, two in pairs
        )

    def spread(self, values: Tensor) -> Tensor:
        """Scales or zeros repeated for each element they belong to, [N, K], or [N, 1] where that is all of a row."""
        return spread(values, self.format, *self.shape)


def scale_shape(format: LinearFormat, num_rows: int, num_columns: int) -> tuple[int, int]:
    """Of a weight's scale, and of its zeros."""
    return -(-num_rows // format.rows), format.num_groups(num_columns)


def codes_shape(storage: Storage, num_rows: int, num_columns: int) -> tuple[int, int]:
    """Of a weight's codes as they lie in a layer."""
    return num_rows, num_columns // 2 if storage == "int4" else num_columns


def pack_int4(codes: Tensor) -> Tensor:
    """[N, K / 2] from codes of 0 to 15, [N, K] uint8. Raises ValueError where K is odd."""
    if codes.shape[1] % 2:
        raise ValueError(f"an int4 weight has {codes.shape[1]} columns, which must be even to be packed")
    return torch.cat([_pack_block(block) for block in _in_blocks(codes, PACKED_BLOCK)], dim=1)


def unpack_int4(packed: Tensor) -> Tensor:
    """The codes again, [N, K] uint8."""
    return torch.cat([_unpack_block(block) for block in _in_blocks(packed, PACKED_BLOCK // 2)], dim=1)


def _in_blocks(tensor: Tensor, width: int) -> list[Tensor]:
    """The full blocks as one part, [N, blocks, width], and the shorter one at the end as another."""
    full = tensor.shape[1] // width * width
    parts = [tensor[:, :full].unflatten(1, (-1, width))] if full else []
    return [*parts, tensor[:, None, full:]] if full < tensor.shape[1] else parts


def _pack_block(codes: Tensor) -> Tensor:
    low, high = codes.chunk(2, dim=-1)
    return (low | high << 4).flatten(1)


def _unpack_block(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1).flatten(1)


def spread(values: Tensor, format: LinearFormat, num_rows: int, num_columns: int) -> Tensor:
    """See Quantised.spread."""
    if format.rows > 1:
        values = values.repeat_interleave(format.rows, dim=0)[:num_rows]
    if format.group is None:
        return values
    return values.repeat_interleave(format.group, dim=1)[:, :num_columns]


def matrix_of(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] with its columns as they lie, which is the order of a reordered input. Computed in float32 and
    rounded once."""
    zeros = ZERO_CODES[weight.format.storage] if weight.zeros is None else weight.spread(weight.zeros.float())
    return ((weight.codes.float() - zeros) * weight.spread(weight.scale.float())).to(dtype)


def dequantised(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] with its columns in the order of the input: what a quantised weight means."""
    matrix = matrix_of(weight, dtype)
    if weight.permutation is None:
        return matrix
    return torch.empty_like(matrix).index_copy_(1, weight.permutation.long(), matrix)
