"""How the kernels of one row read an int4 weight: each thread makes codes float32 and adds up what it multiplies.

A byte holds two columns of one block, so a tile of bytes is multiplied with two tiles of the input. Codes become
float32 by their place in the mantissa of a number whose unit is there, less that number: exact, and no conversion,
which the device makes a quarter as fast as it adds. Sums are scaled for each group; those of a thread are of one
group. How codes, scales and zeros lie: formats/layout.py. Device code, CUDA only.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.few_rows_weights import INT4_BLOCK, INT4_HALF
from graphgen.models.formats.products import Weight
from graphgen.models.spec.formats import PACKED_BLOCK

_LINE = tl.constexpr(128)
"""Bytes that a memory access brings."""


class Packed(NamedTuple):
    """How a kernel reads an int4 weight; known when it is compiled."""

    group: int
    """Columns that share a scale: 32, 64 or a multiple of 128."""
    groups: int
    """Of a row."""
    scale_rows: int
    """Rows that share a scale."""
    zeros: bool
    tile: int
    """Bytes of a row beside each other whose low halves are of one group, and whose high halves are."""
    by_code: bool
    """Whether codes become float32 by PTX, which Triton's interpreter does not know."""


def packed(weight: Tensor | Weight, num_columns: int) -> Packed | None:
    """How an int4 weight of so many columns is read, in a format that few_rows_layers.reads; None: it is no such."""
    if isinstance(weight, Tensor) or weight.format.storage != "int4":
        return None
    form, half = weight.format, PACKED_BLOCK // 2
    group = form.group or num_columns
    return Packed(
        group, form.num_groups(num_columns), form.rows, form.zeros, min(group, half), not triton.knobs.runtime.interpret
    )


