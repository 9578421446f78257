"""The products of tiles.py with quantised weights. Device code.

A tile of the weight is read as bytes and made a matrix of the input's dtype in registers, exactly. Its scale comes
after the product of each part that has one, so nothing is rounded that is not with few rows, and no weight is unpacked
to memory. How the codes, scales and zeros of a weight lie: formats/layout.py.

HOW: few_rows_weights.Reading, of which `depth` and `slices` mean nothing here.
"""

import triton
import triton.language as tl

from graphgen.models.few_rows_tiles import STORAGES
from graphgen.models.few_rows_weights import INT4, Reading, of_bytes, of_nibbles
from graphgen.models.spec.formats import LEAST_TILE, LinearFormat


def reading_of(form: LinearFormat, num_columns: int, most: int) -> Reading:
    """How tiles of a weight [N, num_columns] are read, of at most so many bytes of a row. Raises ValueError for a
    format that spec.formats.reads_in_tiles says no to."""
    tile_bytes = form.tile_bytes(num_columns, most)
    if tile_bytes < LEAST_TILE:
        raise ValueError(f"{form.name} of {num_columns} columns has groups that no tile fits")
    return Reading(
        STORAGES[form.storage],
        0 if form.group is None or form.group >= num_columns else form.group,
        form.rows,
        form.zeros,
        depth=0,
        tile_bytes=tile_bytes,
        conversion=0 if triton.knobs.runtime.interpret else 1,
        slices=0,
    )


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _of_groups(numbers: "tl.tensor", inside: "tl.tensor", column: int, HOW: tl.constexpr) -> "tl.tensor":
    """[1, BN] float32: scales or zeros of the group that `column` is in. numbers: [BN], where those of a row begin."""
    return tl.load(numbers + (column // HOW.group if HOW.group else 0), inside, other=0.0).to(tl.float32)[None, :]


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _zero(zeros: "tl.tensor", inside: "tl.tensor", column: int, HOW: tl.constexpr) -> "tl.tensor":
    """What is subtracted from codes that have zeros; of int4 without, 8."""
    return _of_groups(zeros, inside, column, HOW) if HOW.zeros else tl.full((1, 1), 8.0, tl.float32)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _add(
    result: "tl.tensor",
    own: "tl.tensor",
    tile: "tl.tensor",
    scales: "tl.tensor",
    inside: "tl.tensor",
    column: int,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """result + own @ tile, times the scale of the group where there are several."""
    if HOW.group:
        part = tl.dot(own, tile, input_precision="ieee")
        result += part * _of_groups(scales, inside, column, HOW)
    else:
        result += tl.dot(own, tile, input_precision="ieee")
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _add_bytes(
    result: "tl.tensor",
    own: "tl.tensor",
    high_own: "tl.tensor",
    weight_rows: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor",
    inside: "tl.tensor",
    begin: int,
    column: int,
    half: int,
    row_bytes: int,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """The product of bytes `begin` and on of a weight's rows is added. own: the input of columns `column` and on;
    high_own: of int4, that of those `half` further, which the high halves of the bytes are."""
    byte = begin + tl.arange(0, HOW.tile_bytes)[:, None]
    raw = tl.load(weight_rows + byte, inside[None, :] & (byte < row_bytes), other=0)
    if HOW.storage == INT4:
        low = of_nibbles(raw, _zero(zeros, inside, column, HOW), False, own.dtype, HOW)
        high = of_nibbles(raw, _zero(zeros, inside, column + half, HOW), True, own.dtype, HOW)
        result = _add(result, own, low, scales, inside, column, HOW)
        result = _add(result, high_own, high, scales, inside, column + half, HOW)
    else:
        tile = of_bytes(raw, own.dtype, HOW)
        if HOW.zeros:
            tile -= _zero(zeros, inside, column, HOW).to(own.dtype)
        result = _add(result, own, tile, scales, inside, column, HOW)
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def stored_products(
    x_rows: "tl.tensor",
    filled: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor",
    rows: "tl.tensor",
    inside: "tl.tensor",
    apart: int,
    K: int,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    HOW: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor]":
    """[BM, BN] float32: rows of the input, which begin at [BM, 1], times rows `rows` of a weight, [BN], of those that
    are `inside`; and where GATED the same of the rows `apart` further, else zeros."""
    first = tl.zeros((BM, BN), dtype=tl.float32)
    second = tl.zeros((BM, BN), dtype=tl.float32)
    row_bytes = K // 32 * 16 if HOW.storage == INT4 else K  # so that the compiler sees what divides it
    groups = tl.cdiv(K, HOW.group) if HOW.group else 1
    weight_rows, up_rows = weight + rows[None, :] * row_bytes, weight + (rows + apart)[None, :] * row_bytes
    of_gate, of_up = rows // HOW.scale_rows * groups, (rows + apart) // HOW.scale_rows * groups
    gate_zeros, up_zeros = zeros, zeros
    if HOW.zeros:
        gate_zeros, up_zeros = zeros + of_gate, zeros + of_up
    depth = tl.arange(0, HOW.tile_bytes)[None, :]
    for begin in range(0, row_bytes, HOW.tile_bytes):
        column, half = begin, 0
        if HOW.storage == INT4:  # blocks of 128 columns have 64 bytes, and the last one what is left
            block = begin // 64 * 128
            column, half = block + begin % 64, tl.where(K - block < 128, (K - block) // 2, 64)
        own = tl.load(x_rows + column + depth, filled[:, None] & (column + depth < K), other=0.0)
        high = own
        if HOW.storage == INT4:
            high = tl.load(x_rows + column + half + depth, filled[:, None] & (column + half + depth < K), other=0.0)
        first = _add_bytes(
            first, own, high, weight_rows, scales + of_gate, gate_zeros, inside, begin, column, half, row_bytes, HOW
        )
        if GATED:
            second = _add_bytes(
                second, own, high, up_rows, scales + of_up, up_zeros, inside, begin, column, half, row_bytes, HOW
            )
    if not HOW.group:
        first *= _of_groups(scales + of_gate, inside, 0, HOW)
        if GATED:
            second *= _of_groups(scales + of_up, inside, 0, HOW)
    return first, second
