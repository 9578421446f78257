"""How the kernels of one row multiply an int4 weight: with whole numbers, two products an instruction.

A thread reads pieces of a row: 16 bytes, with the codes of 16 columns in their low halves, and those of the columns
INT4_HALF further in their high halves. It makes the 32 inputs of a piece whole numbers of 16 bits times a power of two
of their own, and multiplies those with the codes of all its rows, exactly (DP2A). A zero takes away itself times the
sum of the inputs, which the rows share. A code in a high half counts 16 times itself, and so needs no shift.

An input is so rounded by at most 2**-15 of the largest in its piece; one in bfloat16 that is no less than a 128th of
that is exact. How codes, scales and zeros lie: formats/layout.py. Device code, CUDA only.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.few_rows_weights import INT4_BLOCK, INT4_HALF
from graphgen.models.formats.products import Weight

_LINE = tl.constexpr(64)
"""Bytes that are asked for at once. Every row has a multiple of it."""
_PIECE = tl.constexpr(16)
"""Bytes of a row. Each is in one group with its low halves, and in one with its high halves."""
_LOW_HALVES = tl.constexpr(0x0F0F0F0F)
_HIGH_HALVES = tl.constexpr(-0x0F0F0F10)
_ONES = tl.constexpr(0x01010101)
_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 near it has whole numbers in its last bits, in two's complement."""
_LEAST = tl.constexpr(2.0**-100)
"""What the largest input of a piece is taken for at least."""
_WITH_ROUNDING = tl.constexpr(1.0 + 2.0**-15)
"""A factor that takes over the next power of two what would be rounded to it."""
_EXPONENT = tl.constexpr(0x7F800000)
"""Bits of a float32. Those of a power of two are no others."""
_ONE = tl.constexpr(127 << 23)
"""1.0, in the bits of a float32."""
_UP = tl.constexpr(14 << 23)
"""Added to the bits of a float32, multiplies it by 2**14."""
_OF_HIGH = tl.constexpr(16)


class Packed(NamedTuple):
    """How a kernel reads an int4 weight; known when it is compiled."""

    group: int
    """Columns that share a scale: 32, 64 or a multiple of 128."""
    groups: int
    """Of a row."""
    scale_rows: int
    """Rows that share a scale."""
    zeros: bool
    scale_lines: int
    """Times _LINE that hold the scales of a row, a power of two."""
    by_code: bool
    """Whether PTX is used, which Triton's interpreter does not know."""


def packed(weight: Tensor | Weight, num_columns: int) -> Packed | None:
    """How an int4 weight of so many columns is read, in a format that few_rows_layers.reads; None: it is no such."""
    if isinstance(weight, Tensor) or weight.format.storage != "int4":
        return None
    form = weight.format
    groups, by_code = form.num_groups(num_columns), not triton.knobs.runtime.interpret
    lines = triton.next_power_of_2(triton.cdiv(groups * weight.scale.itemsize, _LINE.value))
    return Packed(form.group or num_columns, groups, form.rows, form.zeros, lines, by_code)


