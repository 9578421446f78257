"""The device code of few_rows.py: from the residual stream's norm to the stream behind the experts, in three kernels.

    router_kernel    the score of every expert for every row
    gate_up_kernel   a program makes BN inner columns of one pair of a row and an expert; it finds the expert itself
    down_kernel      a program makes BN columns of a row's update, of all its experts one behind the other

A product of one row is no matter of tensor cores: its sums would wait for one another there. Each thread adds up what
it reads in float32, elements of several columns and of a part of the depth, and the threads meet at the end. Quantised
weights are read otherwise: few_rows_stored.py. HOW: how; None for one that is not quantised, whose scales and zeros are
None.

A CHAINED kernel was launched while the one ahead still ran: until `gdc_wait` it touches nothing that a step writes, and
every program waits, since only then what is two kernels ahead is done when this one is.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.experts.few_rows_stored import added, row_product
from graphgen.models.experts.tiles import activated
from graphgen.models.few_rows_kernels import add_row

_NO_ZERO = tl.constexpr(1e-20)
"""See routing.py."""


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
def _scores(
    logits: "tl.tensor", numbers: "tl.tensor", E: tl.constexpr, EXPERTS: tl.constexpr, SOFTMAX: tl.constexpr
) -> "tl.tensor":
    """[EXPERTS]: of a row's logits those of a router."""
    peak = tl.max(logits, 0)
    if SOFTMAX:
        powers = tl.where(numbers < E, tl.exp(logits - peak), 0.0)
        scores = powers / tl.sum(powers, 0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    return scores


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _ranked(
    logits: "tl.tensor",
    correction: "tl.tensor | None",
    place: "tl.tensor",
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor, tl.tensor]":
    """The expert in a place of the order of a row's choice; [EXPERTS] whether each is among the first TOP_K; its logit.
    Of equal ones the first comes first, and a NaN counts as the least."""
    numbers = tl.arange(0, EXPERTS)
    loaded = tl.load(logits + numbers, numbers < E, other=float("-inf"))
    own = tl.where(loaded == loaded, loaded, float("-inf"))
    choice = own
    if correction is not None:
        corrections = tl.load(correction + numbers, numbers < E, other=0.0)
        choice = tl.where(numbers < E, _scores(own, numbers, E, EXPERTS, SOFTMAX) + corrections, float("-inf"))
    # Integers in the order of the floats, no two of them equal: the last bits are the experts' numbers.
    bits = tl.where(choice == 0.0, 0.0, choice).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    keys = ordered * EXPERTS + (EXPERTS - 1 - numbers)
    left = keys
    expert = 0
    for at in range(TOP_K):
        best = tl.max(left, 0)
        expert = tl.where(at == place, EXPERTS - 1 - (best & (EXPERTS - 1)).to(tl.int32), expert)
        left = tl.where(left == best, -(1 << 62), left)
    return expert, left != keys, own


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _share(
    logits: "tl.tensor",
    chosen: "tl.tensor",
    expert: "tl.tensor",
    scale: float,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
) -> "tl.tensor":
    """The weight of an expert: the formulas of routing.py. logits, chosen: see _ranked."""
    numbers = tl.arange(0, EXPERTS)
    FALLS_OUT: tl.constexpr = SOFTMAX and RENORMALISE  # what all scores are divided by
    scores = tl.exp(logits - tl.max(logits, 0)) if FALLS_OUT else _scores(logits, numbers, E, EXPERTS, SOFTMAX)
    share = tl.sum(tl.where(numbers == expert, scores, 0.0), 0)
    if RENORMALISE:
        share /= tl.sum(tl.where(chosen, scores, 0.0), 0) + _NO_ZERO
    return share * scale


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _gate_and_up(
    x_row: "tl.tensor",
    weight: "tl.tensor",
    expert: "tl.tensor",
    columns: "tl.tensor",
    F: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor]":
    """[BN, BK] float32 each, to be added up: a row of the input times rows `columns` of an expert's gate, and of its
    up."""
    depth = tl.arange(0, BK)
    gate_rows = weight + (expert.to(tl.int64) * 2 * F + columns)[:, None] * K
    up_rows = gate_rows + tl.full([1], F, tl.int64) * K
    gates = tl.zeros((BN, BK), tl.float32)
    ups = tl.zeros((BN, BK), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        own = tl.load(x_row + k + depth).to(tl.float32)[None, :]
        gates += own * tl.load(gate_rows + k + depth[None, :]).to(tl.float32)
        ups += own * tl.load(up_rows + k + depth[None, :]).to(tl.float32)
    return gates, ups


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def gate_up_kernel(
    x: "tl.tensor",
    squares: "tl.tensor",
    logits: "tl.tensor",
    correction: "tl.tensor | None",
    live: "tl.tensor | None",
    weight: "tl.tensor",
    stored_scales: "tl.tensor | None",
    stored_zeros: "tl.tensor | None",
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
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """inner[pair] = weight of the pair * activation(gate) * up, of x / rms and the pair's expert, whose F rows of gate
    lie before those of up. experts, weights: [pairs] of each, for the next kernel; E for a row without a token, whose
    inner columns and weights stay as they are."""
    pair = tl.program_id(0)
    row = pair // TOP_K
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    if CHAINED:
        gdc_wait()
    logits += row * logits_stride
    place = pair % TOP_K
    expert, chosen, own_logits = _ranked(logits, correction, place, E, EXPERTS, TOP_K, SOFTMAX)
    if live is not None:
        expert = tl.where(tl.load(live + row) != 0, expert, E)
    if tl.program_id(1) == 0:
        tl.store(experts + pair, expert)
    if expert < E:
        parts = tl.arange(0, PARTS)
        square = tl.load(squares + row * num_parts + parts, parts < num_parts, other=0.0)
        x_row = x + row.to(tl.int64) * K
        if HOW is None:
            gates, ups = _gate_and_up(x_row, weight, expert, columns, F, K, BN, BK, STAGES)
        else:  # rows of gate and up in turn: then those of a column end in the same thread
            in_turn = tl.arange(0, 2 * BN)
            both = tl.program_id(1) * BN + in_turn // 2 + in_turn % 2 * F
            only = tl.zeros((1,), tl.int32) + expert
            products = row_product(
                x_row, weight, stored_scales, stored_zeros, only, both, 2 * F, E, K, 1, 1, 2 * BN, STAGES, HOW
            )
        if CHAINED:
            gdc_launch_dependents()
        share = _share(own_logits, chosen, expert, scale, E, EXPERTS, SOFTMAX, RENORMALISE)
        if tl.program_id(1) == 0:
            tl.store(weights + pair, share)
        over_rms = tl.rsqrt(tl.sum(square, 0) / K + eps)
        if HOW is None:
            gate, up = tl.sum(gates, 1), tl.sum(ups, 1)
        else:
            gate, up = tl.split(added(products).reshape(BN, 2))
        gate *= over_rms
        up *= over_rms
        if bias is not None:
            biases = bias + expert.to(tl.int64) * 2 * F + columns
            gate += tl.load(biases).to(tl.float32)
            up += tl.load(biases + F).to(tl.float32)
        if limit is not None:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        made = activated(gate, ACTIVATION) * (up + 1.0 if UP_PLUS_ONE else up) * share
        tl.store(inner + pair.to(tl.int64) * F + columns, made.to(inner.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _downs(
    x_row: "tl.tensor",
    weight: "tl.tensor",
    chosen: "tl.tensor",
    columns: "tl.tensor",
    N: int,
    F: tl.constexpr,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    PAIRS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
) -> "tl.tensor":
    """[BN, BK] float32, to be added up: see few_rows_stored.row_product, of a weight that is not quantised."""
    depth = tl.arange(0, BK)
    of_row = tl.arange(0, PAIRS)
    num_columns = tl.where(tl.max(chosen, 0) < E, COUNT * F, 0)
    sums = tl.zeros((BN, BK), tl.float32)
    for begin in tl.range(0, num_columns, BK, num_stages=STAGES):
        expert = tl.sum(tl.where(of_row == begin // F, chosen, 0), 0).to(tl.int64)  # reads nothing, or it would wait
        weight_rows = weight + (expert * N + columns)[:, None] * F + tl.multiple_of(begin % F, BK)
        own = tl.load(x_row + begin + depth).to(tl.float32)[None, :]
        sums += own * tl.load(weight_rows + depth[None, :]).to(tl.float32)
    return sums


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def down_kernel(
    inner: "tl.tensor",
    experts: "tl.tensor",
    weights: "tl.tensor",
    weight: "tl.tensor",
    stored_scales: "tl.tensor | None",
    stored_zeros: "tl.tensor | None",
    bias: "tl.tensor | None",
    shared_inner: "tl.tensor | None",
    shared_weight: "tl.tensor | None",
    shared_scales: "tl.tensor | None",
    shared_zeros: "tl.tensor | None",
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
    PAIRS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SHARED_BK: tl.constexpr,
    STAGES: tl.constexpr,
    SHARED_STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
    HOW: tl.constexpr,
    SHARED_HOW: tl.constexpr,
) -> None:
    """out = residual + inner of all pairs of a row @ the weights of their experts, one behind the other, + what the
    shared one adds, and its norm begun. inner: [row, TOP_K * F], each pair times its weight. shared_logits: of the
    factor of the shared one, where it has one. PAIRS: a power of two from TOP_K."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    places = row.to(tl.int64) * N + columns
    scales = tl.load(norm_weight + columns).to(tl.float32)
    if CHAINED:
        gdc_wait()
    before = tl.load(residual + places)
    first_pair = row * TOP_K
    of_row = tl.arange(0, PAIRS)
    chosen = tl.load(experts + first_pair + of_row, of_row < TOP_K, other=0)
    inner_row = inner + row.to(tl.int64) * (TOP_K * F)
    if HOW is None:
        sums = _downs(inner_row, weight, chosen, columns, N, F, E, TOP_K, PAIRS, BN, BK, STAGES)
    else:
        sums = row_product(
            inner_row, weight, stored_scales, stored_zeros, chosen, columns, N, E, F, TOP_K, PAIRS, BN, STAGES, HOW
        )
    if shared_inner is not None:
        shared_row = shared_inner + row.to(tl.int64) * SHARED_F
        only = tl.zeros((1,), tl.int32)
        if SHARED_HOW is None:
            shared_sums = _downs(
                shared_row, shared_weight, only, columns, N, SHARED_F, 1, 1, 1, BN, SHARED_BK, SHARED_STAGES
            )
        else:
            shared_sums = row_product(
                shared_row,
                shared_weight,
                shared_scales,
                shared_zeros,
                only,
                columns,
                N,
                1,
                SHARED_F,
                1,
                1,
                BN,
                SHARED_STAGES,
                SHARED_HOW,
            )
    if CHAINED:
        gdc_launch_dependents()
    result = tl.sum(sums, 1) if HOW is None else added(sums)
    if shared_inner is not None:
        shared = tl.sum(shared_sums, 1) if SHARED_HOW is None else added(shared_sums)
        if shared_bias is not None:
            shared += tl.load(shared_bias + columns).to(tl.float32)
        if shared_logits is not None:
            shared *= 1.0 / (1.0 + tl.exp(-tl.load(shared_logits + row * logits_stride)))
        result += shared
    if bias is not None:
        for place in tl.static_range(TOP_K):
            expert = tl.load(experts + first_pair + place)
            own = tl.load(bias + expert.to(tl.int64) * N + columns, columns < tl.where(expert < E, N, 0), other=0.0)
            result += tl.where(expert < E, tl.load(weights + first_pair + place), 0.0) * own.to(tl.float32)
    part = row * tl.num_programs(0) + tl.program_id(0)
    add_row(result, before, places, scales, part, out, scaled, squares)
