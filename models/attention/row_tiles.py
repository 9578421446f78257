"""Attention of ragged rows over pages: tiles of rows and heads that share keys. Two Triton kernels, CUDA only.

A tile is up to 64 pairs of a row and a head, of one request and one KV head, so that keys and values are read once for
all of them and the tensor cores are filled. It serves what others lack: latent attention, whose value is the beginning
of its key, for chunks and decode rows; and chunks of layers whose scores no library computes (segments, soft caps with
sinks).

Where a step has few tiles, the positions of each are split over programs, and a second kernel adds the parts up. Block
tables and lengths are read on the device, so a step needs no plan: the grid follows from its shape alone, and a program
without work ends at once.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.quantised import as_factor, product_dtype
from graphgen.models.attention.split_kv import num_splits
from graphgen.models.attention.split_kv_kernel import bent
from graphgen.models.attention.variant import Scoring

_ENOUGH_PROGRAMS = 264
"""Two on each multiprocessor of an H200: positions of so many tiles of chunks are not split."""

_MOST_SPLITS = 32
_LEAST_POSITIONS = 256
"""Of a tile of a chunk that make another part worth while."""

_LOG2_E = tl.constexpr(math.log2(math.e))
_NOTHING = tl.constexpr(-1e30)
"""The score of what a row does not see, and the peak of a part that saw nothing."""


@triton.jit(  # type: ignore[untyped-decorator]  # triton has no types
    do_not_specialize=["starts", "kv_lens", "num_requests", "num_rows_in_all", "most_splits", "least_blocks"]
)
def _tile_kernel(
    q: "tl.tensor",
    k_pages: "tl.tensor",
    v_pages: "tl.tensor",
    starts: "tl.tensor",
    kv_lens: "tl.tensor",
    block_tables: "tl.tensor",
    out: "tl.tensor",
    parts: "tl.tensor",
    peaks_and_sums: "tl.tensor",
    scale: float,
    window: int,
    num_requests: int,
    num_rows_in_all: int,
    most_splits: int,
    least_blocks: int,
    q_stride: int,
    q_head_stride: int,
    table_stride: int,
    page_stride: int,
    position_stride: int,
    head_stride: int,
    softcap: "float | None",
    segment: "int | None",
    sinks: "tl.tensor | None",
    alibi_slopes: "tl.tensor | None",
    k_scales: "tl.tensor | None",
    v_scales: "tl.tensor | None",
    GROUP: tl.constexpr,
    D: tl.constexpr,
    REST: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    REQUESTS: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_ROW: tl.constexpr,
    NUMBERS: tl.constexpr,
) -> None:
    """ONE_ROW: each request has one row, and `starts` is not read. REST: elements of a key behind the D that are its
    value too, which v_pages then are not read for; 0 where values lie in pages of their own. SPLIT: parts are stored
    for _sum_kernel, also where there is one. NUMBERS: the dtype of products with quantised pages."""
    head, split = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    BY_POSITION: tl.constexpr = k_pages.dtype.element_ty == tl.int8  # whether scales are of positions or of heads
    lanes = tl.arange(0, PAIRS)
    dims = tl.arange(0, D)
    if ONE_ROW:
        TILES: tl.constexpr = (GROUP + PAIRS - 1) // PAIRS
        request = tl.program_id(0) // TILES
        first_row, num_rows = request, 1
        first_pair = tl.program_id(0) % TILES * PAIRS
    else:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
        requests = tl.arange(0, REQUESTS)
        begins = tl.load(starts + requests, requests < num_requests, other=0)
        ends = tl.load(starts + requests + 1, requests < num_requests, other=0)
        counts = ((ends - begins) * GROUP + PAIRS - 1) // PAIRS
        request = tl.sum((tl.cumsum(counts, 0) <= tile).to(tl.int32), 0)
        num_tiles = tl.sum(counts, 0)
        if tile >= num_tiles:
            # Padded rows become zero. There are as many tiles too many as these fill, or more.
            first_silent = tl.load(starts + num_requests) * GROUP + (tile - num_tiles) * PAIRS
            pairs = first_silent + lanes
            rows = (pairs // GROUP).to(tl.int64)
            places = (rows * num_heads + head * GROUP + pairs % GROUP)[:, None] * D + dims[None, :]
            silent = rows < tl.where(split == 0, num_rows_in_all, 0)
            tl.store(out + places, tl.zeros([PAIRS, D], out.dtype.element_ty), silent[:, None])
            return
        first_row = tl.load(starts + request)
        num_rows = tl.load(starts + request + 1) - first_row
        first_pair = (tile - tl.sum(tl.where(requests < request, counts, 0), 0)) * PAIRS
    kv_len = tl.load(kv_lens + request)
    pairs = first_pair + lanes
    rows = pairs // GROUP
    live = rows < num_rows
    own = kv_len - num_rows + rows  # the position of each pair's row
    oldest = kv_len - num_rows + first_pair // GROUP
    newest = kv_len - num_rows + tl.minimum((first_pair + PAIRS - 1) // GROUP, num_rows - 1)
    reach = tl.where(window > 0, window, newest + 1)
    first_position = tl.maximum(oldest - reach + 1, 0)
    if segment is not None:
        first_position = tl.maximum(first_position, oldest // segment * segment)
    first_block = first_position // BLOCK
    num_blocks = newest // BLOCK + 1 - first_block
    most_parts = tl.minimum((num_blocks + least_blocks - 1) // least_blocks, most_splits)
    blocks_each = (num_blocks + most_parts - 1) // most_parts
    begin = first_block + split * blocks_each
    end = tl.minimum(begin + blocks_each, first_block + num_blocks)

    heads = head * GROUP + pairs % GROUP
    of_pair = (first_row + rows).to(tl.int64) * num_heads + heads
    if begin >= end:  # never of the first part
        tl.store(peaks_and_sums + (of_pair * most_splits + split) * 2, tl.full([PAIRS], _NOTHING, tl.float32), live)
        return
    q_rows = (q + (first_row + rows).to(tl.int64) * q_stride + heads * q_head_stride)[:, None]
    queries = tl.load(q_rows + dims[None, :], live[:, None], other=0.0)
    if REST:
        rest = D + tl.arange(0, REST)
        rest_of_queries = tl.load(q_rows + rest[None, :], live[:, None], other=0.0)
    if k_scales is not None:
        queries = as_factor(queries, NUMBERS)
        if not BY_POSITION:
            scale *= tl.load(k_scales + head)
    slopes = tl.load(alibi_slopes + heads, live, other=0.0) * _LOG2_E if alibi_slopes is not None else None
    peak = tl.full([PAIRS], _NOTHING, tl.float32)
    total = tl.zeros([PAIRS], tl.float32)
    mixed = tl.zeros([PAIRS, D], tl.float32)
    table = block_tables + request.to(tl.int64) * table_stride
    for block in range(begin, end):
        positions = block * BLOCK + tl.arange(0, BLOCK)
        page = tl.load(table + block * BLOCK // PAGE).to(tl.int64)
        places = page * page_stride + head * head_stride + (positions % PAGE).to(tl.int64) * position_stride
        # What no row of the tile sees may be anything: a weight of zero times NaN is NaN.
        there = ((positions <= newest) & (positions >= first_position))[:, None]
        keys = tl.load(k_pages + places[:, None] + dims[None, :], there, other=0.0)
        if k_scales is not None:
            keys = keys.to(NUMBERS)
        scores = tl.dot(queries, tl.trans(keys))
        if REST:
            rest_of_keys = tl.load(k_pages + places[:, None] + rest[None, :], there, other=0.0)
            scores = tl.dot(rest_of_queries, tl.trans(rest_of_keys), scores)
            values = keys
        else:
            values = tl.load(v_pages + places[:, None] + dims[None, :], there, other=0.0)
        if k_scales is not None:
            values = values.to(NUMBERS)
            if BY_POSITION:
                numbers = ((page * PAGE + positions % PAGE) * tl.num_programs(1) + head)[:, None]
                scores *= tl.trans(tl.load(k_scales + numbers, there, other=0.0))
        distances = positions[None, :] - own[:, None]
        scores = bent(scores * scale, softcap, slopes, distances)
        seen = (distances <= 0) & (distances > -reach)
        if segment is not None:
            seen = seen & (positions[None, :] >= (own // segment * segment)[:, None])
        scores = tl.where(seen, scores, _NOTHING)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A pair that has seen nothing yet weighs all alike, which `shrink` forgets at the first that it sees.
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        if k_scales is not None and BY_POSITION:
            weights *= tl.trans(tl.load(v_scales + numbers, there, other=0.0))
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None])
        peak = new_peak
    if k_scales is not None and not BY_POSITION:
        mixed *= tl.load(v_scales + head)
    if not SPLIT:
        if sinks is not None:
            total += tl.exp2(tl.load(sinks + heads, live, other=0.0) * _LOG2_E - peak)
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + of_pair[:, None] * D + dims[None, :], result, live[:, None])
    else:
        part = of_pair * most_splits + split
        tl.store(parts + part[:, None] * D + dims[None, :], mixed, live[:, None])
        tl.store(peaks_and_sums + part * 2, peak, live)
        tl.store(peaks_and_sums + part * 2 + 1, total, live)


@triton.jit(do_not_specialize=["live_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def _sum_kernel(
    parts: "tl.tensor",
    peaks_and_sums: "tl.tensor",
    live_rows: "tl.tensor | None",
    sinks: "tl.tensor | None",
    out: "tl.tensor",
    D: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """One program a row and head. live_rows: how many rows hold a token; None: all."""
    row, head = tl.program_id(0), tl.program_id(1)
    end = tl.load(live_rows) if live_rows is not None else row + 1
    if row >= end:
        return
    pair = row.to(tl.int64) * tl.num_programs(1) + head
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D)
    peaks = tl.load(peaks_and_sums + (pair * SPLITS + splits) * 2)
    sums = tl.load(peaks_and_sums + (pair * SPLITS + splits) * 2 + 1, peaks > _NOTHING, other=0.0)
    best = tl.max(peaks, 0)
    total = tl.sum(tl.exp2(peaks - best) * sums, 0)
    if sinks is not None:
        total += tl.exp2(tl.load(sinks + head) * _LOG2_E - best)
    mixed = tl.zeros([D], tl.float32)
    for split in tl.static_range(SPLITS):
        peak = tl.load(peaks_and_sums + (pair * SPLITS + split) * 2)
        there = dims < tl.where(peak > _NOTHING, D, 0)  # what lies there else was never written
        part = tl.load(parts + (pair * SPLITS + split) * D + dims, there, other=0.0)
        mixed += tl.exp2(peak - best) * part
    tl.store(out + pair * D + dims, (mixed / total).to(out.dtype.element_ty))


# --- launches --------------------------------------------------------------------------------------------------


class TileTensors(NamedTuple):
    """Where the parts of a tile wait to be added up. Steps and layers run one after another, so they share it; regions
    that run side by side have one each."""

    parts: Tensor
    """float32: the sums of each part of each row and head."""
    peaks_and_sums: Tensor
    """float32: the largest score and the sum of weights of the same."""


class TileShape(NamedTuple):
    """What a tile is made for."""

    num_heads: int
    num_kv_heads: int
    value_dim: int
    """Elements of a value, and of the part of a key that may be its value too: a power of two from 16."""
    rest_dim: int
    """Elements of a key behind those: a power of two from 16 where values are parts of keys, else 0."""

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.num_kv_heads


class Rows(NamedTuple):
    """Requests whose rows lie one behind the other."""

    starts: Tensor | None
    """[N + 1] int32: the first row of each and the end, as RowTables.chunk_starts; None: each has one row."""
    kv_lens: Tensor
    """[N] int32: positions that the last row of each sees."""
    block_tables: Tensor
    """[N, M] int32"""


class _Tiling(NamedTuple):
    pairs: int
    block: int  # positions read at a time
    num_warps: int


def _tiling(shape: TileShape, one_row: bool, is_hopper: bool) -> _Tiling:
    """Registers hold the values that a tile gathers, shared memory its queries and two blocks of keys: 221 KB for 64
    pairs of latent attention, which only SM90 has, 76 KB for 32 and 56 KB for the 16 of a row."""
    most = 64 if is_hopper or not shape.rest_dim else 32
    pairs = min(max(triton.next_power_of_2(shape.group), 16), most) if one_row else most
    wide = shape.value_dim >= 256
    block = 64 if pairs == 64 and (is_hopper or not wide) else 32
    return _Tiling(pairs, block, 8 if wide and pairs > 16 else 4)


def _splits(shape: TileShape, num_rows: int, num_requests: int, one_row: bool, tiling: _Tiling) -> tuple[int, int, int]:
    """(tiles of a KV head, parts that the positions of each are split into at most, blocks that make a part)."""
    if one_row:
        tiles = num_rows * -(-shape.group // tiling.pairs)
        return tiles, *num_splits(tiles, shape.num_kv_heads)
    tiles = -(-num_rows * shape.group // tiling.pairs) + num_requests  # each request may have one that is not full
    needed = -(-_ENOUGH_PROGRAMS // (tiles * shape.num_kv_heads))
    return tiles, min(1 << (needed - 1).bit_length(), _MOST_SPLITS), -(-_LEAST_POSITIONS // tiling.block)


def open_workspace(
    shape: TileShape, most_rows: int, most_requests: int, one_row: bool, device: torch.device
) -> TileTensors:
    """For launches of at most so many rows of so many requests."""
    tiling = _tiling(shape, one_row, is_hopper=device.type == "cuda" and _is_hopper(device))
    most = 0
    for num_rows in range(1, most_rows + 1):
        _, splits, _ = _splits(shape, num_rows, min(num_rows, most_requests), one_row, tiling)
        most = max(most, num_rows * splits if splits > 1 else 0)
    return TileTensors(
        parts=torch.empty(most * shape.num_heads * shape.value_dim, dtype=torch.float32, device=device),
        peaks_and_sums=torch.empty(most * shape.num_heads * 2, dtype=torch.float32, device=device),
    )


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def attend_in_tiles(
    q: Tensor,
    out: Tensor,
    pages: LayerPages,
    rows: Rows,
    shape: TileShape,
    workspace: TileTensors,
    scoring: Scoring,
) -> None:
    """Writes out [T, Hq, value_dim], the attention of T rows, each over the positions up to its own; zero in the rows
    behind the last request's.

    q: [T, Hq, value_dim + rest_dim], rotated, any strides but 1 in the last dimension. out: contiguous. pages: k
    and v of one layout, page_size a power of two from 16; with a rest_dim values are the beginnings of keys, v is not
    read, and the pages are not quantised. workspace: of this shape, for at least T rows.
    """
    num_rows, page_size, num_requests = q.shape[0], pages.k.shape[1], rows.kv_lens.shape[0]
    one_row = rows.starts is None
    tiling = _tiling(shape, one_row, is_hopper=q.is_cuda and _is_hopper(q.device))
    tiling = tiling._replace(block=min(tiling.block, page_size))
    num_tiles, splits, least_blocks = _splits(shape, num_rows, num_requests, one_row, tiling)
    numbers = scoring.numbers
    scale, softcap = math.log2(math.e) * numbers.scale, None
    if numbers.softcap:
        scale, softcap = 2.0 * scale / numbers.softcap, math.log2(math.e) * numbers.softcap
    starts = rows.kv_lens if rows.starts is None else rows.starts
    _tile_kernel[(num_tiles, shape.num_kv_heads, splits)](
        q,
        pages.k,
        pages.v,
        starts,
        rows.kv_lens,
        rows.block_tables,
        out,
        *workspace,
        scale,
        numbers.window,
        num_requests,
        num_rows,
        splits,
        least_blocks,
        q.stride(0),
        q.stride(1),
        rows.block_tables.stride(0),
        pages.k.stride(0),
        pages.k.stride(1),
        pages.k.stride(2),
        softcap,
        numbers.segment or None,
        scoring.sinks,
        scoring.alibi_slopes,
        pages.k_scales,
        pages.v_scales,
        shape.group,
        shape.value_dim,
        shape.rest_dim,
        page_size,
        tiling.pairs,
        tiling.block,
        max(32, triton.next_power_of_2(num_requests)),
        splits > 1,
        one_row,
        product_dtype(q.dtype, pages.k.dtype),
        num_warps=tiling.num_warps,
        num_stages=3,
    )
    if splits > 1:
        live_rows = None if rows.starts is None else rows.starts[num_requests:]
        _sum_kernel[(num_rows, shape.num_heads)](
            *workspace, live_rows, scoring.sinks, out, shape.value_dim, splits, num_warps=4
        )
