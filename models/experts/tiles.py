"""The operator of a mixture of experts on CUDA: products of tiles, each of rows of one expert.

Owns the two products, the kernel of both, and which pairs of a row and an expert form a tile. Nothing waits for the
device: a step's shape alone says how many tiles are launched, and one that stays empty ends at once. So it can be
captured, and a pair of no expert costs nothing. Called by operator.py; needs Triton, and Triton's interpreter will do.

Few rows: each pair is a tile of its own. Its expert's weights are read once, which is what such a step costs, and
nothing is sorted. More rows: pairs are sorted by expert, and each expert's are cut into tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "relu": 5, "relu_squared": 6}
"""Numbers of the keys of feed_forward.ACTIVATIONS in the kernel; a product without one has "none"."""

MOST_PAIRS_UNSORTED = 64
"""Pairs up to which each is a tile. Beyond, some of 128 experts are likely to have several rows."""

PAIR_BLOCKS = (16, 32, 128)
"""Rows, columns and depth of a tile of one pair; tl.dot has no fewer rows."""
FEW_BLOCKS = (16, 32, 64)
"""The same of tiles of an expert with few rows."""
MANY_BLOCKS = (64, 64, 32)
"""The same where an expert has many rows on average."""


class Tiles(NamedTuple):
    """Pairs of a row and an expert, cut into tiles of `blocks[0]` places."""

    experts: Tensor  # [tiles] of each tile, E for a tile of none
    pairs: Tensor  # [tiles, places] numbers of pairs, P for an empty place
    blocks: tuple[int, int, int]


def make_tiles(experts: Tensor, num_experts: int) -> Tiles:
    """experts: [P] int64, of each pair; E = num_experts for none."""
    num_pairs = experts.shape[0]
    if num_pairs <= MOST_PAIRS_UNSORTED:
        places = torch.full((num_pairs, PAIR_BLOCKS[0]), num_pairs, dtype=torch.int64, device=experts.device)
        places[:, 0] = torch.arange(num_pairs, device=experts.device)
        return Tiles(experts, places, PAIR_BLOCKS)
    blocks = FEW_BLOCKS if num_pairs <= 16 * num_experts else MANY_BLOCKS
    size = blocks[0]
    # At most so many tiles are begun: full ones, and one of each expert that is not full.
    num_tiles = num_pairs // size + min(num_experts, num_pairs)
    ordered, order = experts.sort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    tiles_of_each = (counts[:num_experts] + size - 1) // size
    last_tiles, last_pairs = tiles_of_each.cumsum(0), counts.cumsum(0)
    first_places = torch.zeros_like(counts)
    first_places[1:] = last_tiles * size
    within = torch.arange(num_pairs, device=experts.device) - (last_pairs - counts)[ordered]
    places = torch.where(ordered < num_experts, first_places[ordered] + within, num_tiles * size)
    pairs = torch.full((num_tiles * size + 1,), num_pairs, dtype=torch.int64, device=experts.device)
    pairs.scatter_(0, places, order)  # those of no expert all into the last place, which is cut off
    of_tiles = torch.searchsorted(last_tiles, torch.arange(num_tiles, device=experts.device), right=True)
    return Tiles(of_tiles, pairs[:-1].view(num_tiles, size), blocks)


def run_in_tiles(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> Tensor:
    """See operator.run_experts."""
    num_experts, hidden_size, size = down.shape
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
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tiles: Tiles,
    pairs_per_row: int,
    activation: str,
    limit: float | None,
    up_plus_one: bool,
) -> None:
    """out[pair] = x[row of the pair] @ weight[its expert].T + bias, of a gated product gate and up in one."""
    num_experts, _, depth = weight.shape
    num_columns = out.shape[1]
    rows, columns, depth_block = tiles.blocks
    tiles_kernel[(tiles.experts.shape[0], triton.cdiv(num_columns, columns))](
        x,
        weight,
        bias,
        out,
        tiles.experts,
        tiles.pairs,
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
        rows,
        columns,
        depth_block,
        num_warps=4,
        num_stages=3,
    )


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _activated(x: "tl.tensor", ACTIVATION: tl.constexpr) -> "tl.tensor":
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


@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]  # triton has no types
def tiles_kernel(
    x: "tl.tensor",
    weight: "tl.tensor",
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """A tile's rows times BN columns of its expert. With an activation the weight has 2 N rows, N of gate and N of
    up."""
    expert = tl.load(tile_experts + tl.program_id(0))
    if expert < num_experts:
        pairs = tl.load(tile_pairs + tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))
        filled = pairs < num_pairs
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = columns < N
        x_rows = x + (pairs // pairs_per_row)[:, None] * K
        GATED: tl.constexpr = ACTIVATION != 0
        weight_rows = weight + (expert * (N * 2 if GATED else N) + columns)[None, :] * K
        first = tl.zeros((BM, BN), dtype=tl.float32)
        second = tl.zeros((BM, BN), dtype=tl.float32)
        for begin in range(0, K, BK):
            depth = begin + tl.arange(0, BK)
            has_x, has_weight = filled[:, None] & (depth < K)[None, :], inside[None, :] & (depth < K)[:, None]
            own = tl.load(x_rows + depth[None, :], has_x, other=0.0)
            first += tl.dot(own, tl.load(weight_rows + depth[:, None], has_weight, other=0.0), input_precision="ieee")
            if GATED:
                up = tl.load(weight_rows + N * K + depth[:, None], has_weight, other=0.0)
                second += tl.dot(own, up, input_precision="ieee")
        if HAS_BIAS:
            biases = bias + expert * (N * 2 if GATED else N) + columns
            first += tl.load(biases, inside, other=0.0).to(tl.float32)[None, :]
            if GATED:
                second += tl.load(biases + N, inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            if HAS_LIMIT:
                first = tl.minimum(first, limit)
                second = tl.minimum(tl.maximum(second, -limit), limit)
            first = _activated(first, ACTIVATION) * (second + 1.0 if UP_PLUS_ONE else second)
        places = out + pairs[:, None] * N + columns[None, :]
        tl.store(places, first.to(out.dtype.element_ty), filled[:, None] & inside[None, :])
