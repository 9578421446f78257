"""The operator of a mixture of experts on CUDA: products of tiles, each of rows of one expert.

Owns the two products, the kernel of both, and which pairs of a row and an expert form a tile. Nothing waits for the
device: a step's shape alone says how many tiles are launched, and one that stays empty ends at once. So it can be
captured, and a pair of no expert costs nothing. Called by operator.py; needs Triton, and Triton's interpreter will do.

Few rows: each pair is a tile of its own. Its expert's weights are read once, which is what such a step costs, and
nothing is sorted. More rows: two kernels count the pairs of each expert and write them into its tiles.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from graphgen.models.experts.tiles_stored import reading_of, stored_products
from graphgen.models.few_rows_tiles import tensors_of
from graphgen.models.formats.products import Weight

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "relu": 5, "relu_squared": 6}
"""Numbers of the keys of activations.ACTIVATIONS in the kernel; a product without one has "none"."""

MOST_PAIRS_UNSORTED = 64
"""Pairs up to which each is a tile. Beyond, some of 128 experts are likely to have several rows."""

PAIR_BLOCKS = (16, 32, 128)
"""Rows, columns and depth of a tile of one pair; tl.dot has no fewer rows."""
FEW_BLOCKS = (16, 32, 64)
"""The same of tiles of an expert with few rows."""
MANY_BLOCKS = (64, 64, 32)
"""The same where an expert has many rows on average."""

PAIRS_BLOCK = 1024
"""Pairs that a program which sorts them reads at a time."""


class Tiles(NamedTuple):
    """Pairs of a row and an expert, cut into tiles of `blocks[0]` places."""

    experts: Tensor
    """[tiles] of each tile; E for a tile of none."""
    pairs: Tensor | None
    """[tiles, places] numbers of pairs, P for an empty place; None: each tile has the pair of its own number."""
    blocks: tuple[int, int, int]


def make_tiles(experts: Tensor, num_experts: int) -> Tiles:
    """experts: [P] int64, of each pair; E = num_experts for none."""
    num_pairs = experts.shape[0]
    if num_pairs <= MOST_PAIRS_UNSORTED:
        return Tiles(experts, None, PAIR_BLOCKS)
    blocks = FEW_BLOCKS if num_pairs <= 16 * num_experts else MANY_BLOCKS
    # At most so many tiles are begun: full ones, and one of each expert that is not full.
    num_tiles = num_pairs // blocks[0] + min(num_experts, num_pairs)
    counts = experts.new_empty(num_experts)
    of_tiles, pairs = experts.new_empty(num_tiles), experts.new_empty(num_tiles, blocks[0])
    count_kernel[(num_experts,)](experts, counts, num_pairs, PAIRS_BLOCK)
    place_kernel[(num_experts + 1,)](
        experts,
        counts,
        of_tiles,
        pairs,
        num_pairs,
        num_tiles,
        num_experts,
        blocks[0],
        PAIRS_BLOCK,
        triton.next_power_of_2(num_experts),
    )
    return Tiles(of_tiles, pairs, blocks)


def run_in_tiles(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor | Weight,
    gate_up_bias: Tensor | None,
    down: Tensor | Weight,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> Tensor:
    """See operator.run_experts."""
    num_experts, hidden_size = tensors_of(down)[0].shape[:2]
    size = tensors_of(gate_up)[0].shape[1] // 2
    tiles = make_tiles(experts.flatten(), num_experts)
    num_pairs = experts.numel()
    inner, out = x.new_empty(num_pairs, size), x.new_empty(num_pairs, hidden_size)
    if num_pairs == 0:
        return out.view(*experts.shape, hidden_size)
    _product(x, gate_up, gate_up_bias, inner, tiles, num_pairs // x.shape[0], activation, limit, up_plus_one)
    _product(inner, down, down_bias, out, tiles, 1, "none", None, False)
    return out.view(*experts.shape, hidden_size)


def _product(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None,
    out: Tensor,
    tiles: Tiles,
    pairs_per_row: int,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> None:
    """out[pair] = x[row of the pair] @ weight[its expert].T + bias, of a gated product gate and up in one."""
    stored = tensors_of(weight)
    num_experts, depth, num_columns = stored[0].shape[0], x.shape[1], out.shape[1]
    rows, columns, depth_block = tiles.blocks
    tiles_kernel[(tiles.experts.shape[0], triton.cdiv(num_columns, columns))](
        x,
        *stored,
        bias,
        out,
        tiles.experts,
        tiles.experts if tiles.pairs is None else tiles.pairs,
        out.shape[0],
        pairs_per_row,
        num_experts,
        0.0 if limit is None else limit,
        num_columns,
        depth,
        bias is not None,
        ACTIVATIONS[activation],
        limit is not None,
        up_plus_one,
        tiles.pairs is not None,
        rows,
        columns,
        depth_block,
        reading_of(weight.format, depth, depth_block) if isinstance(weight, Weight) else None,
        num_warps=4,
        num_stages=3,
    )


# --- which pairs form a tile ---


@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]  # triton has no types
def count_kernel(experts: "tl.tensor", counts: "tl.tensor", num_pairs: int, BLOCK: tl.constexpr) -> None:
    """One program an expert: how many pairs it has."""
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for begin in range(0, num_pairs, BLOCK):
        pairs = begin + tl.arange(0, BLOCK)
        found += (tl.load(experts + pairs, pairs < num_pairs, other=-1) == tl.program_id(0)).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found, 0).to(tl.int64))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])  # type: ignore[untyped-decorator]  # triton has no types
def place_kernel(
    experts: "tl.tensor",
    counts: "tl.tensor",
    tile_experts: "tl.tensor",
    tile_pairs: "tl.tensor",
    num_pairs: int,
    num_tiles: int,
    num_experts: int,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
) -> None:
    """One program an expert, which writes its pairs in their order into its tiles, and one for the tiles of none."""
    expert = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS_BLOCK)
    all_counts = tl.load(counts + numbers, numbers < num_experts, other=0).to(tl.int32)
    first_tile = tl.sum(tl.where(numbers < expert, (all_counts + BM - 1) // BM, 0), 0)
    count = tl.sum(tl.where(numbers == expert, all_counts, 0), 0)
    end_tile = tl.where(expert == num_experts, num_tiles, first_tile + (count + BM - 1) // BM)
    for begin in range(first_tile, end_tile, BLOCK):
        tiles = begin + tl.arange(0, BLOCK)
        tl.store(tile_experts + tiles, tl.zeros((BLOCK,), dtype=tl.int64) + expert, tiles < end_tile)
    if expert < num_experts:
        begin_place = first_tile * BM
        num_placed = 0
        for begin in range(0, num_pairs, BLOCK):
            pairs = begin + tl.arange(0, BLOCK)
            own = tl.load(experts + pairs, pairs < num_pairs, other=-1) == expert
            places = begin_place + num_placed + tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(tile_pairs + places, pairs.to(tl.int64), own)
            num_placed += tl.sum(own.to(tl.int32), 0)
        places = begin_place + count + tl.arange(0, BM)  # what the last tile has left
        tl.store(tile_pairs + places, tl.zeros((BM,), dtype=tl.int64) + num_pairs, places < end_tile * BM)


# --- a product ---


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def activated(x: "tl.tensor", ACTIVATION: tl.constexpr) -> "tl.tensor":
    if ACTIVATION == 1:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh(y)) is sigmoid(2 y)
    elif ACTIVATION == 4:
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == 5:
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == 6:
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _products(
    x_rows: "tl.tensor",
    filled: "tl.tensor",
    weight_rows: "tl.tensor",
    inside: "tl.tensor",
    apart: int,
    K: int,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor]":
    """[BM, BN] float32: rows of the input, which begin at [BM, 1], times rows of a weight, which begin at [1, BN]; and
    where GATED the same of the rows that begin `apart` elements further, else zeros."""
    first = tl.zeros((BM, BN), dtype=tl.float32)
    second = tl.zeros((BM, BN), dtype=tl.float32)
    for begin in range(0, K, BK):
        depth = begin + tl.arange(0, BK)
        has_x, has_weight = filled[:, None] & (depth < K)[None, :], inside[None, :] & (depth < K)[:, None]
        own = tl.load(x_rows + depth[None, :], has_x, other=0.0)
        first += tl.dot(own, tl.load(weight_rows + depth[:, None], has_weight, other=0.0), input_precision="ieee")
        if GATED:
            up = tl.load(weight_rows + apart + depth[:, None], has_weight, other=0.0)
            second += tl.dot(own, up, input_precision="ieee")
    return first, second


@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]  # triton has no types
def tiles_kernel(
    x: "tl.tensor",
    weight: "tl.tensor",
    scales: "tl.tensor | None",
    zeros: "tl.tensor | None",
    bias: "tl.tensor",
    out: "tl.tensor",
    tile_experts: "tl.tensor",
    tile_pairs: "tl.tensor",
    num_pairs: int,
    pairs_per_row: int,
    num_experts: int,
    limit: float,
    N: int,
    K: int,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    UP_PLUS_ONE: tl.constexpr,
    SORTED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """A tile's rows times BN columns of its expert. With an activation the weight has 2 N rows, N of gate and N of
    up. HOW: see tiles_stored.py; None for a weight that is not quantised, whose scales and zeros are None."""
    expert = tl.load(tile_experts + tl.program_id(0))
    if expert < num_experts:
        if SORTED:
            pairs = tl.load(tile_pairs + tl.program_id(0) * BM + tl.arange(0, BM))
        else:
            pairs = tl.where(tl.arange(0, BM) == 0, tl.program_id(0), num_pairs).to(tl.int64)
        filled = pairs < num_pairs
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = columns < N
        x_rows = x + (pairs // pairs_per_row)[:, None] * K
        GATED: tl.constexpr = ACTIVATION != 0
        rows = expert * (N * 2 if GATED else N) + columns
        if HOW is None:
            first, second = _products(x_rows, filled, weight + rows[None, :] * K, inside, N * K, K, BM, BN, BK, GATED)
        else:
            first, second = stored_products(
                x_rows, filled, weight, scales, zeros, rows, inside, N, K, BM, BN, GATED, HOW
            )
        if HAS_BIAS:
            biases = bias + expert * (N * 2 if GATED else N) + columns
            first += tl.load(biases, inside, other=0.0).to(tl.float32)[None, :]
            if GATED:
                second += tl.load(biases + N, inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            if HAS_LIMIT:
                first = tl.minimum(first, limit)
                second = tl.minimum(tl.maximum(second, -limit), limit)
            first = activated(first, ACTIVATION) * (second + 1.0 if UP_PLUS_ONE else second)
        places = out + pairs[:, None] * N + columns[None, :]
        tl.store(places, first.to(out.dtype.element_ty), filled[:, None] & inside[None, :])
