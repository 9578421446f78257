"""The device code of split_kv.py: a program's part of a row's positions, and the parts of a row made one.

Scores are logarithms to base 2. From `softcap` on, what a layer has not is None, and no code is made for it.
"""

import math

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.attention.quantised import as_factor, int8_scale, of_pairs, quantised

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _rotated(
    heads: "tl.tensor",
    dims: "tl.tensor",
    partners: "tl.tensor",
    cos: "tl.tensor",
    sin: "tl.tensor",
    mask: "tl.tensor",
    norm_weight: "tl.tensor | None",
    norm_eps: float,
    HALF: tl.constexpr,
    AXIS: tl.constexpr,
) -> "tl.tensor":
    """Heads times their rotation, float32: dimension i turns with i + HALF. heads: where each begins. partners: of the
    dimensions. norm_weight: [D], of their RMSNorm ahead of it. AXIS: of the dimensions."""
    own = tl.load(heads + dims, mask, other=0.0).to(tl.float32)
    other = tl.load(heads + partners, mask, other=0.0).to(tl.float32)
    if norm_weight is not None:
        # As where the head is normed, stored and read again.
        kind = heads.dtype.element_ty
        over_rms = tl.rsqrt(tl.sum(own * own, AXIS, keep_dims=True) / (2 * HALF) + norm_eps)
        own = (own * over_rms).to(kind).to(tl.float32) * tl.load(norm_weight + dims).to(tl.float32)
        other = (other * over_rms).to(kind).to(tl.float32) * tl.load(norm_weight + partners).to(tl.float32)
        own, other = own.to(kind).to(tl.float32), other.to(kind).to(tl.float32)
    return own * cos + other * tl.where(dims < HALF, -sin, sin)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def bent(
    scores: "tl.tensor", softcap: "float | None", slopes: "tl.tensor | None", distances: "tl.tensor"
) -> "tl.tensor":
    """What variant.py does to scaled scores. With a softcap they come as 2 log2(e) times the argument of tanh.
    distances: of each position from the row's own, not above 0 where the row sees it."""
    if softcap is not None:
        scores = softcap - 2.0 * softcap / (tl.exp2(scores) + 1.0)
    if slopes is not None:
        scores += slopes[:, None] * distances
    return scores


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _store_quantised(
    place: "tl.tensor", scales: "tl.tensor", number: "tl.tensor", head: "tl.tensor", values: "tl.tensor"
) -> None:
    """values: [D] of one position and head, in the model's dtype. number: of both among all positions' heads."""
    values = values.to(tl.float32)
    if place.dtype.element_ty == tl.int8:
        scale = int8_scale(tl.max(tl.abs(values), 0, keep_dims=True))
        tl.store(scales + number + tl.arange(0, 1), scale)
    else:
        scale = tl.load(scales + head + tl.arange(0, 1))
    tl.store(place, quantised(values, tl.broadcast_to(scale, values.shape), place.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _page_of(table: "tl.tensor", block: "tl.tensor", PAGE: tl.constexpr, BLOCK: tl.constexpr) -> "tl.tensor":
    """The page that a block lies in. table: of the row."""
    return tl.load(table + block * BLOCK // PAGE).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _load_block(
    k_pages: "tl.tensor",
    v_pages: "tl.tensor",
    page: "tl.tensor",
    positions: "tl.tensor",
    visible: "tl.tensor",
    page_stride: int,
    position_stride: int,
    head_offset: "tl.tensor",
    D: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRED: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor]":
    """Keys, [D, BLOCK], and values, [BLOCK, D], as they lie in a page. positions: [BLOCK]. visible: [BLOCK]: what lies
    past the sequence may be anything, and a weight of zero times NaN is NaN. PAIRED: values are [BLOCK, D / 2] int16,
    of two dimensions each."""
    places = page * page_stride + head_offset + (positions % PAGE).to(tl.int64) * position_stride
    dims = tl.arange(0, D)
    keys = tl.load(k_pages + places[None, :] + dims[:, None])
    if PAIRED:
        pairs = v_pages.to(tl.pointer_type(tl.int16))
        values = tl.load(pairs + places[:, None] // 2 + tl.arange(0, D // 2)[None, :], visible[:, None], other=0)
    else:
        values = tl.load(v_pages + places[:, None] + dims[None, :], visible[:, None], other=0.0)
    return keys, values


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _weigh_block(
    peak: "tl.tensor",
    total: "tl.tensor",
    queries: "tl.tensor",
    keys: "tl.tensor",
    key_scales: "tl.tensor | None",
    visible: "tl.tensor",
    distances: "tl.tensor",
    scale: "tl.tensor",
    softcap: "float | None",
    slopes: "tl.tensor | None",
) -> "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]":
    """The online softmax with one block more: largest scores and sums of weights, [ROWS], the weights of the block,
    [ROWS, BLOCK], and what those before are to be multiplied by, [ROWS, 1]. keys: see _load_block. key_scales: [BLOCK],
    where each position has its own. visible: [BLOCK]. distances: see bent."""
    products = tl.dot(queries, keys)
    if key_scales is not None:
        products *= key_scales[None, :]
    scores = tl.where(visible[None, :], bent(products * scale, softcap, slopes, distances[None, :]), -1e30)
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    return new_peak, total * shrink + tl.sum(weights, 1), weights, shrink[:, None]


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _combined(
    parts: "tl.tensor",
    peaks_and_sums: "tl.tensor",
    first_part: "tl.tensor",
    num_parts: "tl.tensor",
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor, tl.tensor]":
    """Of a row's parts for one KV head: the sum of values, [GROUP_BLOCK, D], the largest score and the sum of weights,
    [GROUP_BLOCK]. AT_ONCE: parts that are read at a time, a power of two; more are faster where nothing else runs, and
    take the room of other programs where much does."""
    group = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, D)
    of_row = tl.arange(0, SPLITS)
    live = (group < GROUP)[:, None] & (of_row < num_parts)[None, :]
    places = peaks_and_sums + ((first_part + of_row)[None, :] * GROUP + group[:, None]) * 2
    peaks = tl.load(places, live, other=-1e30)
    totals = tl.load(places + 1, live, other=0.0)
    best = tl.max(peaks, 1)
    sums = tl.sum(tl.exp2(peaks - best[:, None]) * totals, 1)
    whole = tl.zeros([GROUP_BLOCK, D], tl.float32)
    # Parts are the dimension in the middle, the last that Triton shares out: so those of a sum are in one thread.
    for first in tl.static_range(0, SPLITS, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        alive = (group < GROUP)[:, None] & (some < num_parts)[None, :]
        numbers = (first_part + some)[None, :] * GROUP + group[:, None]
        share = tl.exp2(tl.load(peaks_and_sums + numbers * 2, alive, other=-1e30) - best[:, None])
        values = tl.load(parts + numbers[:, :, None] * D + dims[None, None, :], alive[:, :, None], other=0.0)
        whole += tl.sum(share[:, :, None] * values, 1)
    return whole, best, sums


@triton.jit(do_not_specialize=["num_rows", "num_programs"])  # type: ignore[untyped-decorator]  # triton has no types
def share_kernel(
    kv_lens: "tl.tensor",
    part_blocks: "tl.tensor",
    num_rows: int,
    num_programs: int,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One program for all rows: see split_kv.share_out. ROWS: read at a time. WHOLE: blocks of a part at most."""
    blocks = 0
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        blocks += tl.sum((tl.load(kv_lens + rows, rows < num_rows, other=0) + BLOCK - 1) // BLOCK, 0)
    each = (blocks + num_programs - 1) // num_programs
    tl.store(part_blocks, tl.minimum(tl.maximum(each, 1), WHOLE))


@triton.jit(do_not_specialize=["least_blocks"])  # type: ignore[untyped-decorator]  # triton has no types
def split_kv_kernel(
    q: "tl.tensor",
    k_pages: "tl.tensor",
    v_pages: "tl.tensor",
    block_tables: "tl.tensor",
    kv_lens: "tl.tensor",
    out: "tl.tensor",
    parts: "tl.tensor",
    peaks_and_sums: "tl.tensor",
    finished: "tl.tensor",
    part_blocks: "tl.tensor | None",
    k: "tl.tensor",
    v: "tl.tensor",
    cos: "tl.tensor",
    sin: "tl.tensor",
    scale: float,
    window: int,
    q_stride: int,
    q_head_stride: int,
    k_stride: int,
    k_head_stride: int,
    v_stride: int,
    v_head_stride: int,
    table_stride: int,
    page_stride: int,
    position_stride: int,
    head_stride: int,
    least_blocks: int,
    softcap: "float | None",
    segment: "int | None",
    sinks: "tl.tensor | None",
    alibi_slopes: "tl.tensor | None",
    temperatures: "tl.tensor | None",
    k_scales: "tl.tensor | None",
    v_scales: "tl.tensor | None",
    q_norm: "tl.tensor | None",
    k_norm: "tl.tensor | None",
    norm_eps: float,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    FRESH: tl.constexpr,
    CHAINED: tl.constexpr,
    NUMBERS: tl.constexpr,
    PAIRED: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """k, v, cos, sin: of the rows themselves; read if FRESH, where q comes as the model made it. part_blocks: how long
    a part is, where least_blocks does not say it. NUMBERS: the dtype of products with quantised pages. PAIRED: values
    are read by two, see quantised.of_pairs. AT_ONCE: see _combined.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(1)
    BY_POSITION: tl.constexpr = k_pages.dtype.element_ty == tl.int8  # whether scales are of positions or of heads
    kv_len = tl.load(kv_lens + row)
    first_position = tl.where(window > 0, tl.maximum(kv_len - window, 0), 0)
    if segment is not None:
        first_position = tl.maximum(first_position, (kv_len - 1) // segment * segment)
    first_block = first_position // BLOCK
    num_blocks = (kv_len + BLOCK - 1) // BLOCK - first_block
    if part_blocks is not None:
        least_blocks = tl.load(part_blocks)
    most_parts = tl.minimum((num_blocks + least_blocks - 1) // least_blocks, SPLITS)
    blocks_each = (num_blocks + most_parts - 1) // most_parts
    num_parts = (num_blocks + blocks_each - 1) // blocks_each
    begin = first_block + split * blocks_each
    end = tl.minimum(begin + blocks_each, first_block + num_blocks)

    dims = tl.arange(0, D)
    offsets = tl.arange(0, BLOCK)
    table = block_tables + row.to(tl.int64) * table_stride
    strides = page_stride, position_stride, head * head_stride
    newest = kv_len - 1
    if CHAINED:
        gdc_wait()
    if split >= num_parts:
        return

    # At least what a tensor core multiplies; rows past the group are masked.
    ROWS: tl.constexpr = 16 if GROUP_BLOCK < 16 else GROUP_BLOCK
    group = tl.arange(0, ROWS)
    in_group = (group < GROUP)[:, None]
    heads = (row * num_kv_heads + head).to(tl.int64) * GROUP
    q_heads = q + row.to(tl.int64) * q_stride + (head * GROUP + group)[:, None] * q_head_stride
    if FRESH:
        row_cos = tl.load(cos + row.to(tl.int64) * D + dims).to(tl.float32)
        row_sin = tl.load(sin + row.to(tl.int64) * D + dims).to(tl.float32)
        angles = row_cos[None, :], row_sin[None, :]
        partners = tl.max_contiguous(tl.multiple_of(dims ^ (D // 2), 8), 8)  # or the compiler loads them one by one
        queries = _rotated(q_heads, dims[None, :], partners[None, :], *angles, in_group, q_norm, norm_eps, D // 2, 1)
        if temperatures is not None:
            queries *= tl.load(temperatures + row)
        queries = queries.to(q.dtype.element_ty)
        if split == num_parts - 1:
            page = tl.load(table + newest // PAGE).to(tl.int64)
            place = page * page_stride + (newest % PAGE).to(tl.int64) * position_stride + head * head_stride + dims
            k_head = k + row.to(tl.int64) * k_stride + head * k_head_stride
            key = _rotated(k_head, dims, partners, row_cos, row_sin, dims < D, k_norm, norm_eps, D // 2, 0)
            value = tl.load(v + row.to(tl.int64) * v_stride + head * v_head_stride + dims)
            if k_scales is not None:
                number = (page * PAGE + newest % PAGE) * num_kv_heads + head
                _store_quantised(k_pages + place, k_scales, number, head, key.to(k.dtype.element_ty))
                _store_quantised(v_pages + place, v_scales, number, head, value)
            else:
                tl.store(k_pages + place, key.to(k_pages.dtype.element_ty))
                tl.store(v_pages + place, value)
            tl.debug_barrier()  # stored before any thread of the program reads that page
    else:
        queries = tl.load(q_heads + dims[None, :], in_group, other=0.0)
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head * GROUP + group, group < GROUP, other=0.0) * _LOG2_E
    else:
        slopes = None
    if k_scales is not None:
        queries = as_factor(queries, NUMBERS)
        if not BY_POSITION:
            scale *= tl.load(k_scales + head)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # PAIRED: of the dimensions of even number, and of the others.
    mixed = tl.zeros([ROWS, D // 2 if PAIRED else D], tl.float32)
    odd = mixed
    # Each page is asked for a block ahead: an address that is itself on its way keeps the compiler from having the next
    # block on its way while this one is multiplied.
    next_page = _page_of(table, begin, PAGE, BLOCK)
    for block in range(begin, end):
        page, next_page = next_page, _page_of(table, tl.minimum(block + 1, end - 1), PAGE, BLOCK)
        positions = block * BLOCK + offsets
        visible = (positions < kv_len) & (positions >= first_position)
        keys, values = _load_block(k_pages, v_pages, page, positions, visible, *strides, D, PAGE, PAIRED)
        key_scales, value_scales = None, None
        if k_scales is not None:
            keys = keys.to(NUMBERS)
            if BY_POSITION:
                numbers = (page * PAGE + positions % PAGE) * num_kv_heads + head
                key_scales = tl.load(k_scales + numbers, visible, other=0.0)
                value_scales = tl.load(v_scales + numbers, visible, other=0.0)
        read = queries, keys, key_scales, visible, positions - newest
        peak, total, weights, shrink = _weigh_block(peak, total, *read, scale, softcap, slopes)
        if value_scales is not None:
            weights *= value_scales[None, :]
        if PAIRED:
            of_even, of_odd = of_pairs(values)
            odd = tl.dot(weights.to(NUMBERS), of_odd, odd * shrink)
            mixed = tl.dot(weights.to(NUMBERS), of_even, mixed * shrink)
        else:
            values = values if k_scales is None else values.to(NUMBERS)
            mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink)
    if PAIRED:
        mixed = tl.join(mixed, odd).reshape(ROWS, D)
    if k_scales is not None and not BY_POSITION:
        mixed *= tl.load(v_scales + head)
    if CHAINED:
        gdc_launch_dependents()
    if num_parts == 1:
        if sinks is not None:
            total += tl.exp2(tl.load(sinks + head * GROUP + group, group < GROUP, other=0.0) * _LOG2_E - peak)
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (heads + group)[:, None] * D + dims[None, :], result, in_group)
        return

    first_part = (row * num_kv_heads + head).to(tl.int64) * SPLITS
    part_heads = (first_part + split) * GROUP + group
    tl.store(parts + part_heads[:, None] * D + dims[None, :], mixed, in_group)
    tl.store(peaks_and_sums + part_heads * 2, peak, group < GROUP)
    tl.store(peaks_and_sums + part_heads * 2 + 1, total, group < GROUP)
    tl.debug_barrier()  # the whole program's stores come before its word that it is done
    counter = finished + row * num_kv_heads + head
    if tl.atomic_add(counter, 1, sem="acq_rel") != num_parts - 1:
        return
    tl.store(counter, 0)  # for the next layer

    whole, best, sums = _combined(parts, peaks_and_sums, first_part, num_parts, GROUP, GROUP_BLOCK, D, SPLITS, AT_ONCE)
    of_group = tl.arange(0, GROUP_BLOCK)
    if sinks is not None:
        sums += tl.exp2(tl.load(sinks + head * GROUP + of_group, of_group < GROUP, other=0.0) * _LOG2_E - best)
    places = out + (heads + of_group)[:, None] * D + dims[None, :]
    tl.store(places, (whole / sums[:, None]).to(out.dtype.element_ty), (of_group < GROUP)[:, None])
