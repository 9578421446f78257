"""How kernels read a weight that lies in fewer bits than bfloat16: those of few_rows.py here, and with what bytes
become, those of experts/. Device code, CUDA only.

A tile of the weight is read as bytes, made bfloat16 in registers, exactly, and multiplied there. Its scale comes after
the product, since one factor for 128 products costs less than one for each weight: once, at the end, where a row has
one scale, else for every group of columns, whose scale is fetched while the group ahead is multiplied.

How the codes, scales and zeros of a weight lie: formats/layout.py. Rows of a weight are columns of its product.
"""

from typing import NamedTuple

import triton
import triton.language as tl

E4M3 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)

INT4_BLOCK = tl.constexpr(128)
"""Columns of a weight that share bytes: column j, in the low half of a byte, with column j + 64."""
INT4_HALF = tl.constexpr(64)


class Reading(NamedTuple):
    """How a kernel reads a weight; known when it is compiled."""

    storage: int
    """E4M3, INT8 or INT4."""
    group: int
    """Columns that share a scale; 0: all of a row."""
    scale_rows: int
    """Rows that share a scale."""
    zeros: bool
    depth: int
    """Columns in one turn of a kernel's loop."""
    tile_bytes: int
    """Bytes of a row that are read at once: those of one group, or of less."""
    conversion: int
    """How bytes become bfloat16: 0 as Triton does it, 1 by PTX, 2 (e4m3) by PTX that needs SM89. int8: always 0."""
    slices: int
    """0: the warps of a program share its columns, and the weight is the right operand of the tensor cores. S: each of
    S warps has all columns and a slice of the depth, and the sums of the slices are added up at the end; the weight is
    the left operand, of which the tensor cores take 16 columns with 8 rows of the input."""


