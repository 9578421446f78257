"""Attention of decode rows: one row a request, its KV read in parallel by several programs. A Triton kernel, CUDA only.

The positions of a row are split over programs, each of which makes an online softmax over its part; the last program
of a row and KV head to finish combines the parts (flash decoding, https://pytorch.org/blog/flash-decoding). The query
heads of one KV head share a program, so keys and values are read once.

In a step without chunks the kernel also norms and rotates the row's query and key and writes its key and value into
their page, which saves launches: the program that reads a row's newest position writes it first.

Block tables and lengths are read on the device, so a step needs no plan. The split adapts to each row's length: a
captured grid serves short and long contexts, and a padded row costs one page.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.quantised import as_factor, int8_scale, product_dtype, quantised
from graphgen.models.attention.variant import Scoring
from graphgen.models.chaining import launch_options

_LEAST_PROGRAMS = 512
"""Programs that keep an H200's memory busy: about four on each multiprocessor."""

_EVEN_PROGRAMS = 1024
"""Programs of unequal rows that end at about the same time: two times as many, shared out as they end."""

_MOST_SPLITS = 32
_LEAST_SPLITS = 8  # also beside many rows: one long context among short ones must not be read by one program alone
_WHOLE_BLOCKS = 16  # blocks that are not worth a split beside _EVEN_PROGRAMS others
_BLOCK = 64

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _rotated(
    heads: "tl.tensor",
    dims: "tl.tensor",
    cos: "tl.tensor",
    sin: "tl.tensor",
    mask: "tl.tensor",
    norm_weight: "tl.tensor | None",
    norm_eps: float,
    HALF: tl.constexpr,
    AXIS: tl.constexpr,
) -> "tl.tensor":
    """Heads times their rotation, float32: dimension i turns with i + HALF. heads: where each begins. norm_weight: [D],
    of their RMSNorm ahead of it. AXIS: of the dimensions."""
    own = tl.load(heads + dims, mask, other=0.0).to(tl.float32)
    other = tl.load(heads + (dims ^ HALF), mask, other=0.0).to(tl.float32)
    if norm_weight is not None:
        # As where the head is normed, stored and read again.
        kind = heads.dtype.element_ty
        over_rms = tl.rsqrt(tl.sum(own * own, AXIS, keep_dims=True) / (2 * HALF) + norm_eps)
        own = (own * over_rms).to(kind).to(tl.float32) * tl.load(norm_weight + dims).to(tl.float32)
        other = (other * over_rms).to(kind).to(tl.float32) * tl.load(norm_weight + (dims ^ HALF)).to(tl.float32)
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


