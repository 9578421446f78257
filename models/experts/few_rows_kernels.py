"""The device code of few_rows.py: from the residual stream's norm to the stream behind the experts, in three kernels.

    router_kernel    the score of every expert for every row
    gate_up_kernel   a program makes BN inner columns of one pair of a row and an expert; it finds the expert itself
    down_kernel      a program makes BN columns of a row's update, of all its experts one behind the other

A CHAINED kernel was launched while the one ahead still ran: until `gdc_wait` it touches nothing that a step writes, and
every program waits, since only then what is two kernels ahead is done when this one is.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.experts.tiles import activated
from graphgen.models.few_rows_kernels import store_normed

_NO_ZERO = tl.constexpr(1e-20)
"""See routing.py."""
_ROWS = tl.constexpr(16)
"""Rows that a tensor core multiplies at least; the first is the program's."""


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def router_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    weight: "tl.tensor",
    bias: "tl.tensor | None",
    shared_gate: "tl.tensor | None",
    logits: "tl.tensor",
    num_parts: int,
    eps: float,
    num_experts: int,
    K: int,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """logits[row, expert] = x[row] / rms . weight[expert] + bias, all in float32; behind them that of the shared
    gate. One program each."""
    expert, row = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    own = tl.load(weight + expert * K + columns, columns < tl.where(expert < num_experts, K, 0), other=0.0)
    if shared_gate is not None:
        of_gate = columns < tl.where(expert == num_experts, K, 0)
        own += tl.load(shared_gate + columns, of_gate, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()  # all programs have room at once
    parts = tl.arange(0, PARTS)
    square = tl.sum(tl.load(squares + row * num_parts + parts, parts < num_parts, other=0.0), 0)
    values = tl.load(x + row.to(tl.int64) * K + columns, inside, other=0.0).to(tl.float32)
    score = tl.sum(values * own, 0) * tl.rsqrt(square / K + eps)
    if bias is not None:
        score += tl.load(bias + expert, expert < num_experts, other=0.0)
    tl.store(logits + row * tl.num_programs(0) + expert, score)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _ordered(logits: "tl.tensor", inside: "tl.tensor") -> "tl.tensor":
    """Logits, of which each two have an order: a NaN counts as the least."""
    loaded = tl.load(logits, inside, other=float("-inf"))
    return tl.where(loaded == loaded, loaded, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _scores(logits: "tl.tensor", peak: "tl.tensor", total: "tl.tensor", SOFTMAX: tl.constexpr) -> "tl.tensor":
    return tl.exp(logits - peak) / total if SOFTMAX else 1.0 / (1.0 + tl.exp(-logits))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _chosen(
    logits: "tl.tensor",
    correction: "tl.tensor | None",
    place: "tl.tensor",
    scale: float,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor]":
    """The expert in a place of the order of a row's choice, and its weight: the formulas of routing.py. logits: of the
    row. EXPERTS: a power of two from E."""
    numbers = tl.arange(0, EXPERTS)
    inside = numbers < E
    own = _ordered(logits + numbers, inside)
    peak = tl.max(own, 0)
    total = tl.sum(tl.exp(own - peak), 0)
    scores = _scores(own, peak, total, SOFTMAX)
    choice = own
    if correction is not None:
        choice = tl.where(inside, scores + tl.load(correction + numbers, inside, other=0.0), float("-inf"))
    BLOCK: tl.constexpr = EXPERTS if EXPERTS <= 128 else 128 * 128 // EXPERTS
    num_better = tl.zeros((EXPERTS,), tl.int32)
    for begin in tl.static_range(0, EXPERTS, BLOCK):
        others = begin + tl.arange(0, BLOCK)
        of_others = others < E
        theirs = _ordered(logits + others, of_others)
        if correction is not None:
            corrected = _scores(theirs, peak, total, SOFTMAX) + tl.load(correction + others, of_others, other=0.0)
            theirs = tl.where(of_others, corrected, float("-inf"))
        above = theirs[None, :] > choice[:, None]
        first = (theirs[None, :] == choice[:, None]) & (others[None, :] < numbers[:, None])
        num_better += tl.sum((above | first).to(tl.int32), 1)
    expert = tl.sum(tl.where(num_better == place, numbers, 0), 0)
    weight = tl.sum(tl.where(num_better == place, scores, 0.0), 0)
    if RENORMALISE:
        weight /= tl.sum(tl.where(num_better < TOP_K, scores, 0.0), 0) + _NO_ZERO
    return expert, weight * scale


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def gate_up_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    logits: "tl.tensor",
    correction: "tl.tensor | None",
    live: "tl.tensor | None",
    weight: "tl.tensor",
    bias: "tl.tensor | None",
    inner: "tl.tensor",
    experts: "tl.tensor",
    weights: "tl.tensor",
    num_parts: int,
    eps: float,
    scale: float,
    limit: "float | None",
    logits_stride: int,
    F: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UP_PLUS_ONE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """inner[pair] = weight of the pair * activation(gate) * up, of x / rms and the pair's expert, whose F rows of gate
    lie before those of up. experts, weights: [pairs] of each, for the next kernel; E for a row without a token, whose
    inner columns stay as they are."""
    pair = tl.program_id(0)
    row = pair // TOP_K
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    only_row = (tl.arange(0, _ROWS) == 0)[:, None]
    if CHAINED:
        gdc_wait()
    expert, share = _chosen(
        logits + row * logits_stride, correction, pair % TOP_K, scale, E, EXPERTS, TOP_K, SOFTMAX, RENORMALISE
    )
    if live is not None:
        expert = tl.where(tl.load(live + row) != 0, expert, E)
    if tl.program_id(1) == 0:
        tl.store(experts + pair, expert)
        tl.store(weights + pair, share)
    if expert < E:
        parts = tl.arange(0, PARTS)
        square = tl.load(squares + row * num_parts + parts, parts < num_parts, other=0.0)
        x_row = x + row.to(tl.int64) * K + tl.zeros((_ROWS, 1), tl.int32)
        gate_rows = weight + (expert.to(tl.int64) * 2 * F + columns)[None, :] * K
        up_rows = gate_rows + tl.full([1], F, tl.int64) * K
        gate = tl.zeros((_ROWS, BN), tl.float32)
        up = tl.zeros((_ROWS, BN), tl.float32)
        for k in range(0, K, BK):
            left = tl.load(x_row + k + depth[None, :], only_row, other=0.0)
            gate = tl.dot(left, tl.load(gate_rows + k + depth[:, None]), gate)
            up = tl.dot(left, tl.load(up_rows + k + depth[:, None]), up)
        if CHAINED:
            gdc_launch_dependents()
        over_rms = tl.rsqrt(tl.sum(square, 0) / K + eps)
        gate *= over_rms
        up *= over_rms
        if bias is not None:
            biases = bias + expert.to(tl.int64) * 2 * F + columns
            gate += tl.load(biases).to(tl.float32)[None, :]
            up += tl.load(biases + F).to(tl.float32)[None, :]
        if limit is not None:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        made = activated(gate, ACTIVATION) * (up + 1.0 if UP_PLUS_ONE else up) * share
        places = inner + pair.to(tl.int64) * F + columns[None, :] + tl.zeros((_ROWS, 1), tl.int32)
        tl.store(places, made.to(inner.dtype.element_ty), only_row)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def down_kernel(
    inner: "tl.tensor",
    experts: "tl.tensor",
    weights: "tl.tensor",
    weight: "tl.tensor",
    bias: "tl.tensor | None",
    shared_inner: "tl.tensor | None",
    shared_weight: "tl.tensor | None",
    shared_bias: "tl.tensor | None",
    shared_logits: "tl.tensor | None",
    residual: "tl.tensor",
    norm_weight: "tl.tensor",
    out: "tl.tensor",
    scaled: "tl.tensor",
    squares: "tl.tensor",
    logits_stride: int,
    N: int,
    SHARED_F: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SHARED_BK: tl.constexpr,
    STAGES: tl.constexpr,
    SHARED_STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """out = residual + inner of all pairs of a row @ the weights of their experts, one behind the other, + what the
    shared one adds, and its norm begun. inner: [row, TOP_K * F], each pair times its weight. shared_logits: of the
    factor of the shared one, where it has one."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    rows = row + tl.arange(0, _ROWS)[:, None]
    only_row = rows == row
    places = rows.to(tl.int64) * N + columns[None, :]
    if CHAINED:
        gdc_wait()
    before = tl.load(residual + places, only_row, other=0.0)
    first_pair = row * TOP_K
    num_columns = tl.where(tl.load(experts + first_pair) < E, TOP_K * F, 0)
    inner_row = inner + row.to(tl.int64) * (TOP_K * F) + tl.zeros((_ROWS, 1), tl.int32)
    result = tl.zeros((_ROWS, BN), tl.float32)
    for begin in tl.range(0, num_columns, BK, num_stages=STAGES):
        left = tl.load(inner_row + begin + depth[None, :], only_row, other=0.0)
        expert = tl.load(experts + first_pair + begin // F).to(tl.int64)
        weight_rows = weight + (expert * N + columns)[None, :] * F + tl.multiple_of(begin % F, BK)
        result = tl.dot(left, tl.load(weight_rows + depth[:, None]), result)
    if shared_inner is not None:
        shared_depth = tl.arange(0, SHARED_BK)
        shared_row = shared_inner + row.to(tl.int64) * SHARED_F + tl.zeros((_ROWS, 1), tl.int32)
        shared_rows = shared_weight + columns.to(tl.int64)[None, :] * SHARED_F
        shared = tl.zeros((_ROWS, BN), tl.float32)
        for begin in tl.range(0, SHARED_F, SHARED_BK, num_stages=SHARED_STAGES):
            left = tl.load(shared_row + begin + shared_depth[None, :], only_row, other=0.0)
            shared = tl.dot(left, tl.load(shared_rows + begin + shared_depth[:, None]), shared)
        if shared_bias is not None:
            shared += tl.load(shared_bias + columns).to(tl.float32)[None, :]
        if shared_logits is not None:
            shared *= 1.0 / (1.0 + tl.exp(-tl.load(shared_logits + row * logits_stride)))
        result += shared
    if CHAINED:
        gdc_launch_dependents()
    if bias is not None:
        for place in tl.static_range(TOP_K):
            expert = tl.load(experts + first_pair + place)
            own = tl.load(bias + expert.to(tl.int64) * N + columns, columns < tl.where(expert < E, N, 0), other=0.0)
            result += (tl.load(weights + first_pair + place) * own.to(tl.float32))[None, :]
    # As where the product is stored and read again.
    sums = (before.to(tl.float32) + result.to(before.dtype).to(tl.float32)).to(before.dtype)
    store_normed(sums, places, columns, rows, row + 1, norm_weight, out, scaled, squares)
