"""The device code of few_rows.py: products that norm their input or add to the residual stream.

What they share: a program makes BN columns of a product over all rows, BM of them at most, reading BK columns of the
weight at a time. CHAINED kernels were launched while the one ahead still ran: until `gdc_wait` they touch nothing that
a step writes. EARLY columns of the weight are read before that.

RMSNorm is made in two places. Whoever adds to the residual stream multiplies the sums by the norm's weight and leaves
the sum of squares of its own columns; the product that reads them divides its rows by their root mean square.

HOW: how a quantised weight is read (few_rows_weights.py), None for one that the product takes as it lies; `scales` and
`zeros` are None then.

rooms: where ranks add up what they add to the residual stream (few_rows_exchange.py), with what belongs to it; None for
a model that one rank holds.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.few_rows_exchange import sum_over_ranks
from graphgen.models.few_rows_weights import raw_tile, stored_product


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _first_columns(weight_rows: "tl.tensor", BK: tl.constexpr) -> "tl.tensor":
    """[BK, BN]: what a product may read while the kernel ahead still runs, as no step writes weights."""
    return tl.load(weight_rows + tl.arange(0, BK)[:, None])


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _product(
    x: "tl.tensor",
    weight_rows: "tl.tensor",
    first: "tl.tensor",
    num_rows: int,
    K: int,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
) -> "tl.tensor":
    """[BM, BN] float32: rows of x, [num_rows, K], times BN rows of a weight, of which EARLY columns are there."""
    rows = tl.arange(0, BM)[:, None]
    depth = tl.arange(0, BK)
    result = tl.zeros((BM, BN), tl.float32)
    if EARLY:
        first_left = tl.load(x + rows * K + depth[None, :], rows < num_rows, other=0.0)
    for k in range(EARLY, K, BK):
        left = tl.load(x + rows * K + k + depth[None, :], rows < num_rows, other=0.0)
        result = tl.dot(left, tl.load(weight_rows + k + depth[:, None]), result)
    if EARLY:  # behind the loop, whose loads should not wait for this one's
        result = tl.dot(first_left, first, result)
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _first_of(
    weight: "tl.tensor", columns: "tl.tensor", K: int, BK: tl.constexpr, EARLY: tl.constexpr, HOW: tl.constexpr
) -> "tl.tensor":
    """What a product reads of its weight's rows `columns` while the kernel ahead still runs."""
    if not EARLY:
        first = 0
    elif HOW is None:
        first = _first_columns(weight + columns.to(tl.int64)[None, :] * K, BK)
    else:
        first = raw_tile(weight, columns, 0, K, HOW)
    return first


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _times(
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
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    HOW: tl.constexpr,
) -> "tl.tensor":
    """[BM, BN] float32: rows of x, [num_rows, K], times rows `columns` of a weight in any format."""
    if HOW is None:
        result = _product(x, weight + columns.to(tl.int64)[None, :] * K, first, num_rows, K, BM, BN, BK, EARLY)
    else:
        result = stored_product(x, weight, scales, zeros, columns, first, num_rows, K, BM, BN, EARLY, HOW)
    return result


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def load_squares(
    squares: "tl.tensor", num_rows: int, num_parts: int, BM: tl.constexpr, PARTS: tl.constexpr
) -> "tl.tensor":
    """[BM, PARTS]. Loaded before a product and summed behind it, so that nobody waits for them."""
    rows = tl.arange(0, BM)[:, None]
    parts = tl.arange(0, PARTS)[None, :]
    return tl.load(squares + rows * num_parts + parts, (rows < num_rows) & (parts < num_parts), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _over_rms(squares: "tl.tensor", size: int, eps: float) -> "tl.tensor":
    """[BM, 1] float32: one over the root mean square of each row of `size` elements."""
    return tl.rsqrt(tl.sum(squares, 1) / size + eps)[:, None]


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def store_normed(
    sums: "tl.tensor",
    places: "tl.tensor",
    columns: "tl.tensor",
    rows: "tl.tensor",
    num_rows: int,
    norm_weight: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
) -> None:
    """Stores a block of the residual stream, and what the norm's reader needs of it. sums: [BM, BN], rounded."""
    tl.store(out + places, sums, rows < num_rows)
    wide = sums.to(tl.float32)
    weight = tl.load(norm_weight + columns).to(tl.float32)[None, :]
    tl.store(scaled + places, (wide * weight).to(scaled.dtype.element_ty), rows < num_rows)
    part = rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares + part, tl.sum(wide * wide, 1)[:, None], rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def embed_kernel(
    token_ids: "tl.tensor",
    table: "tl.tensor",
    norm_weight: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
    numbers: "tl.tensor | None",
    num_rows: int,
    numbers_of_step: int,
    N: int,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """numbers: counts the sums over ranks, see collectives/exchange.py."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)[:, None]
    token = tl.load(token_ids + rows, rows < num_rows, other=0)
    if numbers is not None and tl.program_id(0) == 0:
        tl.store(numbers, tl.load(numbers) + numbers_of_step)
    embedded = tl.load(table + token * N + columns[None, :], rows < num_rows, other=0.0)
    store_normed(embedded, rows * N + columns[None, :], columns, rows, num_rows, norm_weight, out, scaled, squares)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def normed_linear_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor",
    bias: "tl.tensor",
    out: "tl.tensor",
    num_rows: int,
    num_parts: int,
    eps: float,
    N: int,
    K: int,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """out = x / rms @ weight.T + bias."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    first = _first_of(weight, columns, K, BK, EARLY, HOW)
    if CHAINED:
        gdc_wait()
    parts = load_squares(squares, num_rows, num_parts, BM, PARTS)
    result = _times(x, weight, scales, zeros, columns, first, num_rows, K, BM, BN, BK, EARLY, HOW)
    if CHAINED:
        gdc_launch_dependents()
    result *= _over_rms(parts, K, eps)
    if HAS_BIAS:
        result += tl.load(bias + columns).to(tl.float32)[None, :]
    rows = tl.arange(0, BM)[:, None]
    tl.store(out + rows * N + columns[None, :], result.to(out.dtype.element_ty), rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "layer", "rank"])  # type: ignore[untyped-decorator]  # triton has no types
def adding_linear_kernel(
    x: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor",
    bias: "tl.tensor",
    residual: "tl.tensor",
    norm_weight: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
    rooms: "tl.tensor | None",
    numbers: "tl.tensor | None",
    layer: int,
    rank: int,
    num_rows: int,
    N: int,
    K: int,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
    SIZE: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    BEHIND: tl.constexpr,
) -> None:
    """out = residual + x @ weight.T + bias, and its norm begun."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)[:, None]
    places = rows * N + columns[None, :]
    first = _first_of(weight, columns, K, BK, EARLY, HOW)
    if CHAINED:
        gdc_wait()
    before = tl.load(residual + places, rows < num_rows, other=0.0)
    result = _times(x, weight, scales, zeros, columns, first, num_rows, K, BM, BN, BK, EARLY, HOW)
    if CHAINED:
        gdc_launch_dependents()
    if HAS_BIAS:
        result += tl.load(bias + columns).to(tl.float32)[None, :]
    if rooms is not None:
        beside = columns[None, :]
        result = sum_over_ranks(result, rows, beside, num_rows, N, rooms, numbers, layer, rank, SIZE, MOST_ROWS, BEHIND)
    # As where the product is stored and read again.
    sums = (before.to(tl.float32) + result.to(before.dtype).to(tl.float32)).to(before.dtype)
    store_normed(sums, places, columns, rows, num_rows, norm_weight, out, scaled, squares)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def add_row(
    update: "tl.tensor",
    before: "tl.tensor",
    places: "tl.tensor",
    scales: "tl.tensor",
    part: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
) -> None:
    """Stores columns of one row of the residual stream, [BN], and its norm begun. update: float32; before: the stream;
    places: where in it; scales: of the norm, float32; part: where the sum of squares belongs."""
    # As where the product is stored and read again.
    stream = (before.to(tl.float32) + update.to(before.dtype).to(tl.float32)).to(before.dtype)
    wide = stream.to(tl.float32)
    tl.store(out + places, stream)
    tl.store(scaled + places, (wide * scales).to(scaled.dtype.element_ty))
    tl.store(squares + part, tl.sum(wide * wide, 0))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def gated(gate: "tl.tensor", up: "tl.tensor", ACTIVATION: tl.constexpr, DTYPE: tl.constexpr) -> "tl.tensor":
    """activation(gate) * up, in DTYPE. Both are float32. ACTIVATION: 0 silu, 1 gelu, 2 gelu_tanh."""
    # As where gate and up are stored and read again: both are rounded, and so is the activation.
    gate = gate.to(DTYPE).to(tl.float32)
    up = up.to(DTYPE).to(tl.float32)
    if ACTIVATION == 0:
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == 1:
        active = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-2.0 * inner))
    return (active.to(DTYPE).to(tl.float32) * up).to(DTYPE)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def gated_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor",
    zeros: "tl.tensor",
    bias: "tl.tensor",
    out: "tl.tensor",
    num_rows: int,
    num_parts: int,
    eps: float,
    F: int,
    K: int,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """activation(x / rms @ gate.T) * (x / rms @ up.T); the weight is gate's F rows, then up's.

    ACTIVATION: 0 silu, 1 gelu, 2 gelu_tanh.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    if HOW is None:
        gate_rows = weight + columns.to(tl.int64)[None, :] * K
        up_rows = gate_rows + tl.full([1], F, tl.int64) * K
        if EARLY:
            first_gate, first_up = _first_columns(gate_rows, BK), _first_columns(up_rows, BK)
    else:  # one product of both, gate and up in turn: then those of a column end in the same thread
        pairs = tl.arange(0, 2 * BN)
        both = tl.program_id(0) * BN + pairs // 2 + pairs % 2 * F
        first = _first_of(weight, both, K, BK, EARLY, HOW)
    if CHAINED:
        gdc_wait()
    parts = load_squares(squares, num_rows, num_parts, BM, PARTS)
    rows = tl.arange(0, BM)[:, None]
    if HOW is None:
        depth = tl.arange(0, BK)
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        if EARLY:
            first_left = tl.load(x + rows * K + depth[None, :], rows < num_rows, other=0.0)
        for k in range(EARLY, K, BK):
            left = tl.load(x + rows * K + k + depth[None, :], rows < num_rows, other=0.0)
            gate = tl.dot(left, tl.load(gate_rows + k + depth[:, None]), gate)
            up = tl.dot(left, tl.load(up_rows + k + depth[:, None]), up)
        if EARLY:
            gate = tl.dot(first_left, first_gate, gate)
            up = tl.dot(first_left, first_up, up)
    else:
        products = stored_product(x, weight, scales, zeros, both, first, num_rows, K, BM, 2 * BN, EARLY, HOW)
        gate, up = tl.split(products.reshape(BM, BN, 2))
    if CHAINED:
        gdc_launch_dependents()
    over_rms = _over_rms(parts, K, eps)
    gate *= over_rms
    up *= over_rms
    if HAS_BIAS:
        gate += tl.load(bias + columns).to(tl.float32)[None, :]
        up += tl.load(bias + F + columns).to(tl.float32)[None, :]
    result = gated(gate, up, ACTIVATION, out.dtype.element_ty)
    tl.store(out + rows * F + columns[None, :], result, rows < num_rows)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def norm_heads_kernel(
    qkv: "tl.tensor",
    q_weight: "tl.tensor",
    k_weight: "tl.tensor",
    row_stride: int,
    num_queries: int,
    q_size: int,
    k_size: int,
    eps: float,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """RMSNorm in place of each part of queries, q_size wide, and of keys behind them. One program a row and part."""
    dims = tl.arange(0, BLOCK)
    part = tl.program_id(1)
    of_query = part < num_queries
    size = tl.where(of_query, q_size, k_size)
    begin = tl.where(of_query, part * q_size, num_queries * q_size + (part - num_queries) * k_size)
    places = tl.program_id(0).to(tl.int64) * row_stride + begin + dims
    inside = dims < size
    if of_query:
        scale = tl.load(q_weight + dims, inside, other=0.0).to(tl.float32)
    else:
        scale = tl.load(k_weight + dims, inside, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.load(qkv + places, inside, other=0.0).to(tl.float32)
    unit = (head * tl.rsqrt(tl.sum(head * head) / size + eps)).to(qkv.dtype.element_ty)
    tl.store(qkv + places, (unit.to(tl.float32) * scale).to(qkv.dtype.element_ty), inside)
