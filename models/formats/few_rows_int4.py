"""Products of few rows in e4m3 with int4 codes: a Triton kernel for SM90. Needs Triton; its interpreter will do.

Reading the weight is what such a product costs, and a byte of it has two codes. Nothing is computed to make them an
operand of the tensor cores: the four bits of a code, as a byte, are e4m3 of the code times 2**-9, exactly. A zero is
subtracted from the sums: the sum of inputs times (code - zero) is that of inputs times codes, less the zero times the
sum of the inputs, which the tensor cores make as well.

The weight is the left operand, which the tensor cores take from registers, so that a product costs them what its rows
do. Each block of columns is multiplied by its scale in float32.

Owns how a product is cut, and which are cut at all. Called by products.py. How the codes lie: layout.py.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphgen.models.chaining import launch_options
from graphgen.models.few_rows_weights import INT4_BLOCK, INT4_HALF
from graphgen.models.formats.as_they_lie import is_int4
from graphgen.models.spec.formats import PACKED_BLOCK

MOST_ROWS = 128
_MOST_ROWS_OF_ONE = 64
"""Program: more, with zeros, would not fit its registers."""
_MULTIPROCESSORS = 132
_LEAST_PROGRAMS, _LEAST_OF_SHORT = 192, 256
"""Of which several share a multiprocessor, and hide each other's waiting; where a program has at most 32 rows, which
leave room for more."""
_MOST_COUNTERS = 4096
"""Programs that may share their columns with others: of a product that is so large nobody does."""


class Cut(NamedTuple):
    """How a product is cut among programs."""

    rows: int
    """Of a program; those beyond the product's are dropped."""
    columns: int
    """Of a program: rows of the weight."""
    depth: int
    """Columns of the weight that a program reads in one turn."""
    splits: int
    """Programs that share the depth of the same columns; the last one to finish adds up their sums."""
    warps: int
    stages: int
    """Turns whose parts of both operands are on their way at a time."""


def serves(num_rows: int, depth: int, group: int, rows: int) -> bool:
    """Whether inputs [num_rows, depth] are multiplied here with a weight of which `group` columns, or all (0), and
    `rows` rows share a scale."""
    return num_rows <= MOST_ROWS and depth % PACKED_BLOCK == 0 and is_int4(group, rows)


