"""The device code of few_rows.py for one row: what few_rows_kernels.py computes, without tensor cores.

A tensor core's sums of one row would wait for one another. Here each thread adds up what it reads in float32, elements
of several columns and of a part of the depth, and the threads meet at the end. So more of the weight is on its way.

A program makes BN columns of a product over K, reading BK elements of a row of the weight at a time. EARLY of them, a
power of two, it reads while the kernel ahead still runs, where CHAINED. scales: of the weight's rows, where it is
quantised; None where it lies in the model's dtype. HOW: how one_row_int4.py reads a weight, two columns of which are an
element; None for any other. zeros: None but there. rooms: see few_rows_kernels.py.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.few_rows_exchange import sum_over_ranks
from graphgen.models.few_rows_kernels import add_row, gated, load_squares
from graphgen.models.one_row_int4 import ask_for, read_pieces, times_packed


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _floats(tile: "tl.tensor") -> "tl.tensor":
    """Of a weight or of its codes: int8, or the bytes of e4m3."""
    if tile.dtype == tl.uint8:
        tile = tile.to(tl.float8e4nv, bitcast=True)
    return tile.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _first_of(
    weight: "tl.tensor",
    scales: "tl.tensor | None",
    zeros: "tl.tensor | None",
    first: "tl.tensor",
    rows: "tl.tensor",
    K: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """The first EARLY elements of rows `first + rows` of a weight; of int4 with their scales and zeros."""
    if HOW is None:
        early = tl.load(weight + (first + rows).to(tl.int64)[:, None] * K + tl.arange(0, EARLY)[None, :])
    else:
        early = read_pieces(weight, scales, zeros, first, rows, 0, K, EARLY, HOW)
        ask_for(weight, scales, zeros, first, rows, K, EARLY, STAGES, HOW)
    return early


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _add_up(
    sums: "tl.tensor",
    first: "tl.tensor",
    early: "tl.tensor",
    scales: "tl.tensor | None",
    columns: "tl.tensor",
) -> "tl.tensor":
    """[BN]: what the threads have, [BN, BK], together, and what the columns add that were there early, with the scales
    of a weight's rows."""
    result = tl.sum(sums, 1) + tl.sum(_floats(early) * first, 1)
    if scales is not None:
        result *= tl.load(scales + columns).to(tl.float32)
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _times_row(
    x: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor | None",
    zeros: "tl.tensor | None",
    first: "tl.tensor",
    rows: "tl.tensor",
    early: "tl.tensor",
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """[BN] float32: one row, [K], times rows `first + rows` of a weight. early: _first_of it."""
    if HOW is None:
        columns = first + rows
        weight_rows = weight + columns.to(tl.int64)[:, None] * K
        first_own = tl.load(x + tl.arange(0, EARLY)).to(tl.float32)[None, :]
        depth = tl.arange(0, BK)
        sums = tl.zeros((BN, BK), tl.float32)
        for k in tl.range(EARLY, K, BK, num_stages=STAGES):
            own = tl.load(x + k + depth).to(tl.float32)[None, :]
            sums += own * _floats(tl.load(weight_rows + k + depth[None, :]))
        if CHAINED:
            gdc_launch_dependents()
        result = _add_up(sums, first_own, early, scales, columns)
    else:
        if CHAINED:  # the next one reads its weight while this one multiplies
            gdc_launch_dependents()
        result = times_packed(x, weight, scales, zeros, first, rows, early, K, BK, STAGES, HOW)
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def normed_row_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor | None",
    zeros: "tl.tensor | None",
    bias: "tl.tensor | None",
    out: "tl.tensor",
    num_parts: int,
    eps: float,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """normed_linear_kernel of one row."""
    begin, rows = tl.program_id(0) * BN, tl.arange(0, BN)
    columns = begin + rows
    early = _first_of(weight, scales, zeros, begin, rows, K, EARLY, STAGES, HOW)
    if CHAINED:
        gdc_wait()
    parts = load_squares(squares, 1, num_parts, 1, PARTS)
    result = _times_row(x, weight, scales, zeros, begin, rows, early, K, BN, BK, EARLY, STAGES, CHAINED, HOW)
    result *= tl.rsqrt(tl.sum(tl.sum(parts, 1), 0) / K + eps)
    if bias is not None:
        result += tl.load(bias + columns).to(tl.float32)
    tl.store(out + columns, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["layer", "rank"])  # type: ignore[untyped-decorator]  # triton has no types
def adding_row_kernel(
    x: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor | None",
    zeros: "tl.tensor | None",
    bias: "tl.tensor | None",
    residual: "tl.tensor",
    norm_weight: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
    rooms: "tl.tensor | None",
    numbers: "tl.tensor | None",
    layer: int,
    rank: int,
    N: int,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
    SIZE: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    BEHIND: tl.constexpr,
) -> None:
    """adding_linear_kernel of one row."""
    begin, rows = tl.program_id(0) * BN, tl.arange(0, BN)
    columns = begin + rows
    early = _first_of(weight, scales, zeros, begin, rows, K, EARLY, STAGES, HOW)
    of_norm = tl.load(norm_weight + columns).to(tl.float32)
    if CHAINED:
        gdc_wait()
    before = tl.load(residual + columns)
    update = _times_row(x, weight, scales, zeros, begin, rows, early, K, BN, BK, EARLY, STAGES, CHAINED, HOW)
    if bias is not None:
        update += tl.load(bias + columns).to(tl.float32)
    if rooms is not None:
        row, beside = tl.zeros((1, 1), tl.int32), columns[None, :]
        total = sum_over_ranks(update[None, :], row, beside, 1, N, rooms, numbers, layer, rank, SIZE, MOST_ROWS, BEHIND)
        update = tl.sum(total, 0)
    add_row(update, before, columns, of_norm, tl.program_id(0), out, scaled, squares)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def gated_row_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor | None",
    zeros: "tl.tensor | None",
    bias: "tl.tensor | None",
    out: "tl.tensor",
    num_parts: int,
    eps: float,
    F: int,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """gated_kernel of one row."""
    begin, rows = tl.program_id(0) * BN, tl.arange(0, BN)
    columns = begin + rows
    if HOW is None:
        early_gate = _first_of(weight, scales, zeros, begin, rows, K, EARLY, STAGES, HOW)
        early_up = _first_of(weight, scales, zeros, begin + F, rows, K, EARLY, STAGES, HOW)
    else:  # one product of both, gate and up in turn: then those of a column end in the same thread
        in_turn = tl.arange(0, 2 * BN)
        both = in_turn // 2 + (in_turn % 2).to(tl.int64) * F
        early = _first_of(weight, scales, zeros, begin, both, K, EARLY, STAGES, HOW)
    if CHAINED:
        gdc_wait()
    parts = load_squares(squares, 1, num_parts, 1, PARTS)
    if HOW is None:
        gate_rows = weight + columns.to(tl.int64)[:, None] * K
        up_rows = gate_rows + tl.full([1], F, tl.int64) * K
        first_own = tl.load(x + tl.arange(0, EARLY)).to(tl.float32)[None, :]
        depth = tl.arange(0, BK)
        gates = tl.zeros((BN, BK), tl.float32)
        ups = tl.zeros((BN, BK), tl.float32)
        for k in tl.range(EARLY, K, BK, num_stages=STAGES):
            own = tl.load(x + k + depth).to(tl.float32)[None, :]
            gates += own * _floats(tl.load(gate_rows + k + depth[None, :]))
            ups += own * _floats(tl.load(up_rows + k + depth[None, :]))
        if CHAINED:
            gdc_launch_dependents()
        gate = _add_up(gates, first_own, early_gate, scales, columns)
        up = _add_up(ups, first_own, early_up, scales, columns + F)
    else:
        products = _times_row(x, weight, scales, zeros, begin, both, early, K, 2 * BN, BK, EARLY, STAGES, CHAINED, HOW)
        gate, up = tl.split(products.reshape(BN, 2))
    over_rms = tl.rsqrt(tl.sum(tl.sum(parts, 1), 0) / K + eps)
    gate *= over_rms
    up *= over_rms
    if bias is not None:
        gate += tl.load(bias + columns).to(tl.float32)
        up += tl.load(bias + F + columns).to(tl.float32)
    tl.store(out + columns, gated(gate, up, ACTIVATION, out.dtype.element_ty))
