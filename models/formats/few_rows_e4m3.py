"""Products of few rows, both operands in e4m3: a Triton kernel for SM90. Needs Triton; its interpreter will do.

Reading the weight is what such a product costs. The library makes tiles of 128 columns, each by one multiprocessor, so
that of the 132 of an H200 a weight of 4096 rows keeps 32 busy. Here a program has as few columns as keep nearly all of
them busy, and as many pieces of the weight on their way as its memory holds.

Owns how a product is cut, and which are cut at all. Called by products.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.chaining import launch_options
from graphgen.models.formats.as_they_lie import BLOCK

LEAST_DEPTH = 128
"""Columns of a weight that are multiplied at a time: its columns are a multiple of it."""
MOST_ROWS = 256
ROWS = 64
"""Of a program, which is what the tensor cores of SM90 take at a time; those beyond the product's are dropped."""
_MULTIPROCESSORS = 132
_LEAST_PROGRAMS = 88
"""Programs that leave a third of the multiprocessors idle."""
_LIBRARY_TILE = 128
"""Rows and columns of a tile of the library."""


class Cut(NamedTuple):
    """How a product is cut among programs."""

    columns: int
    """Of a program: rows of the weight."""
    depth: int
    """Columns of the weight that a program reads in one turn."""
    stages: int
    """Turns whose parts of both operands are on their way at a time."""


def serves(num_rows: int, size: int, depth: int) -> bool:
    """Whether a product [num_rows, size] over `depth` columns is made here, and not by the library, which is faster
    where its tiles keep all multiprocessors busy."""
    num_tiles = -(-num_rows // _LIBRARY_TILE) * -(-size // _LIBRARY_TILE)
    keeps_half_idle = num_rows <= MOST_ROWS and num_tiles <= _MULTIPROCESSORS // 2
    return depth % LEAST_DEPTH == 0 and (num_rows <= ROWS or keeps_half_idle)


def cut(num_rows: int, size: int, depth: int, blocked: bool) -> Cut:
    """What was the fastest for the weights of Llama-3.1-8B on an H200, and for others the nearest that fits."""
    num_blocks = -(-num_rows // ROWS)
    columns = next((columns for columns in (128, 64) if num_blocks * size // columns >= _LEAST_PROGRAMS), 32)
    if columns == 128 and num_blocks * size // columns > _MULTIPROCESSORS:  # two programs share a multiprocessor
        return Cut(columns, LEAST_DEPTH, 4)
    if blocked or depth % 256:
        return Cut(columns, LEAST_DEPTH, 8)
    return Cut(columns, 256, 4 if columns == 128 else 6)


def product(
    left: Tensor,
    of_left: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    blocked: bool,
    fast_sums: bool,
    chained: bool,
    chosen: Cut | None = None,
) -> Tensor:
    """(left times its scales) @ (codes times theirs).T + bias, [T, N] of `dtype`, for shapes that `serves` says.

    left: [T, K] e4m3. codes: [N, K] e4m3. of_left, scale: float32, all contiguous; [T, 1] and [N, 1], or if blocked
    [K / BLOCK, T] and [ceil(N / BLOCK), K / BLOCK]. fast_sums: see products.FAST_SUMS. chained: launch before the
    kernel ahead is done, and wait inside. chosen: how it is cut; None: in the best way that is known.
    """
    (num_rows, depth), size = left.shape, codes.shape[0]
    how = chosen or cut(num_rows, size, depth, blocked)
    out = left.new_empty(num_rows, size, dtype=dtype)
    e4m3_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(size, how.columns))](
        left,
        of_left,
        codes,
        scale,
        bias,
        out,
        num_rows,
        size,
        depth,
        ROWS,
        how.columns,
        how.depth,
        BLOCK if blocked else 0,
        0 if fast_sums else LEAST_DEPTH,
        chained,
        num_warps=4,
        num_stages=how.stages,
        **launch_options(chained),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def e4m3_kernel(
    left: "tl.tensor",
    of_left: "tl.tensor",
    codes: "tl.tensor",
    scale: "tl.tensor",
    bias: "tl.tensor | None",
    out: "tl.tensor",
    num_rows: int,
    N: int,
    K: int,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCALED: tl.constexpr,
    EXACT: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """SCALED: columns of both operands, and rows of the weight, that share a scale; 0: all columns of a row do. EXACT:
    columns after which sums go to float32; 0: none."""
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    depth = tl.arange(0, BK)
    inside, exists = rows < num_rows, columns < N
    read = tl.minimum(columns, N - 1)  # a row that is there stands in for what is not
    lefts = left + rows[:, None] * K + depth[None, :]
    rights = codes + read.to(tl.int64)[None, :] * K + depth[:, None]
    if CHAINED:
        gdc_wait()
    result = tl.zeros((BM, BN), tl.float32)
    if SCALED:  # scales are fetched while the block ahead is multiplied
        of_columns = scale + read // SCALED * (K // SCALED)
        next_rows = tl.load(of_left + rows, inside, other=0.0)
        next_columns = tl.load(of_columns)
    for k in range(0, K, BK):
        some = tl.load(lefts + k, inside[:, None], other=0.0)
        if SCALED:
            both = next_rows[:, None] * next_columns[None, :]
            block = tl.minimum(k // SCALED + 1, K // SCALED - 1)
            next_rows = tl.load(of_left + block * num_rows + rows, inside, other=0.0)
            next_columns = tl.load(of_columns + block)
            result += tl.dot(some, tl.load(rights + k)) * both
        elif EXACT:
            result = tl.dot(some, tl.load(rights + k), result, max_num_imprecise_acc=EXACT)
        else:
            result = tl.dot(some, tl.load(rights + k), result)
    if CHAINED:
        gdc_launch_dependents()
    if not SCALED:
        result *= tl.load(of_left + rows, inside, other=0.0)[:, None] * tl.load(scale + read)[None, :]
    if bias is not None:
        result += tl.load(bias + read).to(tl.float32)[None, :]
    places = rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), inside[:, None] & exists[None, :])
