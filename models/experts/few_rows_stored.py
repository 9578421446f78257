"""The products of few_rows_kernels.py with quantised weights: one row, and one expert or several behind one another.

Each of S warps has a slice of what is read, and multiplies it in the tensor cores with the weight as the left operand:
of eight rows that those take, one is there, but bytes become bfloat16 where it is needed, and nothing else limits the
reading. A tile's scale comes after its product, and is fetched while the tile ahead is multiplied. How the codes,
scales and zeros of a weight lie: formats/layout.py. Device code, CUDA only.

HOW: few_rows_weights.Reading, of which `depth` means nothing here.
"""

import triton
import triton.language as tl

from graphgen.models.few_rows_tiles import STORAGES
from graphgen.models.few_rows_weights import INT4, INT4_BLOCK, Reading, of_bytes, of_nibbles
from graphgen.models.spec.formats import PACKED_BLOCK, LinearFormat


def reading_of(form: LinearFormat, num_columns: int, columns: int, slices: int) -> Reading:
    """How a weight [N, num_columns] is read by so many warps, at most `columns` of a row at a time each."""
    return Reading(
        STORAGES[form.storage],
        0 if form.group is None or form.group >= num_columns else form.group,
        form.rows,
        form.zeros,
        depth=0,
        tile_bytes=form.tile_bytes(num_columns, min(columns, PACKED_BLOCK)),
        conversion=0 if triton.knobs.runtime.interpret else 1,
        slices=slices,
    )


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _place(
    tile: "tl.tensor", chosen: "tl.tensor", PAIRS: tl.constexpr, ROW_BYTES: tl.constexpr, HOW: tl.constexpr
) -> "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]":
    """[S] of tiles: which of a row's experts each is of, counted and by its number, its first byte in a row of that
    expert's weight, and the column which that is. (Reads nothing, or what is read from there would wait for it.)"""
    pair, byte = tile * HOW.tile_bytes // ROW_BYTES, tile * HOW.tile_bytes % ROW_BYTES
    expert = tl.sum(tl.where(tl.arange(0, PAIRS)[None, :] == pair[:, None], chosen[None, :], 0), 1)
    column = byte // 64 * 128 + byte % 64 if HOW.storage == INT4 else byte
    return pair, expert, byte, column


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _of_groups(
    numbers: "tl.tensor",
    rows: "tl.tensor",
    column: "tl.tensor",
    inside: "tl.tensor",
    GROUPS: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """[S, BN] float32: scales or zeros of the group of each row, [S, BN], that `column` of it, [S], is in."""
    group = (column // HOW.group if HOW.group else column * 0)[:, None]
    return tl.load(numbers + rows // HOW.scale_rows * GROUPS + group, inside[:, None], other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _zero(
    zeros: "tl.tensor",
    rows: "tl.tensor",
    column: "tl.tensor",
    inside: "tl.tensor",
    GROUPS: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """What is subtracted from the codes of int4, beside a tile [S, BN, bytes]."""
    if HOW.zeros:
        zero = _of_groups(zeros, rows, column, inside, GROUPS, HOW)[:, :, None]
    else:
        zero = tl.full((1, 1, 1), 8.0, tl.float32)
    return zero


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def row_product(
    x: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor",
    chosen: "tl.tensor",
    columns: "tl.tensor",
    N: int,
    num_experts: int,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    PAIRS: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """[S, BN, 8] float32, to be added up by `added`: COUNT rows of the input, [K] each, times rows `columns` of the
    weights of the experts `chosen`, [PAIRS] of which COUNT are some. A weight has N rows of each of so many experts, in
    a format that few_rows_layers.reads. Zeros where any of the chosen is none of them. PAIRS: a power of two."""
    PACKED: tl.constexpr = HOW.storage == INT4
    SLICES: tl.constexpr = HOW.slices
    ROW_BYTES: tl.constexpr = K // 2 if PACKED else K
    GROUPS: tl.constexpr = (K + HOW.group - 1) // HOW.group if HOW.group else 1
    NARROW: tl.constexpr = PACKED and (HOW.group != 0 and HOW.group < INT4_BLOCK)
    TILE: tl.constexpr = HOW.tile_bytes
    TILES: tl.constexpr = COUNT * ROW_BYTES // HOW.tile_bytes
    TURNS: tl.constexpr = (TILES + SLICES - 1) // SLICES
    rows = tl.arange(0, 8)[None, None, :]
    along = tl.arange(0, HOW.tile_bytes)
    num_tiles = tl.where(tl.max(chosen, 0) < num_experts, TILES, 0)
    turns = tl.minimum(num_tiles, TURNS)
    result = tl.zeros((SLICES, BN, 8), tl.float32)
    tile = tl.arange(0, SLICES) * TURNS
    inside = tile < num_tiles
    _, expert, _, column = _place(tile, chosen, PAIRS, ROW_BYTES, HOW)
    weight_rows = expert.to(tl.int64)[:, None] * N + columns[None, :]
    scale = _of_groups(scales, weight_rows, column, inside, GROUPS, HOW)
    high_scale = scale
    if NARROW:
        high_scale = _of_groups(scales, weight_rows, column + 64, inside, GROUPS, HOW)
    for turn in tl.range(0, turns, num_stages=STAGES):
        tile = tl.arange(0, SLICES) * TURNS + turn
        inside = tile < num_tiles
        pair, expert, byte, column = _place(tile, chosen, PAIRS, ROW_BYTES, HOW)
        byte = tl.multiple_of(byte, TILE)
        weight_rows = expert.to(tl.int64)[:, None] * N + columns[None, :]
        places = (weight_rows * ROW_BYTES + byte[:, None])[:, :, None] + along[None, None, :]
        raw = tl.load(weight + places, inside[:, None, None], other=0)
        first = tl.multiple_of(pair * K + column, TILE)[:, None, None] + along[None, :, None]
        own = tl.load(x + first + rows * 0, inside[:, None, None] & (rows == 0), other=0.0)
        following, next_inside = tile + 1, tile + 1 < num_tiles
        _, next_expert, _, next_column = _place(following, chosen, PAIRS, ROW_BYTES, HOW)
        next_rows = next_expert.to(tl.int64)[:, None] * N + columns[None, :]
        next_scale = _of_groups(scales, next_rows, next_column, next_inside, GROUPS, HOW)
        next_high_scale = next_scale
        if NARROW:
            next_high_scale = _of_groups(scales, next_rows, next_column + 64, next_inside, GROUPS, HOW)
        nothing = tl.zeros((SLICES, BN, 8), tl.float32)
        if PACKED:
            high_own = tl.load(x + first + 64 + rows * 0, inside[:, None, None] & (rows == 0), other=0.0)
            low_zero = _zero(zeros, weight_rows, column, inside, GROUPS, HOW)
            high_zero = _zero(zeros, weight_rows, column + 64, inside, GROUPS, HOW)
            part = tl.dot(of_nibbles(raw, low_zero, False, own.dtype, HOW), own, nothing)
            high = of_nibbles(raw, high_zero, True, own.dtype, HOW)
            if NARROW:
                result += part * scale[:, :, None]
                part = tl.dot(high, high_own, nothing)
                result += part * high_scale[:, :, None]
            else:
                part = tl.dot(high, high_own, part)
                result += part * scale[:, :, None]
        else:
            part = tl.dot(of_bytes(raw, own.dtype, HOW), own, nothing)
            result += part * scale[:, :, None]
        scale, high_scale = next_scale, next_high_scale
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def added(result: "tl.tensor") -> "tl.tensor":
    """[BN] of what row_product returns. (Of the eight rows, seven are zeros.)"""
    return tl.sum(tl.sum(result, 2), 0)