@triton.jit(do_not_specialize=["least_blocks"])  # type: ignore[untyped-decorator]  # triton has no types
def _split_kv_kernel(
    q: "tl.tensor",
    k_pages: "tl.tensor",
    v_pages: "tl.tensor",
    block_tables: "tl.tensor",
    kv_lens: "tl.tensor",
    out: "tl.tensor",
    parts: "tl.tensor",
    peaks_and_sums: "tl.tensor",
    finished: "tl.tensor",
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
) -> None:
    """k, v, cos, sin: of the rows themselves; read if FRESH, where q comes as the model made it. NUMBERS: the dtype of
    products with quantised pages.

    From softcap on: what this layer has not is None, and no code is made for it. Scores are logarithms to base 2.
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
    most_parts = tl.minimum((num_blocks + least_blocks - 1) // least_blocks, SPLITS)
    blocks_each = (num_blocks + most_parts - 1) // most_parts
    num_parts = (num_blocks + blocks_each - 1) // blocks_each
    if CHAINED:
        gdc_wait()
    if split >= num_parts:
        return
    begin = first_block + split * blocks_each
    end = tl.minimum(begin + blocks_each, first_block + num_blocks)

    dims = tl.arange(0, D)
    # At least what a tensor core multiplies; rows past the group are masked.
    ROWS: tl.constexpr = 16 if GROUP_BLOCK < 16 else GROUP_BLOCK
    group = tl.arange(0, ROWS)
    in_group = (group < GROUP)[:, None]
    offsets = tl.arange(0, BLOCK)
    heads = (row * num_kv_heads + head).to(tl.int64) * GROUP
    q_heads = q + row.to(tl.int64) * q_stride + (head * GROUP + group)[:, None] * q_head_stride
    if FRESH:
        row_cos = tl.load(cos + row.to(tl.int64) * D + dims).to(tl.float32)
        row_sin = tl.load(sin + row.to(tl.int64) * D + dims).to(tl.float32)
        angles = row_cos[None, :], row_sin[None, :]
        queries = _rotated(q_heads, dims[None, :], *angles, in_group, q_norm, norm_eps, D // 2, 1)
        if temperatures is not None:
            queries *= tl.load(temperatures + row)
        queries = queries.to(q.dtype.element_ty)
        if split == num_parts - 1:
            newest = kv_len - 1
            page = tl.load(block_tables + row.to(tl.int64) * table_stride + newest // PAGE).to(tl.int64)
            place = page * page_stride + (newest % PAGE).to(tl.int64) * position_stride + head * head_stride + dims
            k_head = k + row.to(tl.int64) * k_stride + head * k_head_stride
            key = _rotated(k_head, dims, row_cos, row_sin, dims < D, k_norm, norm_eps, D // 2, 0)
            if k_scales is not None:
                number = (page * PAGE + newest % PAGE) * num_kv_heads + head
                value = tl.load(v + row.to(tl.int64) * v_stride + head * v_head_stride + dims)
                _store_quantised(k_pages + place, k_scales, number, head, key.to(k.dtype.element_ty))
                _store_quantised(v_pages + place, v_scales, number, head, value)
            else:
                tl.store(k_pages + place, key.to(k_pages.dtype.element_ty))
                tl.store(v_pages + place, tl.load(v + row.to(tl.int64) * v_stride + head * v_head_stride + dims))
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
    mixed = tl.zeros([ROWS, D], tl.float32)
    for block in range(begin, end):
        positions = block * BLOCK + offsets
        page = tl.load(block_tables + row.to(tl.int64) * table_stride + block * BLOCK // PAGE).to(tl.int64)
        base = page * page_stride + head * head_stride
        places = (positions % PAGE).to(tl.int64) * position_stride
        visible = (positions < kv_len) & (positions >= first_position)
        keys = tl.load(k_pages + base + places[None, :] + dims[:, None])
        distances = (positions - (kv_len - 1))[None, :]
        if k_scales is not None:
            products = tl.dot(queries, keys.to(NUMBERS))
            if BY_POSITION:
                numbers = (page * PAGE + positions % PAGE) * num_kv_heads + head
                products *= tl.load(k_scales + numbers, visible, other=0.0)[None, :]
        else:
            products = tl.dot(queries, keys)
        scores = tl.where(visible[None, :], bent(products * scale, softcap, slopes, distances), -1e30)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        # What lies past the sequence may be anything: a weight of zero times NaN is NaN.
        values = tl.load(v_pages + base + places[:, None] + dims[None, :], visible[:, None], other=0.0)
        if k_scales is not None:
            values = values.to(NUMBERS)
            if BY_POSITION:
                weights *= tl.load(v_scales + numbers, visible, other=0.0)[None, :]
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None])
        peak = new_peak
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

    cells = tl.arange(0, GROUP_BLOCK * D)
    in_cells = cells < GROUP * D
    best = tl.full([GROUP_BLOCK * D], -1e30, tl.float32)
    for part in tl.static_range(SPLITS):
        heads_of_part = (first_part + part) * GROUP + cells // D
        best = tl.maximum(best, tl.load(peaks_and_sums + heads_of_part * 2, in_cells & (part < num_parts), other=-1e30))
    whole = tl.zeros([GROUP_BLOCK * D], tl.float32)
    sums = tl.zeros([GROUP_BLOCK * D], tl.float32)
    for part in tl.static_range(SPLITS):
        live = in_cells & (part < num_parts)
        heads_of_part = (first_part + part) * GROUP + cells // D
        share = tl.exp2(tl.load(peaks_and_sums + heads_of_part * 2, live, other=-1e30) - best)
        sums += share * tl.load(peaks_and_sums + heads_of_part * 2 + 1, live, other=0.0)
        whole += share * tl.load(parts + (first_part + part) * GROUP * D + cells, live, other=0.0)
    if sinks is not None:
        sums += tl.exp2(tl.load(sinks + head * GROUP + cells // D, in_cells, other=0.0) * _LOG2_E - best)
    tl.store(out + heads * D + cells, (whole / sums).to(out.dtype.element_ty), in_cells)


class HeadNorms(NamedTuple):
    """RMSNorm of each head of queries and keys."""

    q: Tensor
    """[D]: the weight."""
    k: Tensor
    """[D]"""
    eps: float


class FreshRows(NamedTuple):
    """What decode rows bring whose keys and values are not in their pages yet."""

    k: Tensor
    """[R, Hkv, D], before its rotation; any strides but 1 in the last dimension."""
    v: Tensor
    """[R, Hkv, D], the same."""
    cos: Tensor
    """[R, D] contiguous, of the row's position."""
    sin: Tensor
    """[R, D] contiguous."""
    temperatures: Tensor | None
    """[R] float32, by which the rotated queries are multiplied."""
    head_norms: HeadNorms | None = None
    """Of q and k, which come before it then; None: they need none, or have it behind them."""


