"""How the kernels of one row read an int4 weight: each thread makes codes float32 and adds up what it multiplies.

A word of a row has eight codes, the four in its low halves of columns beside each other, the four in its high halves of
as many INT4_HALF further. A code that stands in bits 16 to 19 of 0x43000000, which is 128 in float32, makes it 128 more
than itself: no conversion, of which the device makes a quarter as many as products. What that adds to the sum, and what
the zero takes away, is a factor of the sum of the inputs, which the rows of a thread share. A word's sum is scaled for
its group. How codes, scales and zeros lie: formats/layout.py. Device code, CUDA only.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.few_rows_weights import INT4_BLOCK, INT4_HALF
from graphgen.models.formats.products import Weight
from graphgen.models.spec.formats import PACKED_BLOCK

_LINE = tl.constexpr(64)
"""Bytes that are asked for at once; every row has as many."""
_BIAS = tl.constexpr(128.0)


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
    scale_lines: int
    """Times _LINE that hold the scales of a row, a power of two."""
    by_code: bool
    """Whether PTX is used, which Triton's interpreter does not know."""


def packed(weight: Tensor | Weight, num_columns: int) -> Packed | None:
    """How an int4 weight of so many columns is read, in a format that few_rows_layers.reads; None: it is no such."""
    if isinstance(weight, Tensor) or weight.format.storage != "int4":
        return None
    form = weight.format
    group, groups = form.group or num_columns, form.num_groups(num_columns)
    lines = triton.next_power_of_2(triton.cdiv(groups * weight.scale.itemsize, _LINE.value))
    tile, by_code = min(group, PACKED_BLOCK // 2), not triton.knobs.runtime.interpret
    return Packed(group, groups, form.rows, form.zeros, tile, lines, by_code)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _bring(places: "tl.tensor") -> None:
    """Into the L2 cache."""
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def ask_for(
    weight: "tl.tensor",
    scales: "tl.tensor",
    columns: "tl.tensor",
    K: tl.constexpr,
    BYTES: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """Has the first BYTES of rows `columns` of a weight, and all of their scales, brought into the L2 cache. (In
    registers they would lie otherwise among the threads than the loop has them.)"""
    if HOW.by_code:
        rows = weight + columns.to(tl.int64) * (K // 2)
        _bring(rows[:, None] + tl.arange(0, BYTES // _LINE)[None, :] * _LINE)
        IN_LINE: tl.constexpr = _LINE * 8 // scales.dtype.element_ty.primitive_bitwidth
        groups = tl.minimum(tl.arange(0, HOW.scale_lines) * IN_LINE, HOW.groups - 1)
        _bring(scales + (columns // HOW.scale_rows * HOW.groups)[:, None] + groups[None, :])


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _biased(words: "tl.tensor", HOW: tl.constexpr) -> "tl.tensor":
    """float32: _BIAS more than the code in bits 16 to 19 of each."""
    if HOW.by_code:  # the compiler would take two instructions
        code: tl.constexpr = "lop3.b32 $0, $1, 0x000f0000, 0x43000000, 0xea;"
        biased = tl.inline_asm_elementwise(code, "=f,r", [words], dtype=tl.float32, is_pure=True, pack=1)
    else:
        biased = ((words & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)
    return biased


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _four(x: "tl.tensor", T: tl.constexpr, W: tl.constexpr) -> "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]":
    """[T, 1, W] each: the first, second, third and fourth of every four neighbours, [T, 1, W, 4], in float32."""
    even, odd = tl.split(x.to(tl.float32).reshape(T, 1, W, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _less_bias(
    zero: "tl.tensor", first: "tl.tensor", second: "tl.tensor", third: "tl.tensor", fourth: "tl.tensor"
) -> "tl.tensor":
    """[T, BN, W]: what a sum of products of biased codes is begun with. zero: [T, BN, 1], or [1, 1, 1]."""
    return (-_BIAS - zero) * ((first + second) + (third + fourth))


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
def _zeros_of(zeros: "tl.tensor | None", column: "tl.tensor", HOW: tl.constexpr) -> "tl.tensor":
    """Beside a tile of words."""
    if HOW.zeros:
        zero = _of_groups(zeros, column, HOW).to(tl.float32)[:, :, None]
    else:
        zero = tl.full((1, 1, 1), 8.0, tl.float32)
    return zero


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

    Tiles are [T, BN, W] words: Triton gives neighbours in the first dimension to different threads, and each thread
    several rows, for which it reads the input once. Scales are read a turn ahead.
    """
    T: tl.constexpr = BYTES // HOW.tile
    W: tl.constexpr = HOW.tile // 4
    NARROW: tl.constexpr = HOW.group < INT4_BLOCK
    tiles = tl.arange(0, T)
    bytes_of = tiles * HOW.tile
    in_tile = 4 * tl.arange(0, W)[None, None, :, None] + tl.arange(0, 4)[None, None, None, :]
    rows = weight.to(tl.pointer_type(tl.int32)) + columns.to(tl.int64) * (K // 8)
    places_of = rows[None, :, None] + tl.arange(0, W)[None, None, :]
    first_groups = columns // HOW.scale_rows * HOW.groups
    scales += first_groups
    if HOW.zeros:
        zeros += first_groups
    scale = _of_groups(scales, _column(bytes_of), HOW)
    high_scale = scale
    if NARROW:
        high_scale = _of_groups(scales, _column(bytes_of) + INT4_HALF, HOW)
    sums = tl.zeros((T, BN, W), tl.float32)
    for start in tl.range(0, K // 2, BYTES, num_stages=STAGES):
        column = _column(start + bytes_of)
        inputs = x + column[:, None, None, None] + in_tile
        x0, x1, x2, x3 = _four(tl.load(inputs), T, W)
        y0, y1, y2, y3 = _four(tl.load(inputs + INT4_HALF), T, W)
        words = tl.load(places_of + (start // 4 + tiles * W)[:, None, None])
        following = _column(start + BYTES + bytes_of)
        next_scale = _of_groups(scales, following, HOW)
        next_high_scale = next_scale
        if NARROW:
            next_high_scale = _of_groups(scales, following + INT4_HALF, HOW)
        part = _less_bias(_zeros_of(zeros, column, HOW), x0, x1, x2, x3)
        part += _biased(words << 16, HOW) * x0
        part += _biased(words << 8, HOW) * x1
        part += _biased(words, HOW) * x2
        part += _biased(words >> 8, HOW) * x3
        high = _less_bias(_zeros_of(zeros, column + INT4_HALF, HOW), y0, y1, y2, y3)
        if NARROW:
            sums += part * scale.to(tl.float32)[:, :, None]
        else:
            high += part
        high += _biased(words << 12, HOW) * y0
        high += _biased(words << 4, HOW) * y1
        high += _biased(words >> 4, HOW) * y2
        high += _biased(words >> 12, HOW) * y3
        sums += high * high_scale.to(tl.float32)[:, :, None]
        scale, high_scale = next_scale, next_high_scale
    return tl.sum(tl.sum(sums, 2), 0)