def cut(num_rows: int, size: int, depth: int, zeros: bool) -> Cut:
    """What was the fastest for the weights of Llama-3.1-8B on an H200, and for others the nearest that fits: weights
    [size, depth] and at most MOST_ROWS rows."""
    rows = min(max(16, triton.next_power_of_2(num_rows)), _MOST_ROWS_OF_ONE)
    fills = size // 128 >= _MULTIPROCESSORS
    columns = 128 if fills and (rows == 32 or (rows == 64 and not zeros)) else 64
    turn = 256 if depth % 256 == 0 else 128
    programs = triton.cdiv(num_rows, rows) * triton.cdiv(size, columns)
    least = _LEAST_PROGRAMS if rows == 64 else _LEAST_OF_SHORT
    splits = next((splits for splits in (1, 2, 4) if programs * splits >= least), 4)
    return Cut(rows, columns, turn, min(splits, depth // turn), columns // 16, 3 if turn == 256 else 6)


def product(
    left: Tensor,
    of_left: Tensor,
    codes: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    group: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    chained: bool,
    chosen: Cut | None = None,
) -> Tensor:
    """(left times its scales) @ weight.T + bias, [T, N] of `dtype`, for at most MOST_ROWS rows.

    left: [T, K] e4m3. of_left: [T, 1] float32. codes, scale, zeros: of a weight [N, K] that `serves` says, see
    layout.py, `group` of whose columns share a scale, or all (0). All contiguous. chained: launch before the kernel
    ahead is done, and wait inside. chosen: how it is cut; None: in the best way that is known.
    """
    (num_rows, depth), (size, row_bytes) = left.shape, codes.shape
    how = chosen or cut(num_rows, size, depth, zeros is not None)
    grid = triton.cdiv(num_rows, how.rows), triton.cdiv(size, how.columns), how.splits
    out = left.new_empty(num_rows, size, dtype=dtype)
    parts, finished = None, None
    if how.splits > 1:
        parts = left.new_empty(math.prod(grid) * how.columns * how.rows, dtype=torch.float32)
        finished = _counters(left.device)
    int4_kernel[grid](
        left,
        of_left,
        codes,
        scale,
        zeros,
        bias,
        out,
        parts,
        finished,
        num_rows,
        size,
        row_bytes,
        scale.shape[1],
        group,
        how.rows,
        how.columns,
        how.depth // PACKED_BLOCK,
        how.splits,
        not triton.knobs.runtime.interpret,
        chained,
        num_warps=how.warps,
        num_stages=how.stages,
        **launch_options(chained),
    )
    return out


@functools.cache  # one process drives one device, in one stream
def _counters(device: torch.device) -> Tensor:
    """Of programs that have finished, for those that share columns: zero before and after every product."""
    return torch.zeros(_MOST_COUNTERS, dtype=torch.int32, device=device)


_LOW = tl.constexpr("and.b32 $0, $1, 0x0f0f0f0f;")
_HIGH = tl.constexpr("{ .reg .b32 a; shr.u32 a, $1, 4; and.b32 $0, a, 0x0f0f0f0f; }")
# Less 8. A code below is 7 less its last three bits, and that plus one, with a sign: 0x81.
_SIGNED_LOW = tl.constexpr(
    """
    {
    .reg .b32 below, rest, flips;
    lop3.b32 below, $1, 0x08080808, 0, 0x0c;
    shr.u32 below, below, 3;
    mul.lo.u32 flips, below, 7;
    lop3.b32 rest, $1, 0x07070707, flips, 0x6a;
    mad.lo.u32 $0, below, 0x81, rest;
    }
    """
)
_SIGNED_HIGH = tl.constexpr(
    """
    {
    .reg .b32 below, rest, flips;
    lop3.b32 below, $1, 0x80808080, 0, 0x0c;
    shr.u32 below, below, 7;
    mul.lo.u32 flips, below, 7;
    shr.u32 rest, $1, 4;
    lop3.b32 rest, rest, 0x07070707, flips, 0x6a;
    mad.lo.u32 $0, below, 0x81, rest;
    }
    """
)
_TO_CODES = tl.constexpr(512.0)
"""What a code is more than its byte as e4m3."""


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _codes(raw: "tl.tensor", HIGH: tl.constexpr, SIGNED: tl.constexpr, PTX: tl.constexpr) -> "tl.tensor":
    """One half of each byte as e4m3: the code, if SIGNED less 8, over _TO_CODES."""
    CODE: tl.constexpr = (_SIGNED_HIGH if HIGH else _SIGNED_LOW) if SIGNED else (_HIGH if HIGH else _LOW)
    if PTX:  # four bytes at a time
        half = tl.inline_asm_elementwise(CODE, "=r,r", [raw], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        half = (raw >> 4) if HIGH else (raw & 15)
        if SIGNED:
            half = tl.where(half < 8, 136 - half, half - 8).to(tl.uint8)
    return half.to(tl.float8e4nv, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _with_inputs(sums: "tl.tensor", left: "tl.tensor", ZEROS: tl.constexpr, BN: tl.constexpr) -> "tl.tensor":
    """sums with those of the inputs' columns, `left` [INT4_HALF, BM], of which zeros are subtracted."""
    if ZEROS:
        ones = tl.full((BN, INT4_HALF), 1, tl.uint8).to(tl.float8e4nv, bitcast=True)
        sums = tl.dot(ones, left, sums)
    return sums


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _scaled(
    part: "tl.tensor", sums: "tl.tensor", scale: "tl.tensor", zero: "tl.tensor", ZEROS: tl.constexpr
) -> "tl.tensor":
    if ZEROS:
        part += sums * -zero.to(tl.float32)[:, None]
    return part * scale.to(tl.float32)[:, None]


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _of_group(
    scales: "tl.tensor", zeros: "tl.tensor | None", column: int, GROUP: tl.constexpr
) -> "tuple[tl.tensor, tl.tensor]":
    """[BN] scales and zeros of the group that a column is in. scales, zeros: [BN] where those of a row begin."""
    group = column // GROUP if GROUP else 0
    scale = tl.load(scales + group)
    if zeros is not None:  # noqa: SIM108  # Triton's two branches may differ in type
        zero = tl.load(zeros + group)
    else:
        zero = scale  # nobody asks
    return scale, zero


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # triton has no types
def int4_kernel(
    left: "tl.tensor",
    of_left: "tl.tensor",
    codes: "tl.tensor",
    scale: "tl.tensor",
    zeros: "tl.tensor | None",
    bias: "tl.tensor | None",
    out: "tl.tensor",
    parts: "tl.tensor | None",
    finished: "tl.tensor | None",
    num_rows: int,
    N: int,
    row_bytes: int,
    num_groups: int,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    PTX: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Sums are [BN, BM]. BLOCKS: of INT4_BLOCK columns, in one turn. GROUP: see product."""
    split = tl.program_id(2)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside, exists = rows < num_rows, columns < N
    read = tl.minimum(columns, N - 1)  # a row that is there stands in for what is not
    along = tl.arange(0, INT4_HALF)
    rights = codes + read.to(tl.int64)[:, None] * row_bytes + along[None, :]
    lefts = left + rows[None, :] * (2 * row_bytes) + along[:, None]
    scales = scale + read * num_groups
    if zeros is not None:
        zeros += read * num_groups
    ZEROS: tl.constexpr = zeros is not None
    TURN: tl.constexpr = BLOCKS * INT4_HALF  # bytes of a row
    each = tl.cdiv(row_bytes // TURN, SPLITS) * TURN
    begin = split * each
    end = tl.minimum(begin + each, row_bytes)
    last = 2 * row_bytes - INT4_BLOCK
    if CHAINED:
        gdc_wait()
    result = tl.zeros((BN, BM), tl.float32)
    # Scales and zeros are fetched while the block ahead is multiplied.
    begin_column = tl.minimum(2 * begin, last)
    scale_of, zero_of = _of_group(scales, zeros, begin_column, GROUP)
    scale_of_high, zero_of_high = scale_of, zero_of
    if GROUP == INT4_HALF:
        scale_of_high, zero_of_high = _of_group(scales, zeros, begin_column + INT4_HALF, GROUP)
    for byte in range(begin, end, TURN):
        for block in tl.static_range(BLOCKS):
            start = byte + block * INT4_HALF
            raw = tl.load(rights + start)
            low = tl.load(lefts + 2 * start, inside[None, :], other=0.0)
            high = tl.load(lefts + 2 * start + INT4_HALF, inside[None, :], other=0.0)
            following = tl.minimum(2 * start + INT4_BLOCK, last)  # of the last one nobody asks
            next_scale, next_zero = _of_group(scales, zeros, following, GROUP)
            none = tl.zeros((BN, BM), tl.float32)
            sums = _with_inputs(none, low, ZEROS, BN)
            part = tl.dot(_codes(raw, False, not ZEROS, PTX), low, none)
            if GROUP == INT4_HALF:
                next_of_high = _of_group(scales, zeros, following + INT4_HALF, GROUP)
                result += _scaled(part, sums, scale_of, zero_of, ZEROS)
                part, sums = none, none
            sums = _with_inputs(sums, high, ZEROS, BN)
            part = tl.dot(_codes(raw, True, not ZEROS, PTX), high, part)
            result += _scaled(part, sums, scale_of_high, zero_of_high, ZEROS)
            scale_of, zero_of = next_scale, next_zero
            scale_of_high, zero_of_high = next_scale, next_zero
            if GROUP == INT4_HALF:
                scale_of_high, zero_of_high = next_of_high
    if CHAINED:
        gdc_launch_dependents()
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        places = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        own = parts + tile * (SPLITS * BN * BM)
        tl.store(own + split * (BN * BM) + places, result)
        tl.debug_barrier()  # the whole program's stores come before its word that it is done
        if tl.atomic_add(finished + tile, 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(finished + tile, 0)  # for the next product
        result = tl.load(own + places)
        for other in tl.static_range(1, SPLITS):
            result += tl.load(own + other * (BN * BM) + places)
    result *= (tl.load(of_left + rows, inside, other=0.0) * _TO_CODES)[None, :]
    if bias is not None:
        result += tl.load(bias + read).to(tl.float32)[:, None]
    stored = rows[None, :].to(tl.int64) * N + columns[:, None]
    tl.store(out + stored, result.to(out.dtype.element_ty), inside[None, :] & exists[:, None])