class SplitKvTensors(NamedTuple):
    """What the programs of one row tell each other. Steps and layers run one after another, so they share it."""

    parts: Tensor
    """float32: the sums of each part of a row."""
    peaks_and_sums: Tensor
    """float32: the largest score and the sum of weights of each part."""
    finished: Tensor
    """int32: parts that are done, of each row and KV head. Zero before the first use; the kernel leaves it so."""


def open_workspace(
    most_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> SplitKvTensors:
    """For steps of at most so many rows."""
    most_parts = max(rows * num_splits(rows, num_kv_heads)[0] for rows in range(1, most_rows + 1))
    return SplitKvTensors(
        parts=torch.empty(most_parts * num_heads * head_dim, dtype=torch.float32, device=device),
        peaks_and_sums=torch.empty(most_parts * num_heads * 2, dtype=torch.float32, device=device),
        finished=torch.zeros(most_rows * num_kv_heads, dtype=torch.int32, device=device),
    )


@functools.cache
def num_splits(num_rows: int, num_kv_heads: int) -> tuple[int, int]:
    """(parts that a row is split into at most, blocks that make a row worth another part) for a step of so many rows.

    Equal parts, so the last may be shorter than the others by less than a block for each of them.
    """
    needed, even = (-(-programs // (num_rows * num_kv_heads)) for programs in (_LEAST_PROGRAMS, _EVEN_PROGRAMS))
    splits = min(max(1 << (needed - 1).bit_length(), _LEAST_SPLITS), _MOST_SPLITS)
    return splits, max(1, _WHOLE_BLOCKS // even)


def split_kv_attention(
    q: Tensor,
    out: Tensor,
    pages: LayerPages,
    block_tables: Tensor,
    kv_lens: Tensor,
    workspace: SplitKvTensors,
    scoring: Scoring,
    fresh: FreshRows | None,
    chained: bool,
) -> None:
    """Writes out [R, Hq, D], the attention of R rows over the first kv_lens positions of their block tables.

    q: [R, Hq, D], any strides but 1 in the last dimension. fresh: the newest position of every row is not in its page
    yet; norms and rotates q and k and writes k and v there. None: q is rotated and all is in the pages. out:
    contiguous. pages: k and v of one layout, page_size a power of two from 16. block_tables: [R, M] int32. kv_lens:
    [R] int32, at least 1. workspace: for at least R rows. chained: launch before the kernel ahead is done, and wait
    inside (programmatic dependent launch; SM90 on).
    """
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = pages.k.shape[1:3]
    splits, least_blocks = num_splits(num_rows, num_kv_heads)
    group = num_heads // num_kv_heads
    # Without fresh rows nothing reads them.
    k, v, cos, sin, temperatures, head_norms = fresh or (q, q, q, q, None, None)
    numbers = scoring.numbers
    scale, softcap = math.log2(math.e) * numbers.scale, None
    if numbers.softcap:
        scale, softcap = 2.0 * scale / numbers.softcap, math.log2(math.e) * numbers.softcap
    _split_kv_kernel[(splits, num_kv_heads, num_rows)](
        q,
        pages.k,
        pages.v,
        block_tables,
        kv_lens,
        out,
        *workspace,
        k,
        v,
        cos,
        sin,
        scale,
        numbers.window,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        block_tables.stride(0),
        pages.k.stride(0),
        pages.k.stride(1),
        pages.k.stride(2),
        least_blocks,
        softcap,
        numbers.segment or None,
        scoring.sinks,
        scoring.alibi_slopes,
        temperatures,
        pages.k_scales,
        pages.v_scales,
        *(head_norms or (None, None, 0.0)),
        group,
        triton.next_power_of_2(group),
        head_dim,
        page_size,
        min(page_size, _BLOCK),
        splits,
        fresh is not None,
        chained,
        product_dtype(q.dtype, pages.k.dtype),
        num_warps=4,
        num_stages=2,
        **launch_options(chained),
    )