# Four bytes at a time: of each the code in its low half, less 8, then that in its high half. A code in bits 16 to 19
# of 0x43000000, which is 128, makes it 128 more than itself; in bits 0 to 3 of 0x4b000000, which is 2**23, the same.
_CODES = tl.constexpr(
    """
    {
    .reg .b32 a, b, c, d, by8, by12;
    shr.u32 by8, $8, 8;
    shr.u32 by12, $8, 12;
    lop3.b32 a, $8, 0x0000000f, 0x4b000000, 0xea;
    lop3.b32 b, $8, 0x00000f00, 0x47000000, 0xea;
    lop3.b32 c, $8, 0x000f0000, 0x43000000, 0xea;
    lop3.b32 d, by8, 0x000f0000, 0x43000000, 0xea;
    sub.f32 $0, a, 0f4b000008;
    sub.f32 $1, b, 0f47000800;
    sub.f32 $2, c, 0f43080000;
    sub.f32 $3, d, 0f43080000;
    lop3.b32 a, $8, 0x000000f0, 0x49000000, 0xea;
    lop3.b32 b, $8, 0x0000f000, 0x45000000, 0xea;
    lop3.b32 c, by8, 0x0000f000, 0x45000000, 0xea;
    lop3.b32 d, by12, 0x000f0000, 0x43000000, 0xea;
    sub.f32 $4, a, 0f49000080;
    sub.f32 $5, b, 0f45008000;
    sub.f32 $6, c, 0f45008000;
    sub.f32 $7, d, 0f43080000;
    }
    """
)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _codes(raw: "tl.tensor", HOW: tl.constexpr) -> "tuple[tl.tensor, tl.tensor]":
    """float32 of the low and of the high halves of bytes, less 8."""
    if HOW.by_code:
        low, high = tl.inline_asm_elementwise(
            _CODES, "=f,=f,=f,=f,=f,=f,=f,=f,r", [raw], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    else:
        low, high = (raw & 15).to(tl.float32) - 8.0, (raw >> 4).to(tl.float32) - 8.0
    return low, high


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def ask_for(weight: "tl.tensor", columns: "tl.tensor", K: tl.constexpr, BYTES: tl.constexpr, HOW: tl.constexpr) -> None:
    """Has the first BYTES of rows `columns` of a weight brought into the L2 cache. (In registers they would lie
    otherwise among the threads than the loop has them.)"""
    if HOW.by_code:
        rows = weight + columns.to(tl.int64) * (K // 2)
        places = rows[:, None] + tl.arange(0, BYTES // _LINE)[None, :] * _LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [places.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _column(byte: "tl.tensor") -> "tl.tensor":
    """That a byte of a row has in its low half. The one in its high half is INT4_HALF further."""
    return byte // INT4_HALF * INT4_BLOCK + byte % INT4_HALF


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _of_groups(numbers: "tl.tensor", column: "tl.tensor", HOW: tl.constexpr) -> "tl.tensor":
    """[T, BN]: of the group that each `column`, [T], is in. numbers: [BN] where those of a row begin."""
    group = tl.minimum(column // HOW.group, HOW.groups - 1)  # of what lies behind the row nobody asks
    return tl.load(numbers[None, :] + group[:, None])


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def times_packed(
    x: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor | None",
    columns: "tl.tensor",
    K: tl.constexpr,
    BN: tl.constexpr,
    BYTES: tl.constexpr,
    STAGES: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """[BN] float32: one row, [K], times rows `columns` of a weight, BYTES of each at a time.

    Tiles are [T, BN, tile]: Triton gives neighbours in the first dimension to different threads, and each thread
    several rows, for which it reads the input once. Scales and zeros are read a turn ahead.
    """
    TILE: tl.constexpr = HOW.tile
    TILES: tl.constexpr = BYTES // HOW.tile
    NARROW: tl.constexpr = HOW.group < INT4_BLOCK
    first_groups = columns // HOW.scale_rows * HOW.groups
    weight_rows = (weight + columns.to(tl.int64) * (K // 2))[None, :, None]
    tiles = tl.arange(0, TILES) * TILE
    along = tl.arange(0, TILE)[None, None, :]
    scales += first_groups
    scale = _of_groups(scales, _column(tiles), HOW)
    high_scale, zero, high_zero = scale, scale, scale
    if NARROW:
        high_scale = _of_groups(scales, _column(tiles) + INT4_HALF, HOW)
    if HOW.zeros:
        zeros += first_groups
        zero = _of_groups(zeros, _column(tiles), HOW)
        high_zero = zero
        if NARROW:
            high_zero = _of_groups(zeros, _column(tiles) + INT4_HALF, HOW)
    sums = tl.zeros((TILES, BN, TILE), tl.float32)
    for start in tl.range(0, K // 2, BYTES, num_stages=STAGES):
        places = x + _column(start + tiles)[:, None, None] + along
        of_low, of_high = tl.load(places).to(tl.float32), tl.load(places + INT4_HALF).to(tl.float32)
        raw = tl.load(weight_rows + (start + tiles)[:, None, None] + along)
        following = _column(start + BYTES + tiles)
        next_scale = _of_groups(scales, following, HOW)
        next_high_scale, next_zero, next_high_zero = next_scale, zero, high_zero
        if NARROW:
            next_high_scale = _of_groups(scales, following + INT4_HALF, HOW)
        if HOW.zeros:
            next_zero = _of_groups(zeros, following, HOW)
            next_high_zero = next_zero
            if NARROW:
                next_high_zero = _of_groups(zeros, following + INT4_HALF, HOW)
        low, high = _codes(raw, HOW)
        if NARROW:
            low_part, high_part = low * of_low, high * of_high
            if HOW.zeros:
                low_part -= (zero.to(tl.float32) - 8.0)[:, :, None] * of_low
                high_part -= (high_zero.to(tl.float32) - 8.0)[:, :, None] * of_high
            sums += low_part * scale.to(tl.float32)[:, :, None]
            sums += high_part * high_scale.to(tl.float32)[:, :, None]
        else:
            part = low * of_low
            part += high * of_high
            if HOW.zeros:
                part -= (zero.to(tl.float32) - 8.0)[:, :, None] * (of_low + of_high)
            sums += part * scale.to(tl.float32)[:, :, None]
        scale, high_scale, zero, high_zero = next_scale, next_high_scale, next_zero, next_high_zero
    return tl.sum(tl.sum(sums, 2), 0)