# --- inputs ----------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _pairs(even: "tl.tensor", odd: "tl.tensor", factor: "tl.tensor", HOW: tl.constexpr) -> "tl.tensor":
    """Of two inputs, times a factor and rounded: 16 bits each of an int32."""
    low = (even * factor + _MAGIC).to(tl.int32, bitcast=True)
    high = (odd * factor + _MAGIC).to(tl.int32, bitcast=True)
    if HOW.by_code:
        code: tl.constexpr = "prmt.b32 $0, $1, $2, 0x5410;"
        both = tl.inline_asm_elementwise(code, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        both = (low & 0xFFFF) | (high << 16)
    return both


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _four(x: "tl.tensor", C: tl.constexpr) -> "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]":
    """[C, 1] each: the columns of x, [C, 4]."""
    even, odd = tl.split(x.reshape(C, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first[:, None], second[:, None], third[:, None], fourth[:, None]


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _of_eight(x: "tl.tensor") -> "tuple[tl.tensor, tl.tensor]":
    """[C, 4] float32 each: of x, [C, 8], the first, third, ... columns, and the others."""
    even, odd = tl.split(x.to(tl.float32).reshape(x.shape[0], 4, 2))
    return even, odd


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _larger(one: "tl.tensor", other: "tl.tensor") -> "tl.tensor":
    """The larger magnitude; NaN where there is one."""
    return tl.maximum(tl.abs(one), tl.abs(other), propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _factors(largest: "tl.tensor") -> "tuple[tl.tensor, tl.tensor]":
    """The power of two that makes numbers up to `largest` ones of 16 bits, and one over it, or NaN where `largest` is
    not finite."""
    exponent = (tl.maximum(largest, _LEAST) * _WITH_ROUNDING).to(tl.int32, bitcast=True) & _EXPONENT
    factor = (-(exponent - _ONE) + _ONE + _UP).to(tl.float32, bitcast=True)
    unit = (exponent - _UP).to(tl.float32, bitcast=True)
    return factor, tl.where(largest < float("inf"), unit, float("nan"))


# --- products --------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _add_two(
    inputs: "tl.tensor", codes: "tl.tensor", result: "tl.tensor", SECOND: tl.constexpr, HOW: tl.constexpr
) -> "tl.tensor":
    """result plus the products of two inputs and the first two bytes of an int32, or its second two."""
    if HOW.by_code:
        code: tl.constexpr = "dp2a.hi.s32.u32 $0, $1, $2, $3;" if SECOND else "dp2a.lo.s32.u32 $0, $1, $2, $3;"
        operands = [inputs, codes, result]
        result = tl.inline_asm_elementwise(code, "=r,r,r,r", operands, dtype=tl.int32, is_pure=True, pack=1)
    else:
        two = (codes >> 16) if SECOND else codes
        result += (inputs << 16 >> 16) * (two & 255) + (inputs >> 16) * (two >> 8 & 255)
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _add_eight(
    pairs: "tl.tensor", first: "tl.tensor", second: "tl.tensor", result: "tl.tensor", HOW: tl.constexpr
) -> "tl.tensor":
    """The same of four pairs of inputs and the eight bytes of two int32."""
    result = _add_two(pairs[0], first, result, False, HOW)
    result = _add_two(pairs[1], first, result, True, HOW)
    result = _add_two(pairs[2], second, result, False, HOW)
    return _add_two(pairs[3], second, result, True, HOW)


# --- a row -----------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _column(piece: "tl.tensor") -> "tl.tensor":
    """The first that a piece of a row has in its low halves. Those in its high halves are INT4_HALF further."""
    IN_BLOCK: tl.constexpr = INT4_HALF // _PIECE
    return piece // IN_BLOCK * INT4_BLOCK + piece % IN_BLOCK * _PIECE


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _of_groups(
    numbers: "tl.tensor", column: "tl.tensor", first: "tl.tensor", rows: "tl.tensor", HOW: tl.constexpr
) -> "tl.tensor":
    """[C, BN]: scales or zeros of the groups that each `column`, [C], is in. first, rows: see read_pieces."""
    group = (column // HOW.group)[:, None]
    if HOW.scale_rows == 1:
        places = numbers + first.to(tl.int64) * HOW.groups + group + (rows.to(tl.int64) * HOW.groups)[None, :]
    else:
        places = numbers + ((first + rows) // HOW.scale_rows * HOW.groups)[None, :] + group
    return tl.load(places)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def read_pieces(
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor | None",
    first: "tl.tensor",
    rows: "tl.tensor",
    turn: "tl.tensor",
    K: tl.constexpr,
    BYTES: tl.constexpr,
    HOW: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]":
    """What a turn multiplies of rows `first + rows` of a weight, BYTES of each: words, [C, BN, 4] for C pieces, and for
    each piece, [C, BN], scale and zero of its low halves, and scale and zero of its high halves. rows: [BN],
    known when this is compiled, so that the places of a thread's rows differ by constants.

    Triton gives neighbours in the first dimension to different threads, and each thread several rows. Behind a row its
    last piece is read again.
    """
    PIECES: tl.constexpr = BYTES // _PIECE
    piece = turn * PIECES + tl.arange(0, PIECES)
    if K % (2 * BYTES):
        piece = tl.minimum(piece, K // 2 // _PIECE - 1)
    own = weight.to(tl.pointer_type(tl.int32)) + first.to(tl.int64) * (K // 8)
    own += (piece * 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
    words = tl.load(own + (rows.to(tl.int64) * (K // 8))[None, :, None])
    column = _column(piece)
    scale = _of_groups(scales, column, first, rows, HOW)
    zero = tl.full((1, 1), 8, tl.int32)
    if HOW.zeros:
        zero = _of_groups(zeros, column, first, rows, HOW)
    scale_of_high, zero_of_high = scale, zero
    if HOW.group < INT4_BLOCK:
        scale_of_high = _of_groups(scales, column + INT4_HALF, first, rows, HOW)
        if HOW.zeros:
            zero_of_high = _of_groups(zeros, column + INT4_HALF, first, rows, HOW)
    return words, scale, zero, scale_of_high, zero_of_high


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _bring(places: "tl.tensor") -> None:
    """Into the L2 cache."""
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _ask_for_turn(
    weight: "tl.tensor",
    first: "tl.tensor",
    rows: "tl.tensor",
    turn: "tl.tensor",
    K: tl.constexpr,
    BYTES: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """Has what a turn reads of a weight brought into the L2 cache; behind a row its last line. See read_pieces."""
    if HOW.by_code:
        line = tl.minimum(turn * BYTES + tl.arange(0, BYTES // _LINE) * _LINE, K // 2 - _LINE)
        _bring(weight + first.to(tl.int64) * (K // 2) + line[None, :] + (rows.to(tl.int64) * (K // 2))[:, None])


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _ask_for_groups(numbers: "tl.tensor", first: "tl.tensor", rows: "tl.tensor", HOW: tl.constexpr) -> None:
    """The same of all scales or zeros."""
    if HOW.by_code:
        IN_LINE: tl.constexpr = _LINE * 8 // numbers.dtype.element_ty.primitive_bitwidth
        group = tl.minimum(tl.arange(0, HOW.scale_lines) * IN_LINE, HOW.groups - 1)
        _bring(numbers + ((first + rows) // HOW.scale_rows * HOW.groups)[:, None] + group[None, :])


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def ask_for(
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor | None",
    first: "tl.tensor",
    rows: "tl.tensor",
    K: tl.constexpr,
    BYTES: tl.constexpr,
    STAGES: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """Has what the turns behind the first read brought into the L2 cache: of the weight what STAGES - 1 of them do, all
    scales and all zeros. (The compiler puts off what is loaded a turn ahead, to save registers.)"""
    if K > 2 * BYTES:
        for turn in tl.static_range(1, STAGES):
            _ask_for_turn(weight, first, rows, turn, K, BYTES, HOW)
        _ask_for_groups(scales, first, rows, HOW)
        if HOW.zeros:
            _ask_for_groups(zeros, first, rows, HOW)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _read_inputs(
    x: "tl.tensor", turn: "tl.tensor", K: tl.constexpr, BYTES: tl.constexpr
) -> "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]":
    """[C, 8] each: what the pieces of a turn are multiplied with of one row, [K]; of their low halves the first eight
    and the others, then of their high halves. Zeros behind the row."""
    column = _column(turn * (BYTES // _PIECE) + tl.arange(0, BYTES // _PIECE))
    places = x + column[:, None] + tl.arange(0, 8)[None, :]
    inside = (column < K)[:, None] if K % (2 * BYTES) else None
    other = None if inside is None else 0.0
    first = tl.load(places, inside, other=other)
    second = tl.load(places + 8, inside, other=other)
    of_high = tl.load(places + INT4_HALF, inside, other=other)
    return first, second, of_high, tl.load(places + INT4_HALF + 8, inside, other=other)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _times_pieces(
    inputs: "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]",
    read: "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]",
    HOW: tl.constexpr,
) -> "tl.tensor":
    """[C, BN] float32: what _read_inputs has read for a turn times what read_pieces has."""
    words, scale, zero, scale_of_high, zero_of_high = read
    C: tl.constexpr = words.shape[0]
    a, b = _of_eight(inputs[0])
    c, d = _of_eight(inputs[1])
    e, f = _of_eight(inputs[2])
    g, h = _of_eight(inputs[3])
    m0, m1, m2, m3 = _four(_larger(_larger(_larger(a, b), _larger(c, d)), _larger(_larger(e, f), _larger(g, h))), C)
    factor, unit = _factors(_larger(_larger(m0, m1), _larger(m2, m3)))
    ab, cd = _four(_pairs(a, b, factor, HOW), C), _four(_pairs(c, d, factor, HOW), C)
    ef, gh = _four(_pairs(e, f, factor, HOW), C), _four(_pairs(g, h, factor, HOW), C)
    nothing, ones = tl.zeros((C, 1), tl.int32), tl.full((C, 1), _ONES, tl.int32)
    total = _add_eight(cd, ones, ones, _add_eight(ab, ones, ones, nothing, HOW), HOW)
    total_of_high = _add_eight(gh, ones, ones, _add_eight(ef, ones, ones, nothing, HOW), HOW)
    even_words, odd_words = tl.split(words.reshape(C, words.shape[1], 2, 2))
    word0, word2 = tl.split(even_words)
    word1, word3 = tl.split(odd_words)
    low = _add_eight(ab, word0 & _LOW_HALVES, word1 & _LOW_HALVES, nothing, HOW)
    low = _add_eight(cd, word2 & _LOW_HALVES, word3 & _LOW_HALVES, low, HOW)
    if HOW.group < INT4_BLOCK:
        low -= zero.to(tl.int32) * total
        of_high = zero_of_high.to(tl.int32) * (total_of_high * -_OF_HIGH)
    else:
        of_high = zero.to(tl.int32) * ((total + total_of_high) * -_OF_HIGH)
    of_high = _add_eight(ef, word0 & _HIGH_HALVES, word1 & _HIGH_HALVES, of_high, HOW)
    of_high = _add_eight(gh, word2 & _HIGH_HALVES, word3 & _HIGH_HALVES, of_high, HOW)
    unit /= _OF_HIGH
    if HOW.group < INT4_BLOCK:
        part = (low * _OF_HIGH).to(tl.float32) * (scale.to(tl.float32) * unit)
        part += of_high.to(tl.float32) * (scale_of_high.to(tl.float32) * unit)
    else:
        part = (low * _OF_HIGH + of_high).to(tl.float32) * (scale.to(tl.float32) * unit)
    return part


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _halved(sums: "tl.tensor", BIT: tl.constexpr) -> "tl.tensor":
    """[P, 32, R / 2] of [P, 32, R]: of two rows beside each other each of two threads keeps one and gives the other
    away, so that what is left of a row's bits says which of 2 * BIT threads has it."""
    P: tl.constexpr = sums.shape[0]
    HALF: tl.constexpr = sums.shape[2] // 2
    even, odd = tl.split(sums.reshape(P, 32, HALF, 2))
    thread = tl.arange(0, 32)[None, :, None]
    keeps_odd = (thread & BIT) != 0
    other = tl.broadcast_to(thread ^ BIT, (P, 32, HALF))
    return tl.where(keeps_odd, odd, even) + tl.gather(tl.where(keeps_odd, even, odd), other, 1)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _sum(sums: "tl.tensor", C: tl.constexpr, BN: tl.constexpr) -> "tl.tensor":
    """[BN] of [C, BN], BN at most 32."""
    sums = sums.reshape(C // 32, 32, BN)
    if BN > 1:
        sums = _halved(sums, 1)
    if BN > 2:
        sums = _halved(sums, 2)
    if BN > 4:
        sums = _halved(sums, 4)
    if BN > 8:
        sums = _halved(sums, 8)
    if BN > 16:
        sums = _halved(sums, 16)
    return tl.sum(sums.reshape(C // BN, BN), 0)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def times_packed(
    x: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor | None",
    first: "tl.tensor",
    rows: "tl.tensor",
    early: "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]",
    K: tl.constexpr,
    BYTES: tl.constexpr,
    STAGES: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """[BN] float32: one row, [K], times rows `first + rows` of a weight, BYTES of each at a time. early: what
    read_pieces reads for turn 0. Every turn reads for the one that follows, and asks for what is read STAGES later."""
    TURNS: tl.constexpr = (K // 2 + BYTES - 1) // BYTES
    read, inputs = early, _read_inputs(x, 0, K, BYTES)
    sums = tl.zeros((BYTES // _PIECE, rows.shape[0]), tl.float32)
    for turn in range(TURNS - 1):
        following = read_pieces(weight, scales, zeros, first, rows, turn + 1, K, BYTES, HOW)
        if STAGES > 1:
            _ask_for_turn(weight, first, rows, turn + STAGES, K, BYTES, HOW)
        following_inputs = _read_inputs(x, turn + 1, K, BYTES)
        sums += _times_pieces(inputs, read, HOW)
        read, inputs = following, following_inputs
    sums += _times_pieces(inputs, read, HOW)
    return _sum(sums, BYTES // _PIECE, rows.shape[0])