# Four bytes at a time. e4m3: the byte, widened by its sign to 16 bits and moved by four, has sign, exponent and
# mantissa where a bfloat16 has them. That is 2**-120 of its value, which a product by 2**120 makes exact, also of
# subnormal numbers.
_E4M3_BY_SHIFT = tl.constexpr(
    """
    {
    .reg .b32 a, b, most, none;
    prmt.b32 a, $2, 0, 0x9180;
    prmt.b32 b, $2, 0, 0xb3a2;
    shl.b32 a, a, 4;
    shl.b32 b, b, 4;
    and.b32 a, a, 0x87f087f0;
    and.b32 b, b, 0x87f087f0;
    mov.b32 most, 0x7b807b80;
    mov.b32 none, 0x80008000;
    fma.rn.bf16x2 $0, a, most, none;
    fma.rn.bf16x2 $1, b, most, none;
    }
    """
)
# e4m3 by the conversions that a device from SM89 on has.
_E4M3_BY_FLOATS = tl.constexpr(
    """
    {
    .reg .b16 a, b, c, d, e, f;
    .reg .b32 g, h;
    .reg .f32 i, j, k, l;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 g, a;
    cvt.rn.f16x2.e4m3x2 h, b;
    mov.b32 {c, d}, g;
    mov.b32 {e, f}, h;
    cvt.f32.f16 i, c;
    cvt.f32.f16 j, d;
    cvt.f32.f16 k, e;
    cvt.f32.f16 l, f;
    cvt.rn.bf16x2.f32 $0, j, i;
    cvt.rn.bf16x2.f32 $1, l, k;
    }
    """
)
# int4: a bfloat16 of 128 has its ones in the last bits, so four bits there make 128 to 143.
_LOW_OF_INT4 = tl.constexpr(
    """
    {
    .reg .b32 a, b;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
    }
    """
)
_HIGH_OF_INT4 = tl.constexpr(
    """
    {
    .reg .b32 a, b;
    shr.u32 b, $2, 4;
    prmt.b32 a, b, 0, 0x4140;
    prmt.b32 b, b, 0, 0x4342;
    lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
    }
    """
)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _by_code(raw: "tl.tensor", CODE: tl.constexpr) -> "tl.tensor":
    return tl.inline_asm_elementwise(CODE, "=r,=r,r", [raw], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def of_bytes(raw: "tl.tensor", DTYPE: tl.constexpr, HOW: tl.constexpr) -> "tl.tensor":
    """A tile of e4m3 or int8 in the dtype of what it is multiplied with, without its scale."""
    if HOW.storage == INT8:
        tile = raw.to(DTYPE)
    elif HOW.conversion:
        tile = _by_code(raw, _E4M3_BY_SHIFT if HOW.conversion == 1 else _E4M3_BY_FLOATS).to(DTYPE)
    else:
        tile = raw.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return tile


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def of_nibbles(
    raw: "tl.tensor", zero: "tl.tensor", HIGH: tl.constexpr, DTYPE: tl.constexpr, HOW: tl.constexpr
) -> "tl.tensor":
    """The same of one half of the bytes of int4, less its zero. Whole numbers, hence exact."""
    if HOW.conversion:
        tile = (_by_code(raw, _HIGH_OF_INT4 if HIGH else _LOW_OF_INT4) - (zero + 128.0).to(tl.bfloat16)).to(DTYPE)
    else:
        tile = ((raw >> 4) if HIGH else (raw & 15)).to(DTYPE) - zero.to(DTYPE)
    return tile


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _beside(vector: "tl.tensor", HOW: tl.constexpr) -> "tl.tensor":
    """A number of each of the weight's rows, [BN] or of each slice [S, BN], beside a tile or a sum."""
    return vector[:, :, None] if HOW.slices else vector[None, :]


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _dot(left: "tl.tensor", tile: "tl.tensor", result: "tl.tensor", HOW: tl.constexpr) -> "tl.tensor":
    return tl.dot(tile, left, result) if HOW.slices else tl.dot(left, tile, result)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _left(x: "tl.tensor", start: int, num_rows: int, K: int, BM: tl.constexpr, HOW: tl.constexpr) -> "tl.tensor":
    """[BM, tile_bytes] or [S, tile_bytes, BM]: columns `start` and on of x, [num_rows, K], as many as a raw tile has
    bytes, in each slice."""
    rows = tl.arange(0, BM)
    depth = start + tl.arange(0, HOW.tile_bytes)
    if HOW.slices:
        slices = tl.arange(0, HOW.slices) * (HOW.depth // HOW.slices)
        places = rows[None, None, :] * K + depth[None, :, None] + slices[:, None, None]
        left = tl.load(x + places, (rows < num_rows)[None, None, :], other=0.0)
    else:
        left = tl.load(x + rows[:, None] * K + depth[None, :], (rows < num_rows)[:, None], other=0.0)
    return left


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def raw_tile(weight: "tl.tensor", columns: "tl.tensor", start: int, K: int, HOW: tl.constexpr) -> "tl.tensor":
    """[tile_bytes, BN] or [S, BN, tile_bytes]: bytes `start` and on of rows `columns` of a weight. No step writes
    weights, so a kernel may read them while the one ahead still runs."""
    row_bytes = K // INT4_BLOCK * INT4_HALF if HOW.storage == INT4 else K
    rows = weight + columns.to(tl.int64) * row_bytes
    depth = start + tl.arange(0, HOW.tile_bytes)
    if HOW.slices:
        slices = tl.arange(0, HOW.slices) * (HOW.depth // HOW.slices // (2 if HOW.storage == INT4 else 1))
        places = rows[None, :, None] + depth[None, None, :] + slices[:, None, None]
    else:
        places = rows[None, :] + depth[:, None]
    return tl.load(places)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _of_group(numbers: "tl.tensor", start: int, HOW: tl.constexpr) -> "tl.tensor":
    """Scales or zeros of the group of each row, [BN] or [S, BN], that holds column `start`, of each slice. numbers:
    [BN] where those of a row begin."""
    if HOW.slices:
        slices = tl.arange(0, HOW.slices) * (HOW.depth // HOW.slices)
        group = (start + slices) // HOW.group if HOW.group else slices * 0
        chosen = tl.load(numbers[None, :] + group[:, None])
    else:
        chosen = tl.load(numbers + (start // HOW.group if HOW.group else 0))
    return chosen.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _zero(zeros: "tl.tensor", start: int, HOW: tl.constexpr) -> "tl.tensor":
    """What is subtracted from the codes of int4 from column `start` on, beside a tile. (Not fetched ahead: then it
    would reach the tensor cores by way of shared memory, and the tile with it.)"""
    if HOW.zeros:
        zero = _beside(_of_group(zeros, start, HOW), HOW)
    elif HOW.slices:
        zero = tl.full((1, 1, 1), 8.0, tl.float32)
    else:
        zero = tl.full((1, 1), 8.0, tl.float32)
    return zero


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _start_of(k: int, tile: tl.constexpr, HOW: tl.constexpr) -> int:
    """First column of a raw tile in the turn that begins at column k, in the first slice."""
    byte: tl.constexpr = tile * HOW.tile_bytes
    # A byte of int4 belongs to a column of a block, INT4_BLOCK wide, that has INT4_HALF bytes.
    start: int = k + (byte // 64 * 128 + byte % 64 if HOW.storage == INT4 else byte)
    return start


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _add_tile(
    result: "tl.tensor",
    raw: "tl.tensor",
    left: "tl.tensor",
    left_of_high: "tl.tensor",
    scale: "tl.tensor",
    scale_of_high: "tl.tensor",
    zeros: "tl.tensor",
    start: int,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """Adds the product of a raw tile whose first column is `start`."""
    if HOW.storage != INT4:
        if HOW.group:
            part = _dot(left, of_bytes(raw, left.dtype, HOW), tl.zeros_like(result), HOW)
            result += part * _beside(scale, HOW)
        else:
            result = _dot(left, of_bytes(raw, left.dtype, HOW), result, HOW)
    else:
        low = of_nibbles(raw, _zero(zeros, start, HOW), False, left.dtype, HOW)
        high = of_nibbles(raw, _zero(zeros, start + INT4_HALF, HOW), True, left.dtype, HOW)
        if HOW.group:
            part = _dot(left, low, tl.zeros_like(result), HOW)
            if HOW.group < INT4_BLOCK:
                result += part * _beside(scale, HOW)
                part = _dot(left_of_high, high, tl.zeros_like(result), HOW)
                result += part * _beside(scale_of_high, HOW)
            else:
                part = _dot(left_of_high, high, part, HOW)
                result += part * _beside(scale, HOW)
        else:
            result = _dot(left, low, result, HOW)
            result = _dot(left_of_high, high, result, HOW)
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def stored_product(
    x: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor",
    columns: "tl.tensor",
    first: "tl.tensor",
    num_rows: int,
    K: int,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """[BM, BN] float32: rows of x, [num_rows, K], times BN rows `columns` of a weight, with their scales. EARLY: the
    first `depth` columns are one raw tile, and it is there: `first`."""
    PACKED: tl.constexpr = HOW.storage == INT4
    NUM_SLICES: tl.constexpr = HOW.slices if HOW.slices else 1
    TILES: tl.constexpr = HOW.depth // NUM_SLICES // HOW.tile_bytes // (2 if PACKED else 1)
    FIRST_TURN: tl.constexpr = HOW.depth if EARLY else 0
    groups = tl.cdiv(K, HOW.group) if HOW.group else 1
    first_group = columns // HOW.scale_rows * groups
    scales += first_group
    if HOW.zeros:
        zeros += first_group
    if HOW.slices:  # noqa: SIM108  # Triton's two branches may differ in shape
        result = tl.zeros((NUM_SLICES, BN, BM), tl.float32)
    else:
        result = tl.zeros((BM, BN), tl.float32)
    first_scale = _of_group(scales, 0, HOW)
    first_scale_of_high, scale, scale_of_high = first_scale, first_scale, first_scale
    if HOW.group:
        scale = _of_group(scales, FIRST_TURN, HOW)
        scale_of_high = scale
        if PACKED and HOW.group < INT4_BLOCK:
            first_scale_of_high = _of_group(scales, INT4_HALF, HOW)
            scale_of_high = _of_group(scales, FIRST_TURN + INT4_HALF, HOW)
    if EARLY:
        first_left = _left(x, 0, num_rows, K, BM, HOW)
        first_high = _left(x, INT4_HALF, num_rows, K, BM, HOW) if PACKED else first_left
    for k in range(FIRST_TURN, K, HOW.depth):
        for tile in tl.static_range(TILES):
            start = _start_of(k, tile, HOW)
            raw = raw_tile(weight, columns, k // (2 if PACKED else 1) + tile * HOW.tile_bytes, K, HOW)
            left = _left(x, start, num_rows, K, BM, HOW)
            high = _left(x, start + INT4_HALF, num_rows, K, BM, HOW) if PACKED else left
            if HOW.group:
                following = _start_of(k if tile + 1 < TILES else k + HOW.depth, (tile + 1) % TILES, HOW)
                following = tl.where(following < K, following, 0)  # of the last one nobody asks
                next_scale = _of_group(scales, following, HOW)
                next_of_high = next_scale
                if PACKED and HOW.group < INT4_BLOCK:
                    next_of_high = _of_group(scales, following + INT4_HALF, HOW)
            result = _add_tile(result, raw, left, high, scale, scale_of_high, zeros, start, HOW)
            if HOW.group:
                scale, scale_of_high = next_scale, next_of_high
    if EARLY:  # behind the loop, whose loads should not wait for this one's
        result = _add_tile(result, first, first_left, first_high, first_scale, first_scale_of_high, zeros, 0, HOW)
    if not HOW.group:
        result *= _beside(first_scale, HOW)
    if HOW.slices:
        result = tl.trans(tl.sum(result, 0))
    return result
